"""Full fp32 arithmetic where autocast or TF32 would reduce precision.

Pushed to the hub with the model; imports nothing else from the project.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# The settings are process-wide: the first thread to enter changes them, the last to leave restores them.
_lock = threading.Lock()
_depth = 0
_previous: list[str] = []


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute matrix products of fp32 tensors in full fp32, overriding autocast, TF32 (CUDA) and bf16 (oneDNN on CPU).

    Needs torch 2.9 or newer. The backward pass uses the settings outside the context.
    """
    global _depth, _previous
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _lock:
        if _depth == 0:
            _previous = [backend.fp32_precision for backend in backends]
            for backend in backends:
                backend.fp32_precision = "ieee"
        _depth += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for backend, precision in zip(backends, _previous, strict=True):
                    backend.fp32_precision = precision
