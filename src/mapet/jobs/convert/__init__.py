"""Checkpoints of MaPeT's authors, turned into folders that timm loads."""
