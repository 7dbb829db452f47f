"""Loader nodes: encoders, adapters and models from files."""
