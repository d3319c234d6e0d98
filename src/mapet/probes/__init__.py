"""What frozen features are worth: k-NN, linear and attentive probes."""
