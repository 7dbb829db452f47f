"""Loader nodes."""
