"""Sharded weights (FSDP): keeping the ranks in step, and unsupported options.

Each layer is gathered from all ranks whenever it runs, forward or backward, so a call on a single rank would deadlock.
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
    """Whether the weights are sharded. (DeepSpeed ZeRO-2 shards only gradients and optimizer state.)"""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_to_shard(model: nn.Module, accelerator: Accelerator, timeout: float) -> None:
    """Prepare the model for sharding by `accelerator.prepare`, with documents of different lengths on each rank.

    accelerate would gather weights and reduce gradients in bf16 or fp16; here they stay in fp32, and callers of the
    model enter `accelerator.autocast()`, as without sharding. autocast keeps its bf16 copies of the weights until the
    backward pass: 2 bytes per encoder parameter on each rank.

    Args:
        timeout: seconds to wait for the other ranks.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    model.agree_on_batches = partial(agree_on_batches, group=gloo_group(timeout))  # type: ignore[assignment]


def agree_on_batches(recomputes: list[bool], group: Any) -> list[bool]:
    """Synchronize the recomputation flags of the encoder batches across ranks.

    Returns as many flags as the rank with the most batches has; a batch is recomputed if any rank recomputes it. A
    collective call: every rank must take part.
    """
    count = torch.tensor(len(recomputes))
    torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX, group)
    agreed = torch.zeros(int(count), dtype=torch.uint8)
    agreed[: len(recomputes)] = torch.tensor(recomputes)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group)
    return agreed.bool().tolist()


def gloo_group(timeout: float) -> Any:
    """Create a process group of all ranks on the CPU, so that synchronizing does not wait for a GPU.

    A collective call: every rank must take part.

    Args:
        timeout: seconds to wait for the other ranks.

    Raises:
        ValueError: the ranks cannot connect to each other.
    """
    try:
        return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise ValueError(
            f"The ranks cannot connect to each other with gloo ({str(error).partition(chr(10))[0]}): set the network "
            "interface, e.g. GLOO_SOCKET_IFNAME=eth0, or make the hostname resolvable."
        ) from error


def refuse_to_shard(args: HierarchicalTrainingArguments) -> None:
    """Raise ValueError for options that need the full model on each device."""
    for option, reason in (
        ("dry_run", "measures the full model on one device"),
        ("freeze_encoder", "needs the full encoder on each device (use ddp.yaml instead)"),
        ("lora_rank", "merges adapters into full weights (use ddp.yaml instead)"),
    ):
        if getattr(args, option):
            raise ValueError(f"--{option} {reason} and cannot be used with sharded weights (FSDP).")
