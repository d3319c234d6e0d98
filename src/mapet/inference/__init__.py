"""A trained model, wherever it comes from, applied to images in order."""
