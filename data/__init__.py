"""Documents, tokens and chunks: knows tokenizers and datasets, never models."""
