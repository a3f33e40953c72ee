"""Lexical features: a document's counts of class-indicative tokens, used in addition to the encoder's chunk vectors.

B documents, N chunks in the batch, L tokens of a chunk, V vocabulary, M features, K labels.
Pushed to the hub with the model; imports only its siblings.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .pooling import host_counts


class LexicalFeatures(nn.Module):
    """Logits from the counts of M tokens over the chunks read of a document: `W log(1 + counts) + b`.

    Tokens and weights are fitted on the training documents before training (scripts/training/fit_lexical_features.py)
    and then fixed. Counts are additive over chunks, so chunks can be left out. The logits are zero until fitted.

    >>> lexical = LexicalFeatures(vocab_size=9, num_features=2, num_labels=2)
    >>> lexical.set_weights(torch.tensor([7, 4]), torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([0.0, 0.5]))
    >>> count_NM = lexical.count(torch.tensor([[0, 4, 4, 2], [0, 7, 4, 2]]))
    >>> count_NM.tolist(), lexical(count_NM, torch.tensor([2]))
    ([[0.0, 2.0], [1.0, 1.0]], tensor([[0.0000, 3.9657]]))
    """

    feature_of_token: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, vocab_size: int, num_features: int, num_labels: int):
        super().__init__()
        # Index M marks a token that is not a feature.
        self.register_buffer("feature_of_token", torch.full((vocab_size,), num_features))
        self.register_buffer("weight", torch.zeros(num_labels, num_features))
        self.register_buffer("bias", torch.zeros(num_labels))

    @torch.no_grad()
    def set_weights(self, tokens_m: torch.Tensor, weight_Km: torch.Tensor, bias_K: torch.Tensor) -> None:
        """Set the fitted token ids (at most M) and their weights; remaining features stay unused."""
        count = len(tokens_m)
        self.feature_of_token.fill_(self.weight.shape[1])
        self.feature_of_token[tokens_m.to(self.weight.device)] = torch.arange(count, device=self.weight.device)
        self.weight.zero_()
        self.weight[:, :count] = weight_Km.to(self.weight)
        self.bias.copy_(bias_K)

    def count(self, input_ids_NL: torch.Tensor, num_prefix_tokens: int = 0) -> torch.Tensor:
        """Occurrences of each feature in each chunk, (N, M), as floats, without those in the chunk's prefix. Special tokens
        are never features."""
        feature_NL = self.feature_of_token[input_ids_NL[:, num_prefix_tokens:]]
        count_NX = torch.zeros(len(input_ids_NL), self.weight.shape[1] + 1, device=input_ids_NL.device)
        return count_NX.scatter_add_(1, feature_NL, torch.ones_like(feature_NL, dtype=count_NX.dtype))[:, :-1]

    def forward(self, count_NM: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """`logits_BK` from the chunk counts of concatenated documents."""
        documents = count_NM.split(host_counts(num_chunks_B))
        return self.logits(torch.stack([count_CM.sum(dim=0) for count_CM in documents]))

    def logits(self, count_BM: torch.Tensor) -> torch.Tensor:
        """`logits_BK` from document counts."""
        return nn.functional.linear(torch.log1p(count_BM), self.weight, self.bias)
