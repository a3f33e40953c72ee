"""Token attribution: integrated gradients through the encoder, leave-one-out for the lexical features.

Integrated gradients (Sundararajan et al. 2017) are computed with captum.

C chunks of a document, L tokens of a chunk, P pairs of adjacent tokens, S integration steps or variants, D hidden, M lexical
features.
"""

from typing import Any

import torch
from captum.attr import IntegratedGradients

from .hierarchical_roberta.chunk_attribution import log_odds
from .hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification

# Integration steps. With six, attributing three chunks costs less than encoding 60 chunks.
STEPS = 6


def token_attributions(
    model: HierarchicalRobertaForSequenceClassification,
    input_ids_L: torch.Tensor,
    blank_L: torch.Tensor,
    chunk_CD: torch.Tensor,
    index: int,
    label: int,
    count_M: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attribution of a class's log-odds to each token of a chunk, (L,), with the document's other chunks fixed.

    The encoder's attributions sum, up to the integration error, to the change in log-odds from `blank_L` to this chunk.
    Lexical features add the drop in log-odds when a feature's counts in this chunk are removed from the document.

    Args:
        input_ids_L: tokens of the chunk, special tokens included.
        blank_L: baseline: the same chunk with its non-special tokens replaced by padding or mask tokens.
        chunk_CD: vectors of all encoded chunks of the document.
        index: position of the chunk among them.
        count_M: counts of the lexical features in the whole document, if the model has any.
    """
    chunk_CD = chunk_CD.to(input_ids_L.device)
    count_1M = None if count_M is None else count_M.to(chunk_CD.device)[None]

    embeddings = model.encoder.get_input_embeddings()

    @torch.no_grad()
    def embedded(ids_L: torch.Tensor) -> torch.Tensor:
        output = embeddings(ids_L[None])
        return output[0] if isinstance(output, tuple) else output

    def class_log_odds(embedding_SLD: torch.Tensor) -> torch.Tensor:
        ids_SL = input_ids_L.expand(len(embedding_SLD), -1)

        def substitute(_: Any, args: Any, output: Any) -> Any:
            output, *others = output if isinstance(output, tuple) else (output,)  # I-BERT: a scaling factor
            output = output.clone()
            if torch.equal(args[0][:, : len(input_ids_L)], ids_SL):
                output[:, : len(input_ids_L)] = embedding_SLD  # Longformer: padded to its window
            elif torch.equal(args[0], ids_SL.T):
                output[:] = embedding_SLD.transpose(0, 1)  # XLNet
            return (output, *others) if others else output

        handle = embeddings.register_forward_hook(substitute)
        try:
            vector_SD = model.encode_batch(ids_SL, torch.ones_like(ids_SL), [ids_SL.shape[1]] * len(ids_SL))
        finally:
            handle.remove()
        chunk_SCD = chunk_CD.expand(len(ids_SL), -1, -1).clone()
        chunk_SCD[:, index] = vector_SD
        logits_SK, _ = model.classify(chunk_SCD.flatten(0, 1), [len(chunk_CD)] * len(ids_SL), count_1M)
        return log_odds(logits_SK, label, model.config.is_multi_label)

    attribution_1LD = IntegratedGradients(class_log_odds).attribute(
        embedded(input_ids_L),
        baselines=embedded(blank_L),
        n_steps=STEPS,
        method="gausslegendre",
        internal_batch_size=STEPS,
    )
    attribution_L = attribution_1LD[0].sum(dim=-1).detach()
    if count_1M is None:
        return attribution_L
    return attribution_L + lexical_attributions(model, input_ids_L, chunk_CD, count_1M, label)


@torch.no_grad()
def lexical_attributions(
    model: HierarchicalRobertaForSequenceClassification,
    input_ids_L: torch.Tensor,
    chunk_CD: torch.Tensor,
    count_1M: torch.Tensor,
    label: int,
) -> torch.Tensor:
    """Leave-one-out attribution of a class's log-odds to each token through the lexical features, (L,).

    The drop in log-odds without a feature's counts in the chunk, divided equally among its occurrences, and that of a pair
    between its two tokens.
    """
    lexical, prefix = model.lexical, model.config.num_prefix_tokens
    assert lexical is not None
    token_1L, pair_1P = lexical.features(input_ids_L[None, prefix:])
    features_S, row_F, times_S = torch.cat([token_1L[0], pair_1P[0]]).unique(return_inverse=True, return_counts=True)
    encoder_1K, _ = model.classify(chunk_CD, [len(chunk_CD)])
    # The last column collects what is no feature.
    without_SM = torch.nn.functional.pad(count_1M, (0, 1)).repeat(len(features_S), 1)
    without_SM[torch.arange(len(features_S)), features_S] -= times_S
    with_odds, without_odds_S = (
        log_odds(model.combine(encoder_1K, count_BM), label, model.config.is_multi_label)
        for count_BM in (count_1M, without_SM[:, :-1])
    )
    drop_F = ((with_odds - without_odds_S) / times_S)[row_F]
    drop_L, drop_P = drop_F.split([token_1L.shape[1], pair_1P.shape[1]])
    attribution_L = torch.zeros(len(input_ids_L), device=drop_F.device)
    attribution_L[prefix:] = drop_L
    if len(drop_P):
        attribution_L[prefix:-1] += drop_P / 2
        attribution_L[prefix + 1 :] += drop_P / 2
    return attribution_L
