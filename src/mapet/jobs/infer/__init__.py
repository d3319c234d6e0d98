"""Features (``mapet embed``) and predicted classes (``mapet predict``) of images, in a file."""
