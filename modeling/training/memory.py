"""What a run will take, before it begins: memory from what autograd keeps, time from one encoder batch, and how many chunks
may be alive."""

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
# Shares of the free memory that activations may take. The CPU's is shared with everything else that runs there.
MEMORY_FRACTION = {"cuda": 0.85, "cpu": 0.5}
# Allocators leave gaps: measured peaks were 0.9 to 1.3 times what autograd keeps (docs/log.md).
FRAGMENTATION = 1.05


@dataclass
class MemoryEstimate:
    """Bytes that training takes over the loaded model.

    Attributes:
        state: gradients and the optimizer's two moments, of the parameters that are trained.
        per_chunk: what the backward pass needs of one full chunk, attention mask included.
        once: what it needs whatever the number of chunks, such as the weights' low-precision copies.
        working: the largest temporary tensors of an encoder batch.
        chunks_at_once: full chunks in an encoder batch.
    """

    state: int
    per_chunk: int
    once: int
    working: int
    chunks_at_once: int

    def peak(self, num_chunks: float, live_chunks: int = 0) -> float:
        """Bytes at the most, for a batch of so many full chunks under a bound on the live ones (0: none)."""
        alive = min(num_chunks, live_chunks) if live_chunks else num_chunks
        # The weights' copies are made anew every few encoder batches, and once more while one is recomputed.
        copies = max(1, -(-alive // (BATCHES_PER_CAST * self.chunks_at_once))) + (alive < num_chunks)
        return self.state + copies * self.once + self.working + FRAGMENTATION * alive * self.per_chunk

    def live_chunks_within(self, num_bytes: float, num_chunks: int) -> int:
        """The bound on live chunks under which a batch of `num_chunks` stays within so many bytes; 0 where none is
        needed. In steps of an eighth or less, so that a little less memory seldom changes it: a bound below an encoder
        batch's chunks changes its make-up, and with it which random numbers dropout draws for whom."""
        if self.per_chunk == 0 or self.peak(num_chunks) <= num_bytes:
            return 0
        steps = {mantissa << exponent for exponent in range(num_chunks.bit_length()) for mantissa in range(1, 16)}
        fitting = [bound for bound in steps if bound < num_chunks and self.peak(num_chunks, bound) <= num_bytes]
        return max(fitting, default=1)


def estimate_memory(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> MemoryEstimate:
    """Measure what a step of this model keeps, by encoding two chunks and then four, and counting the tensors that
    autograd saves. Model, random state and gradients are as before.

    The last chunk is one token short, so that an attention mask is kept, as in most encoder batches."""
    kept_2, kept_4 = (_kept_bytes(model, num_chunks, autocast) for num_chunks in (2, 4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder_trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    chunks_at_once = max(1, model.encoder_batch_size()[0] // model.config.chunk_length)
    encoder = model.config.encoder_config
    widest = max(getattr(encoder, "intermediate_size", 0), model.config.hidden_size)
    # Gradients of the widest activation, in and out, in fp32; and of the largest table, before it is added up.
    working = 2 * 4 * chunks_at_once * model.config.chunk_length * widest if encoder_trained else 0
    working += 4 * max((parameter.numel() for parameter in trained), default=0)
    return MemoryEstimate(
        state=3 * 4 * sum(parameter.numel() for parameter in trained),
        per_chunk=(kept_4 - kept_2) // 2,
        once=max(2 * kept_2 - kept_4, 0),
        working=working,
        chunks_at_once=chunks_at_once,
    )


def warm_up(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """A chunk forward and backward: the libraries of a GPU take their workspaces and load their kernels, which then no
    longer count as free memory. (Gradients are left empty.)"""
    vectors = _encode(model, 2, autocast)
    if vectors.requires_grad:
        vectors.float().mean().backward()
    model.zero_grad()


def seconds_per_chunk(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Seconds for a full chunk, forward and backward: the best of three encoder batches. (Gradients are left empty.)"""
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
    """Full chunks, the last but for a token, through the encoder in training mode, with nothing left behind."""
    training, live_chunks, counted = model.training, model.live_chunks, list(model.token_counts)
    model.train()
    model.live_chunks = 0
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            words = torch.randint(5, 50, (rows, model.config.chunk_length), device=model.device)
            mask = torch.ones_like(words)
            mask[-1, -1] = 0
            with autocast():
                return model.encode_chunks(words, mask)
    finally:
        model.train(training)
        model.live_chunks, model.token_counts = live_chunks, counted


def _kept_bytes(
    model: HierarchicalRobertaForSequenceClassification, rows: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        vectors = _encode(model, rows, autocast)
    del vectors
    return sum(kept.values())


@dataclass
class SplitLengths:
    """The lengths of a split: of each document how many chunks are read, and the mean tokens of one."""

    num_chunks: np.ndarray
    chunk_tokens: np.ndarray

    def tokens(self) -> np.ndarray:
        """Tokens of each document that the encoder reads."""
        return self.num_chunks * self.chunk_tokens

    def costs(self, hidden_size: int) -> np.ndarray:
        """What it takes to encode each: tokens, and their square within chunks. A layer's matrices cost 24 D² a token
        and its attention 4 L D (Kaplan et al. 2020, table 1; both directions alike)."""
        return self.tokens() * (1 + self.chunk_tokens / (6 * hidden_size))

    def largest_batch(self, documents: int) -> int:
        """Chunks of the longest documents, as many as a batch takes."""
        return int(np.sort(self.num_chunks)[-documents:].sum())


def choose_live_chunks(
    model: HierarchicalRobertaForSequenceClassification,
    train: SplitLengths,
    args: HierarchicalTrainingArguments,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    """The number that was given; for `auto` what half of the CPU's free memory holds, or most of the GPU's. The model has
    it from now on."""
    model.live_chunks = 0 if args.live_chunks == "auto" else int(args.live_chunks)
    if args.live_chunks != "auto" or model.encoder_is_frozen:
        return model.live_chunks
    on_cuda = args.device.type == "cuda"
    if on_cuda:
        warm_up(model, autocast)
    room = MEMORY_FRACTION.get(args.device.type, 0.5) * free_memory(args.device) / (1 if on_cuda else args.world_size)
    if args.world_size > 1:
        room -= 4 * model.count_trainable_parameters()  # the buckets of DDP, which are not there yet
    largest = train.largest_batch(args.train_batch_size)
    need = estimate_memory(model, autocast)
    model.live_chunks = need.live_chunks_within(room, largest)
    if model.live_chunks:
        need = estimate_memory(
            model, autocast
        )  # with the smaller encoder batches of a bounded run there is room for more
        model.live_chunks = need.live_chunks_within(room, largest) or model.live_chunks
    logger.info(
        f"Planned memory of a process: at most {_size(need.peak(largest, model.live_chunks))} over the weights, of "
        f"{_size(room)}.",
        extra={"detail": True},
    )
    return model.live_chunks


def describe_run(
    model: HierarchicalRobertaForSequenceClassification,
    splits: dict[str, SplitLengths],
    args: HierarchicalTrainingArguments,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """What the run would take, for people. Memory is counted, time is measured on an encoder batch of full chunks."""
    need = estimate_memory(model, autocast)
    forward, backward = seconds_per_chunk(model, autocast)
    train, live, length = splits["train"], model.live_chunks, model.config.chunk_length
    batch = args.train_batch_size
    largest = train.largest_batch(batch)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    documents = batch * args.gradient_accumulation_steps * args.world_size
    steps = max(1, -(-len(train.num_chunks) // documents))
    epoch_chunks = train.tokens().sum() / length / args.world_size
    again = again_share(train.num_chunks.mean() * batch, live, need.chunks_at_once)
    encoding = sum(part.tokens().sum() for part in splits.values()) / length / args.world_size * forward
    epoch = epoch_chunks * (forward + backward + again * forward)
    checking = splits["validation"].tokens().sum() / length / args.world_size * forward
    bound = f"{live} live chunks at most, {again:.0%} of chunks recomputed" if live else "all chunks live"
    lines = [
        f"Memory of a process: {_size(weights + need.peak(largest, live))} at the most, of {_size(free_memory(args.device) + weights)} "
        f"({args.device.type}):",
        f"  weights {_size(weights)}, gradients and optimizer {_size(need.state)}",
        f"  activations {_size(need.peak(largest, live) - need.state)}: {_size(need.per_chunk)} a chunk of {length} tokens; "
        f"the largest batch ({batch} documents) has {largest} chunks; {bound}",
    ]
    if model.encoder_is_frozen:
        lines.append(
            f"Time: encoding every chunk once {format_duration(encoding)} (kept for later runs); an epoch then a small part of that."
        )
    else:
        total = args.num_train_epochs * (epoch + checking)
        lines.append(
            f"Time: a step ({documents} documents) {format_duration(epoch / steps)}, an epoch ({steps} steps) {format_duration(epoch)}, "
            f"validation {format_duration(checking)}; {args.num_train_epochs:g} epochs {format_duration(total)} at the most."
        )
    return "\n".join(lines)


def again_share(num_chunks: float, live_chunks: int, chunks_at_once: int) -> float:
    """Share of a batch's chunks that are recomputed in the backward pass."""
    if not live_chunks or num_chunks <= live_chunks:
        return 0.0
    return 1 - max(live_chunks - chunks_at_once, 0) / num_chunks


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
