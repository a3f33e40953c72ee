"""What trains the model: the trainer, its callbacks, losses, metrics, memory."""
