"""Training tasks for identity adapters on a frozen base model."""
