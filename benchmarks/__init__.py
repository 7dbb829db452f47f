"""Cost of each adapter kind relative to the unpatched model: `python -m benchmarks`."""
