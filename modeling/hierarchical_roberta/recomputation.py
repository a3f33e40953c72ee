"""Activations that are not kept: the backward pass recomputes them, with the same random numbers.

This file travels to the hub with the model and imports nothing else of the project.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Torch's random state on the CPU, and on the device if it is another."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    """Go back to a state that `random_state` gave for this device."""
    torch.set_rng_state(state[0])
    for own in state[1:]:
        torch.get_device_module(device).set_rng_state(own)


def recomputed(function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """`function`, keeping no activations: the backward pass runs it again.

    torch replays the random state of CUDA by itself, but not that of Apple's GPUs (its checkpointing asks whether
    `torch.mps` is initialized, which has no such mark): there, and on a CPU, it is replayed here.
    """

    def replaying() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _replayed(device, random_state(device))

    options: dict[str, Any] = {} if device.type == "cuda" else {"preserve_rng_state": False, "context_fn": replaying}
    return lambda *args: checkpoint(function, *args, use_reentrant=False, **options)


@contextmanager
def _replayed(device: torch.device, state: list[torch.Tensor]) -> Iterator[None]:
    before = random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, before)
