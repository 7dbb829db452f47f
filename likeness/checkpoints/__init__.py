"""Checkpoint files: detection by tensors, key maps, metadata of the native format, safe pickle reading."""
