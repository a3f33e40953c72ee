"""The model, its training and its metrics: knows tensors, never files of documents."""
