"""A trained model applied to images: features and classes, in a file."""
