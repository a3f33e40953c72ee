"""The model package: every file here is pushed with the model and imports nothing else from the project."""
