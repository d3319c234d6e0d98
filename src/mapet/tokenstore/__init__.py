"""Token ids made once and kept on disk."""
