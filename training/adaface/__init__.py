"""Training of AdaFace (NeurIPS 2024 submission): an Arc2Face teacher, and the prompt inverter."""
