"""Collation of documents into batches without padding chunks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class DocumentCollator:
    """Concatenate the chunks of a batch's documents, without padding chunks.

    The documents `[{"input_ids": [[0, 5, 2], [0, 6, 7, 2]], "labels": 1}, {"input_ids": [[0, 2]], "labels": 0}]`, with
    `pad_token_id` 1, become

        labels          [1, 0]                                        (B,)
        num_chunks      [2, 1]                                        (B,)
        input_ids       [[0, 5, 2, 1], [0, 6, 7, 2], [0, 2, 1, 1]]    (N, L)
        attention_mask  [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]    (N, L)
        chunk_lengths   [[3, 4], [2]]                                 Python ints

    Labels that are arrays (K,) yield (B, K). Documents with `chunk_vectors` (C, D) yield `chunk_vectors` (N, D), with or instead of token ids, and those with
    `rest_counts` (M,) yield `rest_counts` (B, M). `labels` comes first, since Trainer reads the batch size from the first tensor. `chunk_lengths` stays on the host for planning
    encoder batches. `with_ids` adds `ids`, a list of the documents' ids, which WeightedTrainer removes and logs for
    skipped steps.
    """

    pad_token_id: int
    with_ids: bool = False

    def __call__(self, documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        if "labels" in documents[0]:
            batch["labels"] = torch.from_numpy(np.array([document["labels"] for document in documents]))
        if self.with_ids:
            batch["ids"] = [document["id"] for document in documents]
        if "rest_counts" in documents[0]:
            batch["rest_counts"] = torch.from_numpy(np.stack([document["rest_counts"] for document in documents]))
        if "chunk_vectors" in documents[0]:
            batch["num_chunks"] = torch.tensor([len(document["chunk_vectors"]) for document in documents])
            batch["chunk_vectors"] = torch.cat([document["chunk_vectors"] for document in documents])
        if "input_ids" not in documents[0]:
            return batch
        chunks = [chunk for document in documents for chunk in document["input_ids"]]
        chunk_lengths = [[len(chunk) for chunk in document["input_ids"]] for document in documents]
        lengths = np.array([len(chunk) for chunk in chunks])
        mask_NL = np.arange(lengths.max()) < lengths[:, None]
        ids_NL = np.full(mask_NL.shape, self.pad_token_id, dtype=np.int64)
        ids_NL[mask_NL] = np.concatenate([np.asarray(chunk) for chunk in chunks])
        batch["num_chunks"] = torch.tensor([len(document["input_ids"]) for document in documents])
        batch["input_ids"] = torch.from_numpy(ids_NL)
        batch["attention_mask"] = torch.from_numpy(mask_NL.astype(np.int64))
        batch["chunk_lengths"] = chunk_lengths
        return batch
