"""Image sets, and how their images become batches."""
