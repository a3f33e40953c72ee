"""Pushing a run to the Hugging Face hub."""
