"""Makes the weights of Portrait World from nothing: `python -m portrait_world train`."""
