"""Patch nodes: each adds one method to a MODEL."""
