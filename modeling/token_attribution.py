"""Which words of a chunk speak for a document's rating: integrated gradients (Sundararajan et al. 2017), by captum, and
what the lexical view loses without them.

C chunks of a document, L tokens of a chunk, S steps of the integral or variants, D hidden, M features of the lexical view, X
of both together.
"""

import torch
from captum.attr import LayerIntegratedGradients

from .hierarchical_roberta.chunk_attribution import log_odds
from .hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification

# Points of the integral. With six, the attributions of three chunks cost less than 60 encodings of a chunk.
STEPS = 6


def token_attributions(
    model: HierarchicalRobertaForSequenceClassification,
    input_ids_L: torch.Tensor,
    blank_L: torch.Tensor,
    chunk_CX: torch.Tensor,
    place: int,
    label: int,
) -> torch.Tensor:
    """What each token of a chunk adds to the log-odds of a class, (L,), the document's other chunks as they are.

    Through the encoder they sum, within the error of the integral, to the change from a chunk of `blank_L` to this one. A
    lexical view adds what the log-odds lose when a token's counts of this chunk are taken out of the document's.

    Args:
        input_ids_L: the chunk's tokens, special ones included.
        blank_L: what a token is compared with: the same chunk with its own tokens replaced by padding or a mask.
        chunk_CX: what was read of all the document's chunks.
        place: which of them the chunk is.
    """

    chunk_CX = chunk_CX.to(input_ids_L.device)

    def log_odds_of(ids_SL: torch.Tensor) -> torch.Tensor:
        vector_SD = model.encode_batch(ids_SL, torch.ones_like(ids_SL), [ids_SL.shape[1]] * len(ids_SL))
        chunk_SCX = chunk_CX.expand(len(ids_SL), -1, -1).clone()
        chunk_SCX[:, place, : vector_SD.shape[1]] = vector_SD
        return log_odds(model.classify(chunk_SCX.flatten(0, 1), [len(chunk_CX)] * len(ids_SL))[0], label)

    gradients = LayerIntegratedGradients(log_odds_of, model.encoder.get_input_embeddings())
    found_1LD = gradients.attribute(
        input_ids_L[None], baselines=blank_L[None], n_steps=STEPS, method="gausslegendre", internal_batch_size=STEPS
    )
    found_L = found_1LD[0].sum(dim=-1).detach()
    return found_L if model.lexical is None else found_L + lexical_attributions(model, input_ids_L, chunk_CX, label)


@torch.no_grad()
def lexical_attributions(
    model: HierarchicalRobertaForSequenceClassification, input_ids_L: torch.Tensor, chunk_CX: torch.Tensor, label: int
) -> torch.Tensor:
    """What each token of a chunk adds to the log-odds of a class by way of the lexical view, (L,): the log-odds less those
    without this token's counts of the chunk, shared out over the places where it stands."""
    view = model.lexical
    assert view is not None
    feature_L = view.feature_of_token[input_ids_L]
    features_S, row_L, times_S = feature_L.unique(return_inverse=True, return_counts=True)
    count_1M = chunk_CX[:, model.config.hidden_size :].sum(dim=0, keepdim=True)
    logits_1K, _ = model.classify(chunk_CX, [len(chunk_CX)])
    # The last column takes the tokens that are no features.
    without_SM = torch.nn.functional.pad(count_1M, (0, 1)).repeat(len(features_S), 1)
    without_SM[torch.arange(len(features_S)), features_S] -= times_S
    logits_SK = logits_1K - view.logits(count_1M) + view.logits(without_SM[:, :-1])
    lost_S = log_odds(logits_1K, label) - log_odds(logits_SK, label)
    return (lost_S / times_S)[row_L]
