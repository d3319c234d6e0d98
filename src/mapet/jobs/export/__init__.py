"""``mapet export``: write a trained model for others, and check the result."""
