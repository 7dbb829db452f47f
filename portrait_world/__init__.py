"""Portrait World: drawn people, the small models trained on them, their evaluation, report and gallery."""
