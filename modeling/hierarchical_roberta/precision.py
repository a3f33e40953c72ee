"""fp32 arithmetic where autocast or TF32 would round it.

This file travels to the hub with the model and imports nothing else of the project.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The settings are the process's: of several threads the first to enter changes them, the last to leave restores them.
_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products of fp32 tensors in fp32 for the while, whatever autocast, TF32 (on CUDA) and bf16 (in oneDNN on a
    CPU) are set to. Needs torch 2.9 or newer. The backward pass of what is computed here runs as it is set outside."""
    global _inside, _before
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _lock:
        if _inside == 0:
            _before = [backend.fp32_precision for backend in backends]
            for backend in backends:
                backend.fp32_precision = "ieee"
        _inside += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for backend, precision in zip(backends, _before, strict=True):
                    backend.fp32_precision = precision
