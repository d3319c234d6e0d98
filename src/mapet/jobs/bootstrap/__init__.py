"""Pre-training in rounds, each on ids of the features that the previous round learned."""
