"""Data pipeline: documents → tokens → chunks; depends on tokenizers and datasets, never on models."""
