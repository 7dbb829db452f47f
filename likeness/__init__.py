"""Identity-preserving generation as plain torch: no host, no paths, no downloads."""
