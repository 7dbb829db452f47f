"""One published method each; line 1 of a module cites its paper."""
