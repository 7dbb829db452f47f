"""The evidence: `python -m training.report` measures every method on unseen people and writes docs/evidence.md."""
