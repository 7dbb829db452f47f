"""Training of adapters and base models: `python -m training TASK --config FILE`."""
