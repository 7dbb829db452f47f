"""AdaFace (NeurIPS 2024 submission): a teacher that reads faces as words, and what puts them into the prompt."""
