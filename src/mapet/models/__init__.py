"""Vision Transformers: timm's, with attention that takes a mask of rows and keys."""
