"""What the pack costs, in ratios to the bare model: `python -m benchmarks`."""
