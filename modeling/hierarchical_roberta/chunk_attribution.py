"""What each chunk contributes to a document's rating, from chunk vectors that are there already.

C chunks of a document, S subsets of them, D hidden, M features of a lexical view, X of both together, K labels.
This file travels to the hub with the model and imports only its siblings.
"""

from typing import Any

import torch

from .pooling import to_device
from .precision import full_precision

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
    chunk_CX = chunk_CX.to(model.device)
    kept_SC = kept_SC.cpu()  # so that the device is not asked which chunks a subset has
    chunk_CD = chunk_CX[:, : model.config.hidden_size]
    logits = []
    for part_sC in kept_SC.split(max(1, ROWS_AT_ONCE // len(chunk_CD))):
        chunk_ND = chunk_CD[to_device(part_sC.nonzero()[:, 1], chunk_CD.device)]
        logits.append(model.classify_vectors(chunk_ND, part_sC.sum(dim=1))[0])
    logits_SK = torch.cat(logits)
    if model.lexical is None:
        return logits_SK
    # The counts of a subset are a sum: a product of matrices, where to lay out its chunks would take S × C × M numbers.
    with full_precision(chunk_CX.device):
        count_SM = to_device(kept_SC, chunk_CX.device).float() @ chunk_CX[:, model.config.hidden_size :].float()
        return logits_SK + model.lexical.logits(count_SM)


def leave_one_out_attributions(model: Any, chunk_CX: torch.Tensor, label: int) -> torch.Tensor:
    """What the log-odds of a class lose when a chunk is left out and the rest is pooled again, (C,).

    Exact, unlike attention weights, which say what was looked at and not what it did (Jain & Wallace 2019). A document's
    only chunk contributes all of its log-odds.
    """
    whole = log_odds(logits_of_subsets(model, chunk_CX, torch.ones(1, len(chunk_CX), dtype=torch.bool)), label)
    if len(chunk_CX) == 1:
        return whole
    rest = log_odds(logits_of_subsets(model, chunk_CX, ~torch.eye(len(chunk_CX), dtype=torch.bool)), label)
    return whole - rest
