"""Commands other than train_hf.py, run as `python -m scripts.NAME`."""
