"""What a run predicts: token ids, features, pixels; where they come from."""
