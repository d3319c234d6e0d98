"""Packing of images into shards, and the index of shards."""
