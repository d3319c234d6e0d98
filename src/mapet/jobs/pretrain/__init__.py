"""Pre-training a ViT on unlabelled images."""
