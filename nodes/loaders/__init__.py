"""Loader nodes: from files and settings to encoders and adapters."""
