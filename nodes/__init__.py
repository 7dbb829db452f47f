"""The host's side of the pack: `registry.py` gathers the nodes."""
