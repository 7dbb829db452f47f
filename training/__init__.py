"""Portrait World and what is trained on it: `python -m training WHAT --config FILE`, on the host's own modules."""
