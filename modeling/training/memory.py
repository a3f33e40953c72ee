"""Estimates before training: memory from the tensors that autograd saves, time from one encoder batch, live chunks."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..hierarchical_roberta.modeling_hierarchical_roberta import (
    BATCHES_PER_CAST,
    HierarchicalRobertaForSequenceClassification,
)
from .runtime import format_duration, free_memory
from .training_args import HierarchicalTrainingArguments

logger = logging.getLogger("train_hf")
GIB, MIB = 2**30, 2**20
# Usable share of the free memory. On a CPU it is shared with other processes.
MEMORY_FRACTION = {"cuda": 0.85, "cpu": 0.5}
# Allocator overhead: measured peaks were 0.9 to 1.3 times what autograd saves (docs/log.md).
FRAGMENTATION = 1.05


@dataclass
class MemoryEstimate:
    """Bytes that training needs in addition to the loaded model.

    Attributes:
        state: gradients and the optimizer's two moments of the trainable parameters.
        per_chunk: activations saved per full chunk, attention mask included.
        once: saved independently of the number of chunks, e.g. low-precision copies of the weights.
        working: largest temporary tensors of an encoder batch.
        chunks_at_once: full chunks in an encoder batch.
    """

    state: int
    per_chunk: int
    once: int
    working: int
    chunks_at_once: int

    def peak(self, num_chunks: float, live_chunks: int = 0) -> float:
        """Peak bytes for a batch of `num_chunks` full chunks with at most `live_chunks` live ones (0: no limit)."""
        alive = min(num_chunks, live_chunks) if live_chunks else num_chunks
        # The weights are copied again every few encoder batches, and once more during recomputation.
        copies = max(1, -(-alive // (BATCHES_PER_CAST * self.chunks_at_once))) + (alive < num_chunks)
        return self.state + copies * self.once + self.working + FRAGMENTATION * alive * self.per_chunk

    def live_chunks_within(self, num_bytes: float, num_chunks: int) -> int:
        """Largest limit on live chunks with which a batch of `num_chunks` fits into `num_bytes`; 0 if none is needed.

        Limits are in steps of an eighth or less, so that small differences in memory rarely change them: a limit below
        the size of an encoder batch changes its composition, and thereby the dropout masks.
        """
        if self.per_chunk == 0 or self.peak(num_chunks) <= num_bytes:
            return 0
        steps = {mantissa << exponent for exponent in range(num_chunks.bit_length()) for mantissa in range(1, 16)}
        fitting = [limit for limit in steps if limit < num_chunks and self.peak(num_chunks, limit) <= num_bytes]
        return max(fitting, default=1)


def estimate_memory(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> MemoryEstimate:
    """Estimate the memory of a training step from the tensors that autograd saves for two and four chunks.

    Model, RNG state and gradients are unchanged. The last chunk is one token short, so that an attention mask is saved,
    as in most encoder batches.
    """
    saved_2, saved_4 = (_saved_bytes(model, num_chunks, autocast) for num_chunks in (2, 4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder_trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    chunks_at_once = max(1, model.encoder_batch_size()[0] // model.config.chunk_length)
    encoder = model.config.encoder_config
    widest = max(getattr(encoder, "intermediate_size", 0), model.config.hidden_size)
    # fp32 gradients of the widest activation, input and output, and of the largest parameter before accumulation.
    working = 2 * 4 * chunks_at_once * model.config.chunk_length * widest if encoder_trained else 0
    working += 4 * max((parameter.numel() for parameter in trained), default=0)
    return MemoryEstimate(
        state=3 * 4 * sum(parameter.numel() for parameter in trained),
        per_chunk=(saved_4 - saved_2) // 2,
        once=max(2 * saved_2 - saved_4, 0),
        working=working,
        chunks_at_once=chunks_at_once,
    )


def warm_up(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Run two chunks forward and backward, so that GPU libraries allocate their memory first. Clears the gradients."""
    vectors = _encode(model, 2, autocast)
    if vectors.requires_grad:
        vectors.float().mean().backward()
    model.zero_grad()


def seconds_per_chunk(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Seconds per full chunk, forward and backward: the best of three encoder batches. Clears the gradients."""
    rows = max(1, model.encoder_batch_size()[0] // model.config.chunk_length)
    best = (float("inf"), float("inf"))
    for _ in range(3):
        started = _now(model.device)
        vectors = _encode(model, rows, autocast)
        forward = _now(model.device)
        if vectors.requires_grad:
            vectors.float().mean().backward()
        backward = _now(model.device)
        best = min(best, ((forward - started) / rows, (backward - forward) / rows), key=sum)
        model.zero_grad()
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _encode(
    model: HierarchicalRobertaForSequenceClassification, rows: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> torch.Tensor:
    """Encode full chunks (the last one token short) in training mode; restores the model and RNG state."""
    training, live_chunks, token_counts = model.training, model.live_chunks, list(model.token_counts)
    model.train()
    model.live_chunks = 0
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            input_ids = torch.randint(5, 50, (rows, model.config.chunk_length), device=model.device)
            mask = torch.ones_like(input_ids)
            mask[-1, -1] = 0
            with autocast():
                return model.encode_chunks(input_ids, mask)
    finally:
        model.train(training)
        model.live_chunks, model.token_counts = live_chunks, token_counts


def _saved_bytes(
    model: HierarchicalRobertaForSequenceClassification, rows: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def count(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage

    def unpack(_: None) -> torch.Tensor:
        raise AssertionError("The graph is not used.")

    # The graph gets no tensors back: a node that saves its own output would never be freed.
    with torch.autograd.graph.saved_tensors_hooks(count, unpack):
        vectors = _encode(model, rows, autocast)
    del vectors
    return sum(storage.nbytes() for storage in saved.values())


@dataclass
class SplitLengths:
    """Number of chunks read of each document of a split, and their mean tokens."""

    num_chunks: np.ndarray
    chunk_tokens: np.ndarray

    def tokens(self) -> np.ndarray:
        """Encoded tokens of each document."""
        return self.num_chunks * self.chunk_tokens

    def costs(self, hidden_size: int) -> np.ndarray:
        """Relative cost of encoding each document.

        Per token and layer, matrix products cost 24 D² and attention 4 L D (Kaplan et al. 2020, table 1).
        """
        return self.tokens() * (1 + self.chunk_tokens / (6 * hidden_size))

    def largest_batch(self, documents: int) -> int:
        """Chunks in the largest possible batch of `documents` documents."""
        return int(np.sort(self.num_chunks)[-documents:].sum())


def choose_live_chunks(
    model: HierarchicalRobertaForSequenceClassification,
    train: SplitLengths,
    args: HierarchicalTrainingArguments,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Set and return the model's limit on live chunks; for `auto`, what fits into the usable share of free memory."""
    model.live_chunks = 0 if args.live_chunks == "auto" else int(args.live_chunks)
    if args.live_chunks != "auto" or model.encoder_is_frozen:
        return model.live_chunks
    on_cuda = args.device.type == "cuda"
    if on_cuda:
        warm_up(model, autocast)
    available = (
        MEMORY_FRACTION.get(args.device.type, 0.5) * free_memory(args.device) / (1 if on_cuda else args.world_size)
    )
    if args.world_size > 1:
        available -= 4 * model.count_trainable_parameters()  # DDP's buckets, not allocated yet
    largest = train.largest_batch(args.train_batch_size)
    estimate = estimate_memory(model, autocast)
    model.live_chunks = estimate.live_chunks_within(available, largest)
    if model.live_chunks:
        # A limit means smaller encoder batches, which leave memory for more chunks.
        estimate = estimate_memory(model, autocast)
        model.live_chunks = estimate.live_chunks_within(available, largest) or model.live_chunks
    logger.info(
        f"Planned memory per process: at most {_size(estimate.peak(largest, model.live_chunks))} in addition to the "
        f"weights, of {_size(available)} available.",
        extra={"detail": True},
    )
    return model.live_chunks


def describe_run(
    model: HierarchicalRobertaForSequenceClassification,
    splits: dict[str, SplitLengths],
    args: HierarchicalTrainingArguments,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """Describe the estimated memory of the run, and its time, measured on an encoder batch of full chunks."""
    estimate = estimate_memory(model, autocast)
    forward, backward = seconds_per_chunk(model, autocast)
    train, live, length = splits["train"], model.live_chunks, model.config.chunk_length
    batch = args.train_batch_size
    largest = train.largest_batch(batch)
    weights = sum(weight.numel() * weight.element_size() for weight in (*model.parameters(), *model.buffers()))
    documents = batch * args.gradient_accumulation_steps * args.world_size
    steps = max(1, -(-len(train.num_chunks) // documents))
    epoch_chunks = train.tokens().sum() / length / args.world_size
    recomputed = recomputed_share(train.num_chunks.mean() * batch, live, estimate.chunks_at_once)
    encoding = sum(part.tokens().sum() for part in splits.values()) / length / args.world_size * forward
    epoch = epoch_chunks * (forward + backward + recomputed * forward)
    validation = splits["validation"].tokens().sum() / length / args.world_size * forward
    limit = f"at most {live} live chunks, {recomputed:.0%} of chunks recomputed" if live else "no limit on live chunks"
    lines = [
        f"Memory per process: at most {_size(weights + estimate.peak(largest, live))} of "
        f"{_size(free_memory(args.device) + weights)} ({args.device.type}):",
        f"  weights {_size(weights)}, gradients and optimizer {_size(estimate.state)}",
        f"  activations {_size(estimate.peak(largest, live) - estimate.state)}: {_size(estimate.per_chunk)} per chunk "
        f"of {length} tokens; the largest batch ({batch} documents) has {largest} chunks; {limit}",
    ]
    if model.encoder_is_frozen:
        lines.append(
            f"Time: encoding every chunk once takes {format_duration(encoding)} (cached for later runs); an epoch is "
            "then a small fraction of that."
        )
    else:
        total = args.num_train_epochs * (epoch + validation)
        lines.append(
            f"Time: {format_duration(epoch / steps)} per step ({documents} documents), {format_duration(epoch)} per "
            f"epoch ({steps} steps), {format_duration(validation)} per validation; at most {format_duration(total)} "
            f"for {args.num_train_epochs:g} epochs."
        )
    return "\n".join(lines)


def recomputed_share(num_chunks: float, live_chunks: int, chunks_at_once: int) -> float:
    """Share of a batch's chunks that the backward pass recomputes."""
    if not live_chunks or num_chunks <= live_chunks:
        return 0.0
    return 1 - max(live_chunks - chunks_at_once, 0) / num_chunks


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
