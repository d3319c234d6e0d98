"""Pre-training objectives, and what a task is."""
