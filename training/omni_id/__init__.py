"""Training of Omni-ID (arXiv 2412.09694): few images of a person are encoded, many are reconstructed from that."""
