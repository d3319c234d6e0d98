"""Apply a trained model to images, in order."""
