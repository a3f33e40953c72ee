"""Leave-one-out attribution of a document's class to its chunks, from existing chunk vectors.

C chunks of a document, S subsets of them, D hidden, M lexical features, X = D + M, K labels.
Pushed to the hub with the model; imports only its siblings.
"""

from typing import Any

import torch

from .pooling import to_device
from .precision import full_precision

# Chunk vectors classified per call: the 2,000 leave-one-out subsets of 2,000 chunks hold 4 million vectors.
ROWS_AT_ONCE = 8_192


def log_odds(logits_SK: torch.Tensor, label: int) -> torch.Tensor:
    """log p − log(1 − p) of a class, (S,)."""
    others = [k for k in range(logits_SK.shape[1]) if k != label]
    return logits_SK[:, label] - logits_SK[:, others].logsumexp(dim=1)


@torch.no_grad()
def logits_of_subsets(model: Any, chunk_CX: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
    """`logits_SK` of subsets of a document's chunks, without running the encoder.

    Args:
        kept_SC: True where a subset contains a chunk; each contains at least one.
    """
    chunk_CX = chunk_CX.to(model.device)
    kept_SC = kept_SC.cpu()  # avoids a device sync in nonzero()
    chunk_CD = chunk_CX[:, : model.config.hidden_size]
    logits = []
    for part_sC in kept_SC.split(max(1, ROWS_AT_ONCE // len(chunk_CD))):
        chunk_ND = chunk_CD[to_device(part_sC.nonzero()[:, 1], chunk_CD.device)]
        logits.append(model.classify_vectors(chunk_ND, part_sC.sum(dim=1))[0])
    logits_SK = torch.cat(logits)
    if model.lexical is None:
        return logits_SK
    # The counts of a subset are a sum, so a matrix product suffices; gathering its chunks would take S × C × M values.
    with full_precision(chunk_CX.device):
        count_SM = to_device(kept_SC, chunk_CX.device).float() @ chunk_CX[:, model.config.hidden_size :].float()
        return logits_SK + model.lexical.logits(count_SM)


def leave_one_out_attributions(model: Any, chunk_CX: torch.Tensor, label: int) -> torch.Tensor:
    """Drop in the log-odds of a class when a chunk is left out and the rest is pooled again, (C,).

    Exact, unlike attention weights, which do not measure a chunk's effect on the output (Jain & Wallace 2019). The only
    chunk of a document is attributed all of its log-odds.
    """
    full = log_odds(logits_of_subsets(model, chunk_CX, torch.ones(1, len(chunk_CX), dtype=torch.bool)), label)
    if len(chunk_CX) == 1:
        return full
    rest = log_odds(logits_of_subsets(model, chunk_CX, ~torch.eye(len(chunk_CX), dtype=torch.bool)), label)
    return full - rest
