"""Pooling: tokens → chunk vectors, and chunk vectors → document vectors with chunk weights.

B documents, N chunks in the batch, C chunks of a document, S subsets of them, L tokens, D hidden, A width of the attention's
hidden layer.
Pushed to the hub with the model; imports nothing else from the project.
"""

from collections.abc import Sequence

import torch
from torch import nn


def host_counts(num_chunks_B: torch.Tensor | Sequence[int]) -> list[int]:
    """Counts as Python ints; synchronizes with the device if they are a tensor."""
    return num_chunks_B.tolist() if isinstance(num_chunks_B, torch.Tensor) else list(num_chunks_B)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to the device, asynchronously on CUDA."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def mean_of_tokens(token_NLD: torch.Tensor, attention_mask_NL: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each chunk's real tokens, (N, D), as sentence encoders such as MiniLM were trained with.

    Accumulates in fp32 whatever the dtype of the tokens. Without a mask all tokens are real.
    """
    if attention_mask_NL is None:
        return token_NLD.sum(dim=1, dtype=torch.float32) / token_NLD.shape[1]
    sum_ND = (token_NLD * attention_mask_NL[..., None].to(token_NLD.dtype)).sum(dim=1, dtype=torch.float32)
    return sum_ND / attention_mask_NL.sum(dim=1, keepdim=True)


def pool_tokens(token_NLD: torch.Tensor, kind: str, attention_mask_NL: torch.Tensor | None = None) -> torch.Tensor:
    """Chunk vectors, (N, D): the mean over the real tokens (`mean`), the first token (`cls`) or the last real one (`last`).

    In fp32 whatever the dtype of the tokens. Without a mask all tokens are real; padding is on the right.
    """
    if kind == "mean":
        return mean_of_tokens(token_NLD, attention_mask_NL)
    num_chunks, num_tokens, _ = token_NLD.shape
    position_L = torch.arange(num_tokens, device=token_NLD.device)
    is_pooled_NL = (position_L == (0 if kind == "cls" else num_tokens - 1)).expand(num_chunks, num_tokens)
    if kind == "last" and attention_mask_NL is not None:
        is_pooled_NL = position_L == attention_mask_NL.sum(dim=1, keepdim=True) - 1
    # The mean over a single token: a mask is what sharded weights need (see `encode_batch`).
    return mean_of_tokens(token_NLD, is_pooled_NL)


def pad_documents(chunk_ND: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the batch's chunks to one row per document.

    Returns:
        `chunk_BCD`, zero-padded to C chunks, and `real_BC`, True for real chunks.
    """
    chunk_BCD = nn.utils.rnn.pad_sequence(chunk_ND.split(counts), batch_first=True)
    real_BC = torch.arange(chunk_BCD.shape[1]) < torch.tensor(counts)[:, None]
    return chunk_BCD, to_device(real_BC, chunk_ND.device)


def unpad_documents(value_BCX: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Drop the padding: (B, C, …) → (N, …), documents concatenated."""
    return torch.cat([row[:count] for row, count in zip(value_BCX, counts, strict=True)])


class ChunkPooling(nn.Module):
    """Pool the chunks of each document by learned attention, mean or maximum.

    Attention is Yang et al. 2016 (Hierarchical Attention Networks, eq. 8-10):
    `weights = softmax(v · tanh(W chunk + b))` over the document's own chunks.

    >>> pooling = ChunkPooling("mean", hidden_size=2, attention_size=2)
    >>> document_BD, chunk_weights_N = pooling(torch.tensor([[0., 2.], [2., 4.], [5., 5.]]), torch.tensor([2, 1]))
    >>> document_BD.tolist(), chunk_weights_N.tolist()
    ([[1.0, 3.0], [5.0, 5.0]], [0.5, 0.5, 1.0])
    """

    def __init__(self, kind: str, hidden_size: int, attention_size: int):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.dense = nn.Linear(hidden_size, attention_size)
            self.score = nn.Linear(attention_size, 1, bias=False)

    def forward(
        self, chunk_ND: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool chunk vectors into document vectors.

        Args:
            chunk_ND: chunk vectors, documents concatenated.
            num_chunks_B: chunks of each document, at least one each, summing to N. Python ints avoid a device sync.

        Returns:
            `document_BD` and `chunk_weights_N`. The weights of a document sum to 1; for `max`, a chunk's weight is the
            share of the D features for which it has the maximum.
        """
        counts = host_counts(num_chunks_B)
        chunk_BCD, real_BC = pad_documents(chunk_ND, counts)
        if self.kind == "max":
            document_BD, winner_BD = chunk_BCD.masked_fill(~real_BC[..., None], -torch.inf).max(dim=1)
            wins_BC = torch.zeros_like(real_BC, dtype=chunk_ND.dtype)
            wins_BC.scatter_add_(1, winner_BD, torch.ones_like(document_BD))
            return document_BD, unpad_documents(wins_BC / document_BD.shape[1], counts)
        weights_BC = self._weights(chunk_BCD, real_BC)
        return torch.einsum("bc,bcd->bd", weights_BC, chunk_BCD), unpad_documents(weights_BC, counts)

    def pool_subsets(self, chunk_XCD: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
        """Document vectors (S, D) of subsets of one document's chunks.

        Args:
            chunk_XCD: chunk vectors, the same in all subsets (1, C, D) or those of each (S, C, D).
            kept_SC: True where a subset contains a chunk; each contains at least one.
        """
        if self.kind == "max":
            return chunk_XCD.masked_fill(~kept_SC[..., None], -torch.inf).amax(dim=1)
        weights_SC = self._weights(chunk_XCD, kept_SC)
        if len(chunk_XCD) == 1:
            return weights_SC @ chunk_XCD[0]
        return (weights_SC[:, None] @ chunk_XCD)[:, 0]

    def _weights(self, chunk_BCD: torch.Tensor, real_BC: torch.Tensor) -> torch.Tensor:
        if self.kind == "mean":
            return real_BC / real_BC.sum(dim=1, keepdim=True, dtype=chunk_BCD.dtype)
        score_BC = self.score(torch.tanh(self.dense(chunk_BCD))).squeeze(-1)
        return score_BC.masked_fill(~real_BC, -torch.inf).softmax(dim=1)


class ChunkTransformer(nn.Module):
    """A small transformer over a document's chunk vectors, giving each chunk the context of the other chunks.

    Positions are sinusoidal (Vaswani et al. 2017), since a document may have more chunks than any seen in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def forward(self, chunk_ND: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """`chunk_ND` → `chunk_ND`; each chunk attends only to the chunks of its own document."""
        counts = host_counts(num_chunks_B)
        chunk_BCD, real_BC = pad_documents(chunk_ND, counts)
        position_CD = sinusoids(chunk_BCD.shape[1], chunk_BCD.shape[2], chunk_ND.device)
        return unpad_documents(self.layers(chunk_BCD + position_CD, src_key_padding_mask=~real_BC), counts)

    def of_subsets(self, chunk_CD: torch.Tensor, kept_SC: torch.Tensor) -> torch.Tensor:
        """Chunk vectors (S, C, D) of subsets of one document's chunks: each attends to its own, at its place among them."""
        position_CD = sinusoids(chunk_CD.shape[0], chunk_CD.shape[1], chunk_CD.device)
        place_SC = (kept_SC.long().cumsum(dim=1) - 1).clamp(min=0)
        return self.layers(chunk_CD + position_CD[place_SC], src_key_padding_mask=~kept_SC)


def sinusoids(num_positions: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    """Sinusoidal positions, (num_positions, hidden_size): sines in the first half of the features, then cosines."""
    half = hidden_size // 2
    frequency = torch.exp(torch.arange(half, device=device) * (-torch.log(torch.tensor(10000.0)) / max(half - 1, 1)))
    angle = torch.arange(num_positions, device=device)[:, None] * frequency
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, hidden_size - 2 * half))
