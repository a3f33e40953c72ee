"""Chunks → encoder batches of like length, by a budget of tokens.

This file travels to the hub with the model and imports nothing else of the project.
"""


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
