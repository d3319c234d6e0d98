"""Evaluation of a model: k-NN, linear probe, attentive probe, or its own classifier."""
