"""Apply nodes, which patch a MODEL, and the patching mechanism that they share."""
