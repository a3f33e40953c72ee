"""Tokens → chunk vectors; chunk vectors → document vectors, and how much each chunk weighed.

B documents, N chunks in the batch, C chunks of a document, L tokens, D hidden, A width of the attention's hidden layer.
This file travels to the hub with the model and imports nothing else of the project.
"""

from collections.abc import Sequence

import torch
from torch import nn


def host_counts(num_chunks_B: torch.Tensor | Sequence[int]) -> list[int]:
    """The counts as Python's numbers; where a tensor holds them, this waits for its device."""
    return num_chunks_B.tolist() if isinstance(num_chunks_B, torch.Tensor) else list(num_chunks_B)


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; on CUDA by a copy that neither side waits for."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def mean_of_tokens(token_NLD: torch.Tensor, attention_mask_NL: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each chunk's real tokens, (N, D): what sentence encoders such as MiniLM were trained for.

    Added up in fp32 whatever the tokens' type. Without a mask all tokens are real.
    """
    if attention_mask_NL is None:
        return token_NLD.sum(dim=1, dtype=torch.float32) / token_NLD.shape[1]
    sum_ND = (token_NLD * attention_mask_NL[..., None].to(token_NLD.dtype)).sum(dim=1, dtype=torch.float32)
    return sum_ND / attention_mask_NL.sum(dim=1, keepdim=True)


def pad_documents(chunk_ND: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the batch's chunks out one document a row.

    Returns:
        `chunk_BCD`, zeros where a document has fewer than C chunks, and `real_BC`, True where a chunk is.
    """
    chunk_BCD = nn.utils.rnn.pad_sequence(chunk_ND.split(counts), batch_first=True)
    real_BC = torch.arange(chunk_BCD.shape[1]) < torch.tensor(counts)[:, None]
    return chunk_BCD, to_device(real_BC, chunk_ND.device)


def unpad_documents(value_BCX: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The values of the real chunks, documents one after the other: (B, C, …) → (N, …)."""
    return torch.cat([row[:count] for row, count in zip(value_BCX, counts, strict=True)])


class ChunkPooling(nn.Module):
    """Pools the chunks of each document, by learned attention, mean or maximum.

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
        """Pool.

        Args:
            chunk_ND: chunk vectors, documents one after the other.
            num_chunks_B: chunks of each document, at least one each; they sum to N. Given as Python's numbers, the
                device is not waited for.

        Returns:
            `document_BD` and `chunk_weights_N`. The weights of a document sum to 1; for `max` they are the share of
            the D features that each chunk won.
        """
        counts = host_counts(num_chunks_B)
        chunk_BCD, real_BC = pad_documents(chunk_ND, counts)
        if self.kind == "max":
            document_BD, winner_BD = chunk_BCD.masked_fill(~real_BC[..., None], -torch.inf).max(dim=1)
            won_BC = torch.zeros_like(real_BC, dtype=chunk_ND.dtype)
            won_BC.scatter_add_(1, winner_BD, torch.ones_like(document_BD))
            return document_BD, unpad_documents(won_BC / document_BD.shape[1], counts)
        if self.kind == "mean":
            weights_BC = real_BC / real_BC.sum(dim=1, keepdim=True, dtype=chunk_ND.dtype)
        else:
            score_BC = self.score(torch.tanh(self.dense(chunk_BCD))).squeeze(-1)
            weights_BC = score_BC.masked_fill(~real_BC, -torch.inf).softmax(dim=1)
        return torch.einsum("bc,bcd->bd", weights_BC, chunk_BCD), unpad_documents(weights_BC, counts)


class ChunkTransformer(nn.Module):
    """A small transformer over the chunk vectors of a document, so that a chunk is read beside the others.

    Positions are sinusoids (Vaswani et al. 2017): a document may have more chunks than any seen in training.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, 4 * hidden_size, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def forward(self, chunk_ND: torch.Tensor, num_chunks_B: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """`chunk_ND` → `chunk_ND`, each seeing the other chunks of its own document and no others."""
        counts = host_counts(num_chunks_B)
        chunk_BCD, real_BC = pad_documents(chunk_ND, counts)
        position_CD = sinusoids(chunk_BCD.shape[1], chunk_BCD.shape[2], chunk_ND.device)
        return unpad_documents(self.layers(chunk_BCD + position_CD, src_key_padding_mask=~real_BC), counts)


def sinusoids(num_positions: int, hidden_size: int, device: torch.device) -> torch.Tensor:
    """Position vectors, (num_positions, hidden_size): sines in the first half of the features, cosines in the second."""
    half = hidden_size // 2
    rate = torch.exp(torch.arange(half, device=device) * (-torch.log(torch.tensor(10000.0)) / max(half - 1, 1)))
    angle = torch.arange(num_positions, device=device)[:, None] * rate
    return nn.functional.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, hidden_size - 2 * half))
