"""Fine-tuning a model on labelled images."""
