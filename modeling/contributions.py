"""What each chunk contributes to a document's rating, from chunk vectors that are there already.

C chunks of a document, S subsets of them, D hidden, M features of a lexical view, X of both together, K labels.
This file travels to the hub with the model and imports nothing else of the project.
"""

from typing import Any

import torch

# Chunk vectors that are classified at once: a document of 2,000 chunks has 4 million of them in its 2,000 subsets.
ROWS_AT_ONCE = 8_192


def log_odds(logits_SK: torch.Tensor, label: int) -> torch.Tensor:
    """log p − log(1 − p) of a class, (S,)."""
    others = [k for k in range(logits_SK.shape[1]) if k != label]
    return logits_SK[:, label] - logits_SK[:, others].logsumexp(dim=1)


@torch.no_grad()
def logits_of_subsets(model: Any, chunk_CX: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
    """`logits_SK` of a document of which only some chunks are there; the encoder does not run.

    Args:
        kept_SC: True where a subset has a chunk; each has one at least.
    """
    kept_SC = kept_SC.to(chunk_CX.device)
    chunk_CD = chunk_CX[:, : model.config.hidden_size]
    slices = kept_SC.split(max(1, ROWS_AT_ONCE // len(chunk_CD)))
    logits = [model.classify_vectors(chunk_CD[part.nonzero()[:, 1]], part.sum(dim=1))[0] for part in slices]
    logits_SK = torch.cat(logits)
    if model.lexical is None:
        return logits_SK
    # The counts of a subset are a sum: a product of matrices, where to lay out its chunks would take S × C × M numbers.
    return logits_SK + model.lexical.logits(kept_SC.float() @ chunk_CX[:, model.config.hidden_size :].float())


def chunk_contributions(model: Any, chunk_CX: torch.Tensor, label: int) -> torch.Tensor:
    """What the log-odds of a class lose when a chunk is left out and the rest is pooled again, (C,).

    Exact, unlike attention weights, which say what was looked at and not what it did (Jain & Wallace 2019). A document's
    only chunk contributes all of its log-odds.
    """
    whole = log_odds(logits_of_subsets(model, chunk_CX, torch.ones(1, len(chunk_CX), dtype=torch.bool)), label)
    if len(chunk_CX) == 1:
        return whole
    rest = log_odds(logits_of_subsets(model, chunk_CX, ~torch.eye(len(chunk_CX), dtype=torch.bool)), label)
    return whole - rest
