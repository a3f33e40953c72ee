"""Token attribution: integrated gradients through the encoder, leave-one-out for the lexical features.

Integrated gradients (Sundararajan et al. 2017) are computed with captum.

C chunks of a document, L tokens of a chunk, S integration steps or variants, D hidden, M lexical features, X = D + M.
"""

import torch
from captum.attr import LayerIntegratedGradients

from .hierarchical_roberta.chunk_attribution import log_odds
from .hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification

# Integration steps. With six, attributing three chunks costs less than encoding 60 chunks.
STEPS = 6


def token_attributions(
    model: HierarchicalRobertaForSequenceClassification,
    input_ids_L: torch.Tensor,
    blank_L: torch.Tensor,
    chunk_CX: torch.Tensor,
    index: int,
    label: int,
) -> torch.Tensor:
    """Attribution of a class's log-odds to each token of a chunk, (L,), with the document's other chunks fixed.

    The encoder's attributions sum, up to the integration error, to the change in log-odds from `blank_L` to this chunk.
    Lexical features add the drop in log-odds when a token's counts in this chunk are removed from the document.

    Args:
        input_ids_L: tokens of the chunk, special tokens included.
        blank_L: baseline: the same chunk with its non-special tokens replaced by padding or mask tokens.
        chunk_CX: output of `extract_features` for all chunks of the document.
        index: position of the chunk in the document.
    """
    chunk_CX = chunk_CX.to(input_ids_L.device)

    def class_log_odds(ids_SL: torch.Tensor) -> torch.Tensor:
        vector_SD = model.encode_batch(ids_SL, torch.ones_like(ids_SL), [ids_SL.shape[1]] * len(ids_SL))
        chunk_SCX = chunk_CX.expand(len(ids_SL), -1, -1).clone()
        chunk_SCX[:, index, : vector_SD.shape[1]] = vector_SD
        return log_odds(model.classify(chunk_SCX.flatten(0, 1), [len(chunk_CX)] * len(ids_SL))[0], label)

    gradients = LayerIntegratedGradients(class_log_odds, model.encoder.get_input_embeddings())
    attribution_1LD = gradients.attribute(
        input_ids_L[None], baselines=blank_L[None], n_steps=STEPS, method="gausslegendre", internal_batch_size=STEPS
    )
    attribution_L = attribution_1LD[0].sum(dim=-1).detach()
    if model.lexical is None:
        return attribution_L
    return attribution_L + lexical_attributions(model, input_ids_L, chunk_CX, label)


@torch.no_grad()
def lexical_attributions(
    model: HierarchicalRobertaForSequenceClassification, input_ids_L: torch.Tensor, chunk_CX: torch.Tensor, label: int
) -> torch.Tensor:
    """Leave-one-out attribution of a class's log-odds to each token through the lexical features, (L,).

    The drop in log-odds without the token's counts in the chunk, divided equally among its occurrences.
    """
    lexical = model.lexical
    assert lexical is not None
    feature_L = lexical.feature_of_token[input_ids_L]
    feature_L[: model.config.num_prefix_tokens] = lexical.weight.shape[1]  # not counted
    features_S, row_L, times_S = feature_L.unique(return_inverse=True, return_counts=True)
    count_1M = chunk_CX[:, model.config.hidden_size :].sum(dim=0, keepdim=True)
    logits_1K, _ = model.classify(chunk_CX, [len(chunk_CX)])
    # The last column collects tokens that are not features.
    without_SM = torch.nn.functional.pad(count_1M, (0, 1)).repeat(len(features_S), 1)
    without_SM[torch.arange(len(features_S)), features_S] -= times_S
    logits_SK = logits_1K - lexical.logits(count_1M) + lexical.logits(without_SM[:, :-1])
    drop_S = log_odds(logits_1K, label) - log_odds(logits_SK, label)
    return (drop_S / times_S)[row_L]
