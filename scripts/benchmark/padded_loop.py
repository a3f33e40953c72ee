"""Reference implementation of the design that this project replaces: every document is padded to `max_chunks` chunks of
`chunk_length` tokens, a loop runs over chunk positions, and all activations are kept. Same weights, same results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalOutput,
    HierarchicalRobertaForSequenceClassification,
)
from modeling.hierarchical_roberta.pooling import mean_of_tokens


class PaddedLoop(HierarchicalRobertaForSequenceClassification):
    """Encodes all `max_chunks` positions one by one, including empty ones, and pools the real chunks."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_chunks: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> HierarchicalOutput:
        """Classify documents.

        Args:
            input_ids: (B, C, L) with C always `max_chunks` and L always `chunk_length`.
            attention_mask: (B, C, L).
            num_chunks: (B,).
            labels: (B,).
        """
        positions = []
        for ids_BL, mask_BL in zip(input_ids.unbind(1), attention_mask.unbind(1), strict=True):
            token_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
            positions.append(mean_of_tokens(token_BLD, mask_BL))
        chunk_BCD = torch.stack(positions, dim=1)
        is_real_BC = torch.arange(chunk_BCD.shape[1], device=chunk_BCD.device) < num_chunks[:, None]
        logits_BK, chunk_weights_N = self.classify(chunk_BCD[is_real_BC], num_chunks)
        loss = None if labels is None else nn.functional.cross_entropy(logits_BK, labels)
        return HierarchicalOutput(loss, logits_BK, chunk_weights_N)


@dataclass
class PaddedCollator:
    """Documents → tensors of a fixed shape, (B, max_chunks, chunk_length)."""

    pad_token_id: int
    max_chunks: int
    chunk_length: int

    def __call__(self, documents: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BCL = torch.full((len(documents), self.max_chunks, self.chunk_length), self.pad_token_id)
        mask_BCL = torch.zeros_like(ids_BCL)
        # Unmask the first token of empty chunks: attention over no tokens is NaN.
        mask_BCL[:, :, 0] = 1
        for row, document in enumerate(documents):
            for position, chunk in enumerate(document["input_ids"]):
                ids_BCL[row, position, : len(chunk)] = torch.as_tensor(chunk)
                mask_BCL[row, position, : len(chunk)] = 1
        return {
            "labels": torch.tensor([document["labels"] for document in documents]),
            "num_chunks": torch.tensor([len(document["input_ids"]) for document in documents]),
            "input_ids": ids_BCL,
            "attention_mask": mask_BCL,
        }
