"""Leave-one-out attribution of a document's labels to its chunks, from existing chunk vectors.

C chunks of a document, S subsets of them, D hidden, M lexical features, K labels, E explained labels.
Pushed to the hub with the model; imports only its siblings.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .pooling import to_device
from .precision import full_precision

# Chunk vectors, or weights of them, per call: the 2,000 leave-one-out subsets of 2,000 chunks have 4 million.
ROWS_AT_ONCE, WEIGHTS_AT_ONCE = 8_192, 1_000_000


def log_odds(logits_SK: torch.Tensor, label: int, is_multi_label: bool = False) -> torch.Tensor:
    """log p − log(1 − p) of a label, (S,): of several labels a document, its logit."""
    if is_multi_label:
        return logits_SK[:, label]
    others = [k for k in range(logits_SK.shape[1]) if k != label]
    return logits_SK[:, label] - logits_SK[:, others].logsumexp(dim=1)


@torch.no_grad()
def logits_of_subsets(
    model: Any, chunk_CD: torch.Tensor, kept_SC: torch.Tensor, count_CM: torch.Tensor | None = None, rest_M: Any = None
) -> torch.Tensor:
    """`logits_SK` of subsets of a document's chunks, without running the encoder.

    Args:
        kept_SC: True where a subset contains a chunk; each contains at least one.
        count_CM: counts of the lexical features in the chunks, if the model has any.
        rest_M: their counts in the rest of the document, which is not encoded; in every subset.
    """
    device = model.device
    chunk_CD = chunk_CD.to(device)
    # Where a chunk's vector is the same in every subset, none is copied.
    copies = model.chunk_transformer is not None or model.pooling.kind == "max"
    step = max(1, (ROWS_AT_ONCE if copies else WEIGHTS_AT_ONCE) // len(chunk_CD))
    logits = []
    with full_precision(device):
        for part_sC in to_device(kept_SC.cpu(), device).split(step):
            count_sM = None
            if count_CM is not None:
                # The counts of a subset are a sum, so a matrix product suffices; gathering its chunks would take s × C × M.
                count_sM = part_sC.float() @ count_CM.to(device)
                count_sM = count_sM if rest_M is None else count_sM + rest_M.to(count_sM)
            logits.append(model.combine(model.classify_subsets(chunk_CD, part_sC), count_sM))
    return torch.cat(logits)


def leave_one_out_attributions(
    model: Any, chunk_CD: torch.Tensor, label: int, count_CM: torch.Tensor | None = None, rest_M: Any = None
) -> torch.Tensor:
    """Drop in the log-odds of a label when a chunk is left out and the others are pooled again, (C,).

    Exact, unlike attention weights, which do not measure a chunk's effect on the output (Jain & Wallace 2019). The only
    chunk of a document is attributed all of its log-odds.
    """
    return attributions_of_labels(model, chunk_CD, [label], count_CM, rest_M)[0]


def attributions_of_labels(
    model: Any, chunk_CD: torch.Tensor, labels: Sequence[int], count_CM: torch.Tensor | None = None, rest_M: Any = None
) -> torch.Tensor:
    """`leave_one_out_attributions` of several labels, (E, C), at the cost of one: the logits of each subset are computed
    once."""
    num_chunks, is_multi = len(chunk_CD), model.config.is_multi_label
    full_1K = logits_of_subsets(model, chunk_CD, torch.ones(1, num_chunks, dtype=torch.bool), count_CM, rest_M)
    if num_chunks == 1:
        return torch.stack([log_odds(full_1K, label, is_multi) for label in labels])
    others_CC = ~torch.eye(num_chunks, dtype=torch.bool)
    without_CK = logits_of_subsets(model, chunk_CD, others_CC, count_CM, rest_M)
    return torch.stack([log_odds(full_1K, label, is_multi) - log_odds(without_CK, label, is_multi) for label in labels])
