"""Jobs: one package each, with its configuration, its work and its command."""
