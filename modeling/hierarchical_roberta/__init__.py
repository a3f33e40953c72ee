"""The model, as it is pushed: every file here travels with it, and imports nothing else of the project."""
