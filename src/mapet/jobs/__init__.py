"""Jobs: each in its own room, with its configuration, its work and its command."""
