"""How Portrait World is drawn: people, scenes, and the parts of a picture."""
