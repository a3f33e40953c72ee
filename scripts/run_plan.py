"""What a run will take, before it begins: memory, time, and how many chunks may be alive. Used by train_hf.py."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from modeling.callbacks import readable
from modeling.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.resources import USABLE, footprint, free_memory, seconds_per_chunk, warm_up
from modeling.training_args import HierarchicalTrainingArguments

logger = logging.getLogger("train_hf")
GIB, MIB = 2**30, 2**20


@dataclass
class Documents:
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
    train: Documents,
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
    room = USABLE.get(args.device.type, 0.5) * free_memory(args.device) / (1 if on_cuda else args.world_size)
    if args.world_size > 1:
        room -= 4 * model.count_trainable_parameters()  # the buckets of DDP, which are not there yet
    largest = train.largest_batch(args.train_batch_size)
    need = footprint(model, autocast)
    model.live_chunks = need.live_chunks_within(room, largest)
    if model.live_chunks:
        need = footprint(model, autocast)  # with the smaller encoder batches of a bounded run there is room for more
        model.live_chunks = need.live_chunks_within(room, largest) or model.live_chunks
    logger.info(
        f"Planned memory of a process: at most {_size(need.peak(largest, model.live_chunks))} over the weights, of "
        f"{_size(room)}."
    )
    return model.live_chunks


def describe_run(
    model: HierarchicalRobertaForSequenceClassification,
    splits: dict[str, Documents],
    args: HierarchicalTrainingArguments,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> str:
    """What the run would take, for people. Memory is counted, time is measured on an encoder batch of full chunks."""
    need = footprint(model, autocast)
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
            f"Time: encoding every chunk once {readable(encoding)} (kept for later runs); an epoch then a small part of that."
        )
    else:
        total = args.num_train_epochs * (epoch + checking)
        lines.append(
            f"Time: a step ({documents} documents) {readable(epoch / steps)}, an epoch ({steps} steps) {readable(epoch)}, "
            f"validation {readable(checking)}; {args.num_train_epochs:g} epochs {readable(total)} at the most."
        )
    return "\n".join(lines)


def again_share(num_chunks: float, live_chunks: int, chunks_at_once: int) -> float:
    """Share of a batch's chunks that are recomputed in the backward pass."""
    if not live_chunks or num_chunks <= live_chunks:
        return 0.0
    return 1 - max(live_chunks - chunks_at_once, 0) / num_chunks


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
