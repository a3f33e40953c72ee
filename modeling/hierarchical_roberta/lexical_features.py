"""Lexical features: a document's counts of tokens, and of pairs of them, that tell the classes apart.

They are used in addition to the encoder's chunk vectors, and by the chunk policy `lexical` to select the chunks that the
encoder reads.

B documents, N chunks in the batch, C chunks of a document, L tokens of a chunk, T tokens of many chunks, V vocabulary,
M features, K labels.
Pushed to the hub with the model; imports only its siblings.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .chunking import select_telling_chunks


class LexicalFeatures(nn.Module):
    """Logits from the counts of M tokens and pairs of adjacent tokens in a document.

    With the weighting `log`, of tokens only, they are `W log(1 + counts) + b`; with `tfidf` they are `W v / |v| + b` with
    `v = idf · log(1 + counts)`. Features and weights are fitted on the training documents before
    training (scripts/training/fit_lexical_features.py) and then fixed. Counts are additive over chunks, so chunks can be
    left out. The logits are zero until fitted.

    >>> lexical = LexicalFeatures(vocab_size=9, num_features=2, num_labels=2)
    >>> weight_KM = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    >>> lexical.set_weights(torch.tensor([7, 4]), weight_KM, torch.tensor([0.0, 0.5]))
    >>> count_NM = lexical.count(torch.tensor([[0, 4, 4, 2], [0, 7, 4, 2]]))
    >>> count_NM.tolist(), lexical(count_NM.sum(dim=0, keepdim=True))
    ([[0.0, 2.0], [1.0, 1.0]], tensor([[0.0000, 3.9657]]))
    """

    feature_of_token: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    pairs: torch.Tensor | None
    feature_of_pair: torch.Tensor | None
    idf: torch.Tensor | None

    def __init__(self, vocab_size: int, num_features: int, num_labels: int, weighting: str = "log"):
        super().__init__()
        self.weighting = weighting
        # Index M marks what is no feature.
        self.register_buffer("feature_of_token", torch.full((vocab_size,), num_features))
        self.register_buffer("weight", torch.zeros(num_labels, num_features))
        self.register_buffer("bias", torch.zeros(num_labels))
        has_pairs = weighting == "tfidf"
        # A pair is `first · V + second`; sorted, so that one is found by bisection.
        self.register_buffer("pairs", torch.full((num_features,), vocab_size**2) if has_pairs else None)
        self.register_buffer("feature_of_pair", torch.full((num_features,), num_features) if has_pairs else None)
        self.register_buffer("idf", torch.zeros(num_features) if has_pairs else None)

    @torch.no_grad()
    def set_weights(
        self, features_m: torch.Tensor, weight_Km: torch.Tensor, bias_K: torch.Tensor, idf_m: torch.Tensor | None = None
    ) -> None:
        """Set the fitted features (at most M) and their weights; the others stay unused.

        Args:
            features_m: a token's id, or V plus a pair.
        """
        count, vocab_size, device = len(features_m), len(self.feature_of_token), self.weight.device
        features_m = features_m.to(device)
        is_token_m, feature_m = features_m < vocab_size, torch.arange(count, device=device)
        self.feature_of_token.fill_(self.weight.shape[1])
        self.feature_of_token[features_m[is_token_m]] = feature_m[is_token_m]
        self.weight.zero_()
        self.weight[:, :count] = weight_Km.to(self.weight)
        self.bias.copy_(bias_K)
        if self.pairs is not None and self.feature_of_pair is not None and self.idf is not None:
            assert idf_m is not None
            self.idf.zero_()
            self.idf[:count] = idf_m.to(self.idf)
            pairs_p, order_p = (features_m[~is_token_m] - vocab_size).sort()
            self.pairs.fill_(vocab_size**2)
            self.pairs[: len(pairs_p)] = pairs_p
            self.feature_of_pair.fill_(self.weight.shape[1])
            self.feature_of_pair[: len(pairs_p)] = feature_m[~is_token_m][order_p]

    def tokens_of_features(self) -> dict[int, list[int]]:
        """Feature → its token, or the two of its pair."""
        num_features, vocab_size = self.weight.shape[1], len(self.feature_of_token)
        tokens = {feature: [token] for token, feature in enumerate(self.feature_of_token.tolist())}
        if self.pairs is not None and self.feature_of_pair is not None:
            pairs = zip(self.feature_of_pair.tolist(), self.pairs.tolist(), strict=True)
            tokens |= {feature: list(divmod(pair, vocab_size)) for feature, pair in pairs}
        tokens.pop(num_features, None)  # what is no feature
        return tokens

    def features(self, input_ids_NL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The feature of each token, (N, L), and of each pair of adjacent tokens, (N, L − 1 or 0); M for none."""
        token_NL = self.feature_of_token[input_ids_NL]
        if self.pairs is None or self.feature_of_pair is None or input_ids_NL.shape[1] < 2:
            return token_NL, token_NL[:, :0]
        pair_NP = input_ids_NL[:, :-1] * len(self.feature_of_token) + input_ids_NL[:, 1:]
        index_NP = torch.searchsorted(self.pairs, pair_NP).clamp(max=len(self.pairs) - 1)
        return token_NL, torch.where(
            self.pairs[index_NP] == pair_NP, self.feature_of_pair[index_NP], self.weight.shape[1]
        )

    def count(
        self, input_ids_NL: torch.Tensor, num_chunks_B: Sequence[int] | None = None, num_prefix_tokens: int = 0
    ) -> torch.Tensor:
        """Occurrences of each feature in each chunk, (N, M), or in each document, (B, M), as floats, without those in the
        chunks' prefix. Special tokens are never features.

        Args:
            num_chunks_B: chunks of each document, to count by document.
        """
        device, width = input_ids_NL.device, self.weight.shape[1] + 1
        row_N = torch.arange(len(input_ids_NL))
        if num_chunks_B is not None:
            row_N = torch.arange(len(num_chunks_B)).repeat_interleave(torch.tensor(list(num_chunks_B)))
        feature_NF = torch.cat(self.features(input_ids_NL[:, num_prefix_tokens:]), dim=1)
        num_rows = len(input_ids_NL) if num_chunks_B is None else len(num_chunks_B)
        index_NF = feature_NF + (row_N * width).to(device)[:, None]
        count = torch.zeros(num_rows * width, device=device)
        count.scatter_add_(0, index_NF.flatten(), torch.ones_like(index_NF, dtype=count.dtype).flatten())
        return count.view(num_rows, width)[:, :-1]

    def count_chunks(self, chunks: Sequence[np.ndarray], num_prefix_tokens: int = 0) -> torch.Tensor:
        """`count` of one document's chunks, (C, M)."""
        ids = [torch.from_numpy(chunk[num_prefix_tokens:]).to(self.weight.device) for chunk in chunks]
        return self.count(nn.utils.rnn.pad_sequence(ids, True, self._padding_token()))

    def _padding_token(self) -> int:
        """A token that is no feature, nor part of one: special tokens never are."""
        is_free_V = self.feature_of_token == self.weight.shape[1]
        if self.pairs is not None:
            vocab_size = len(is_free_V)
            pairs = self.pairs[self.pairs < vocab_size**2]
            is_free_V[torch.cat([pairs // vocab_size, pairs % vocab_size])] = False
        return int(is_free_V.nonzero()[0])

    def forward(self, count_BM: torch.Tensor) -> torch.Tensor:
        """`logits_BK` from document counts."""
        value_BM = torch.log1p(count_BM)
        if self.idf is not None:
            value_BM = nn.functional.normalize(value_BM * self.idf, dim=1)
        return nn.functional.linear(value_BM, self.weight, self.bias)

    @torch.no_grad()
    def select(
        self, chunks: Sequence[np.ndarray], max_chunks: int, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Select a document's most telling chunks: the policy `lexical`. For modules on the CPU.

        A chunk tells of a class by the logit that its own counts give the class, above the mean of all. The classes take
        turns in choosing their most telling chunk, so that evidence for each is encoded (if there are fewer chunks than
        classes, those choose whose chunk tells most), and a quarter of the chunks is spread over the rest of the document,
        in case the words miss something.

        Args:
            chunks: each chunk's tokens, without special tokens and prefix.
            rng: draws the chunks that are spread over the rest; without one (in evaluation) they are evenly spaced.

        Returns:
            Sorted indices of at most `max_chunks` chunks, and the counts (M,) in all others.
        """
        num_features, num_chunks = self.weight.shape[1], len(chunks)
        selected = np.arange(num_chunks)
        # Sparse: of M features a chunk has few.
        ids = [torch.from_numpy(chunk) for chunk in chunks]
        feature_CF = torch.cat(self.features(nn.utils.rnn.pad_sequence(ids, True, self._padding_token())), dim=1)
        chunk_S, place_S = (feature_CF < num_features).nonzero(as_tuple=True)
        cell_S, count_S = (chunk_S * num_features + feature_CF[chunk_S, place_S]).unique(return_counts=True)
        chunk_S, feature_S = cell_S // num_features, cell_S % num_features
        if num_chunks > max_chunks:
            logits_CK = self._chunk_logits(chunk_S, feature_S, count_S, num_chunks).numpy()
            selected = select_telling_chunks(logits_CK, max_chunks, rng)
        is_rest_S = ~np.isin(chunk_S.numpy(), selected)
        rest_M = np.bincount(feature_S.numpy()[is_rest_S], count_S.numpy()[is_rest_S], minlength=num_features)
        return selected, rest_M.astype(np.float32)

    def _chunk_logits(
        self, chunk_S: torch.Tensor, feature_S: torch.Tensor, count_S: torch.Tensor, num_chunks: int
    ) -> torch.Tensor:
        """`forward` for chunks, from the S counts that are not zero: (C, K)."""
        value_S = count_S.float().log1p()
        if self.idf is not None:
            value_S = value_S * self.idf[feature_S]
            square_C = torch.zeros(num_chunks).index_add_(0, chunk_S, value_S**2)
            value_S = value_S / square_C.sqrt()[chunk_S].clamp(min=1e-12)
        logits_CK = self.bias.repeat(num_chunks, 1)
        return logits_CK.index_add_(0, chunk_S, value_S[:, None] * self.weight.T[feature_S])
