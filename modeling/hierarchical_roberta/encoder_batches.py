"""Chunks → encoder batches of like length, by a budget of tokens.

This file travels to the hub with the model and imports nothing else of the project.
"""

from itertools import accumulate


def plan_encoder_batches(
    lengths: list[int], token_budget: int, batch_cost: int, live_chunks: int = 0
) -> list[list[int]]:
    """Chunks sorted by length, longest first, and cut into encoder batches.

    A batch has (number of chunks × the longest) ≤ `token_budget` tokens, unless it is a single chunk, and at most
    `live_chunks` chunks (0: no bound). It ends earlier where its padding would exceed `batch_cost`, what another batch
    costs beside its tokens (launches, adding up gradients), in tokens. That is within half a percent of the best cut
    (figures in docs/log.md).

    Args:
        lengths: tokens of each chunk.

    Returns:
        The chunks' indices, batch by batch.

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
    """Of each encoder batch whether the backward pass recomputes it, so that at most `live_chunks` chunks hold activations
    (0: no bound). The batch that is being recomputed is alive there beside those that were kept.

    >>> batches_to_recompute([[1, 2], [0, 3], [4, 5]], live_chunks=4)
    [False, True, True]
    """
    sizes = [len(batch) for batch in plan]
    if not 0 < live_chunks < sum(sizes):
        return [False] * len(plan)
    return [chunks + max(sizes) > live_chunks for chunks in accumulate(sizes)]
