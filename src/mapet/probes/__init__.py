"""Evaluation of frozen features by k-NN, linear and attentive probes."""
