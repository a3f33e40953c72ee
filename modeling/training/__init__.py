"""Training: the trainer, callbacks, losses, metrics and memory planning."""
