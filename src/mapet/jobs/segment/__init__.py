"""Semantic segmentation by a head on frozen patch features."""
