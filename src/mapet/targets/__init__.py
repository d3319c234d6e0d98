"""Sources of the values that a run predicts: token ids, features, pixels."""
