"""FlashFace: the Apply node for reference attention, its added layers, and the face position."""
