"""The commands beside train_hf.py; each is run as `python -m scripts.NAME`."""
