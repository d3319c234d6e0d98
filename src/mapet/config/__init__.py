"""Configurations: typed, flat, every key documented; imports neither torch nor timm."""
