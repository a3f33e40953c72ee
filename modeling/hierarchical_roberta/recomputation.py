"""Activation checkpointing: the backward pass recomputes activations with the same random state.

Pushed to the hub with the model; imports nothing else from the project.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Torch's RNG state on the CPU and, if different, on the device."""
    device_state = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *device_state]


def set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    """Restore a state returned by `random_state` for this device."""
    torch.set_rng_state(state[0])
    for device_state in state[1:]:
        torch.get_device_module(device).set_rng_state(device_state)


def recomputed(function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """Wrap `function` in activation checkpointing.

    torch restores the RNG state on CUDA itself, but not on Apple's GPUs (its checkpointing checks whether the device
    module is initialized, which `torch.mps` does not report); there, and on a CPU, it is restored here.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _restored_rng(device, random_state(device))

    options: dict[str, Any] = {} if device.type == "cuda" else {"preserve_rng_state": False, "context_fn": contexts}
    return lambda *args: checkpoint(function, *args, use_reentrant=False, **options)


@contextmanager
def _restored_rng(device: torch.device, state: list[torch.Tensor]) -> Iterator[None]:
    previous = random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, previous)
