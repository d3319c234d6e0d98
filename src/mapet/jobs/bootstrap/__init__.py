"""Pre-training in rounds, each on ids of the features that the round before learned."""
