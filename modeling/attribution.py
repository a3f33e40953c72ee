"""Which words of a chunk speak for a document's rating: integrated gradients (Sundararajan et al. 2017), by captum.

C chunks of a document, L tokens of a chunk, S steps of the integral, D hidden.
"""

import torch
from captum.attr import LayerIntegratedGradients

from .contributions import log_odds
from .modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification

# Points of the integral. With six, the attributions of three chunks cost less than 60 encodings of a chunk.
STEPS = 6


def token_attributions(
    model: HierarchicalRobertaForSequenceClassification,
    input_ids_L: torch.Tensor,
    blank_L: torch.Tensor,
    chunk_CD: torch.Tensor,
    place: int,
    label: int,
) -> torch.Tensor:
    """What each token of a chunk adds to the log-odds of a class, (L,), the document's other chunks as they are.

    They sum, within the error of the integral, to the change from a chunk of `blank_L` to this one.

    Args:
        input_ids_L: the chunk's tokens, special ones included.
        blank_L: what a token is compared with: the same chunk with its own tokens replaced by padding or a mask.
        chunk_CD: vectors of all the document's chunks.
        place: which of them the chunk is.
    """

    def log_odds_of(ids_SL: torch.Tensor) -> torch.Tensor:
        vector_SD = model.encode_micro_batch(ids_SL, torch.ones_like(ids_SL), is_padded=False)
        chunk_SCD = chunk_CD.expand(len(ids_SL), -1, -1).clone()
        chunk_SCD[:, place] = vector_SD
        num_chunks = torch.full((len(ids_SL),), len(chunk_CD), device=ids_SL.device)
        return log_odds(model.classify(chunk_SCD.flatten(0, 1), num_chunks)[0], label)

    gradients = LayerIntegratedGradients(log_odds_of, model.encoder.get_input_embeddings())
    found_1LD = gradients.attribute(
        input_ids_L[None], baselines=blank_L[None], n_steps=STEPS, method="gausslegendre", internal_batch_size=STEPS
    )
    return found_1LD[0].sum(dim=-1).detach()
