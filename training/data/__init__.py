"""Training data: image sources, WebDataset shards, batches of several images per person."""
