"""Stand-in models: the layouts of published files with random weights, for machines without the real ones."""
