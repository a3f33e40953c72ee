"""Weights sharded over ranks (FSDP): what all of them must do alike, and what none of them may.

A layer is gathered from all ranks when it is called, forward and backward, and let go afterwards: a call that one rank makes
alone waits for the other ranks for ever.
"""

from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .training_args import HierarchicalTrainingArguments


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether the layers' weights are sharded. (DeepSpeed's ZeRO-2 shards gradients and optimizer alone.)"""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_to_shard(model: nn.Module, accelerator: Accelerator, timeout: float) -> None:
    """Let the model be sharded by `accelerator.prepare`, and its ranks' documents differ in length.

    accelerate would gather the weights, and reduce their gradients, in bf16 or fp16; they stay in fp32 here, and whoever calls
    the model enters `accelerator.autocast()`, as without sharding. The bf16 copies that autocast makes of a layer's weights
    stay until the backward pass, 2 bytes a parameter of the encoder on each rank.

    Args:
        timeout: seconds that one rank waits for the other ranks.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    model.agree_on_batches = partial(agree_on_batches, group=gloo_group(timeout))  # type: ignore[assignment]


def agree_on_batches(recomputes: list[bool], group: Any) -> list[bool]:
    """Of each encoder batch whether it is recomputed in the backward pass → the same for all ranks, as many as the rank
    with most has: one is recomputed where any rank recomputes it. Every rank must call it."""
    count = torch.tensor(len(recomputes))
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group)
    agreed = torch.zeros(int(count), dtype=torch.uint8)
    agreed[: len(recomputes)] = torch.tensor(recomputes)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group)
    return agreed.bool().tolist()


def gloo_group(timeout: float) -> Any:
    """All ranks, on the CPU, so that to agree does not wait for a GPU. Every rank must call it.

    Args:
        timeout: seconds that one rank waits for the other ranks.

    Raises:
        ValueError: they cannot reach one another.
    """
    try:
        return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ValueError(
            f"The processes cannot reach one another by gloo ({str(error).partition(chr(10))[0]}): name the "
            "network interface between them, GLOO_SOCKET_IFNAME=eth0, or make the host's name resolve."
        ) from error


def refuse_to_shard(args: HierarchicalTrainingArguments) -> None:
    """Raises ValueError for an option that would load the whole model on each device."""
    for option, why in (
        ("dry_run", "measures the whole model on one device"),
        (
            "freeze_encoder",
            "encodes with the whole encoder on each device, and leaves little to shard: train with ddp.yaml",
        ),
        ("bf16_full_eval", "moves the whole model to each device"),
        ("fp16_full_eval", "moves the whole model to each device"),
    ):
        if getattr(args, option):
            raise ValueError(f"--{option} {why}, and cannot be used where weights are sharded (FSDP).")
