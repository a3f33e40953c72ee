"""Bucketed averaging of gradients over processes."""

from collections.abc import Iterable

import torch
import torch.distributed
from torch import nn

BUCKET_BYTES = 32 * 2**20


def average_gradients(parameters: Iterable[nn.Parameter], num_processes: int) -> None:
    """Average gradients over all processes, in place. Every process must call it with gradients of the same parameters.

    Gradients are all-reduced in buckets, as in DDP (Li et al. 2020), since a model has hundreds of small ones.
    """
    bucket: list[torch.Tensor] = []
    size = 0
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        num_bytes = gradient.numel() * gradient.element_size()
        if bucket and (size + num_bytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            _average(bucket, num_processes)
            bucket, size = [], 0
        bucket.append(gradient)
        size += num_bytes
    if bucket:
        _average(bucket, num_processes)


def _average(gradients: list[torch.Tensor], num_processes: int) -> None:
    if len(gradients) == 1 and gradients[0].is_contiguous():  # e.g. word embeddings: avoids a copy
        torch.distributed.all_reduce(gradients[0])
        gradients[0] /= num_processes
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= num_processes
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
