"""How evenly the documents of a step are dealt out to many processes, simulated from real lengths."""

import numpy as np

from modeling.sampling import deal_out

STEPS = 20


def evenness(
    num_tokens: np.ndarray,
    ranks: int,
    documents_each: int = 16,
    chunk_length: int = 256,
    hidden_size: int = 384,
    seed: int = 0,
) -> dict[str, float]:
    """Mean ÷ maximum of the ranks' costs in a step, averaged over steps: as `WeightedTrainer` deals the documents out,
    and in a random order. 1 means that all ranks finish together.

    Args:
        num_tokens: tokens of each document of the data set; steps draw from them (again, where there are too few).
        documents_each: documents that a rank reads in an optimizer step.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"dealt out": [], "random": []}
    for _ in range(STEPS if ranks < 1000 else STEPS // 4):
        count = ranks * documents_each
        tokens = rng.choice(num_tokens, count, replace=count > len(num_tokens))
        chunks = np.ceil(tokens / (chunk_length - 2))
        costs = tokens * (1 + tokens / chunks / (6 * hidden_size))
        for name, order in (("dealt out", deal_out(costs.tolist(), ranks, 1)), ("random", range(count))):
            totals = costs[list(order)].reshape(documents_each, ranks).sum(axis=0)
            found[name].append(float(totals.mean() / totals.max()))
    return {name: float(np.mean(values)) for name, values in found.items()}
