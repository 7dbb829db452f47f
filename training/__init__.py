"""Trains what the pack uses: `python -m training WHAT --config FILE`. Plain torch and accelerate on the host's modules."""
