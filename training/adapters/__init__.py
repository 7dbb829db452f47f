"""Adapters for a base stack that is trained already, through the attention code that runs them."""
