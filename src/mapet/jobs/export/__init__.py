"""A trained model written for others, and checked."""
