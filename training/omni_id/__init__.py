"""The training of Omni-ID (arXiv 2412.09694): few pictures of a person are read, many are to be made of that alone."""
