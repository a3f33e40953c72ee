"""Group chunks of similar length into encoder batches within a token budget.

Pushed to the hub with the model, and part of an export to ONNX: imports nothing else from the project, nor torch.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

DOCUMENTS_AT_ONCE = 64


def plan_encoder_batches(
    lengths: list[int], token_budget: int, batch_cost: int, live_chunks: int = 0
) -> list[list[int]]:
    """Sort chunks by length, longest first, and cut the sequence greedily into encoder batches.

    The result is within half a percent of the optimal plan (figures in docs/log.md).

    Args:
        lengths: tokens of each chunk.
        token_budget: maximum (number of chunks × longest chunk) of a batch of more than one chunk.
        batch_cost: fixed cost of a batch (launches, gradient accumulation), in tokens. A batch is closed when its
            padding would exceed it.
        live_chunks: maximum number of chunks in a batch (0: no limit).

    Returns:
        Chunk indices of each batch.

    >>> plan_encoder_batches([3, 8, 7, 2], token_budget=16, batch_cost=64)
    [[1, 2], [0, 3]]
    """
    plan: list[list[int]] = []
    padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if plan:
            batch, longest = plan[-1], lengths[plan[-1][0]]
            padding += longest - lengths[index]
            fits = (len(batch) + 1) * longest <= token_budget and not 0 < live_chunks <= len(batch)
            if fits and padding <= batch_cost:
                batch.append(index)
                continue
        plan.append([index])
        padding = 0
    return plan


def batches_to_recompute(plan: list[list[int]], live_chunks: int) -> list[bool]:
    """Whether the backward pass recomputes each encoder batch, so that at most `live_chunks` chunks hold activations.

    The batch being recomputed counts toward the limit (0: no limit).

    >>> batches_to_recompute([[1, 2], [0, 3], [4, 5]], live_chunks=4)
    [False, True, True]
    """
    sizes = [len(batch) for batch in plan]
    if not 0 < live_chunks < sum(sizes):
        return [False] * len(plan)
    return [chunks + max(sizes) > live_chunks for chunks in accumulate(sizes)]


def batches_by_tokens(
    documents: Iterable[dict[str, Any]], num_tokens: int, num_documents: int = DOCUMENTS_AT_ONCE
) -> Iterator[list[dict[str, Any]]]:
    """Batch documents in order until a batch has `num_tokens` tokens or `num_documents` documents."""
    batch: list[dict[str, Any]] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += sum(map(len, document["input_ids"]))
        if total >= num_tokens or len(batch) == num_documents:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
