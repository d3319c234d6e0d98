"""What a model is worth: k-NN, probes, its own classifier."""
