"""Prepared documents as a training set: chunks, or the vectors that a frozen encoder made of them."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from modeling.hierarchical_roberta.chunking import Chunker, select_chunks


class ChunkedDocuments(Dataset):
    """Documents of a prepared split, cut into chunks as they are read.

    An item is `{"input_ids": [chunk, …], "labels": int, "id": str}`, each chunk an int64 array with special tokens.
    With `training` and the policy `random` the chunks drawn depend on the seed, the epoch and the document alone, so
    a resumed run draws what an unbroken one would have drawn.

    Args:
        documents: a split with `input_ids`, `token_break`, `label` and `id`.
        chunk_length: tokens in a chunk, special tokens included.
    """

    def __init__(
        self,
        documents: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk_length: int,
        chunk_overlap: int = 0,
        max_chunks: int = 20,
        chunk_policy: str = "uniform",
        training: bool = False,
        seed: int = 42,
    ):
        self.documents = documents.with_format("numpy", columns=["input_ids", "token_break", "label", "id"])
        self.tokenizer, self.chunker = tokenizer, Chunker(tokenizer, chunk_length, chunk_overlap)
        self.max_chunks, self.chunk_policy = max_chunks, chunk_policy
        self.training, self.seed, self.epoch = training, seed, 0

    def __len__(self) -> int:
        return len(self.documents)

    def set_epoch(self, epoch: int) -> None:
        """Draw the chunks of this epoch from now on."""
        self.epoch = epoch

    def spans(self, index: int) -> list[tuple[int, int]]:
        """All chunks of a document, read or not, in flat tokens."""
        document = self.documents[index]
        return self.chunker.spans(len(document["input_ids"]), document["token_break"])

    def selection(self, index: int, num_chunks: int) -> np.ndarray:
        """Which of a document's chunks are read in this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch, index]) if self.training else None
        return select_chunks(num_chunks, self.max_chunks, self.chunk_policy, rng)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.documents[index])

    def item(self, index: int, document: dict[str, Any]) -> dict[str, Any]:
        """A document's tokens, wherever they come from, as a training item; `index` is its number among all."""
        tokens = document["input_ids"]
        spans = self.chunker.spans(len(tokens), document["token_break"])
        chunks = [self.chunker.with_special_tokens(tokens[slice(*spans[i])]) for i in self.selection(index, len(spans))]
        return {"labels": int(document["label"]), "input_ids": chunks, "id": str(document["id"])}


class ChunkVectorDocuments(Dataset):
    """As `ChunkedDocuments`, with `chunk_vectors` (C, D) that a frozen encoder made before, in place of token ids.

    Args:
        chunked: the documents that the vectors were made of, for their labels and their selection of chunks.
        vectors: an Arrow table with a row a document: `chunk_vectors`, flat float32 of all its C × D numbers.
        with_tokens: give the `input_ids` too, for a lexical view.
    """

    def __init__(self, chunked: ChunkedDocuments, vectors: Any, hidden_size: int, with_tokens: bool = False):
        self.chunked, self.hidden_size, self.with_tokens = chunked, hidden_size, with_tokens
        self.labels = np.asarray(chunked.documents["label"], dtype=np.int64).tolist()
        self.ids = [str(id_) for id_ in chunked.documents["id"]]
        # Views of the memory-mapped file, since an epoch on kept vectors is so short that to decode row by row would be
        # a third of it: the numbers of each part, and where in which part a document's begin and end.
        parts = vectors.data.table["chunk_vectors"].chunks
        self.numbers = [part.values.to_numpy(zero_copy_only=True) for part in parts]
        offsets = [part.offsets.to_numpy() for part in parts]
        self.part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.start = np.concatenate([ends[:-1] for ends in offsets])
        self.end = np.concatenate([ends[1:] for ends in offsets])

    def __len__(self) -> int:
        return len(self.chunked)

    def set_epoch(self, epoch: int) -> None:
        self.chunked.set_epoch(epoch)

    def document_mean(self, index: int) -> torch.Tensor:
        """The mean (D,) of all the chunk vectors that are kept of a document."""
        return torch.tensor(self.document_vectors(index)).mean(dim=0)

    def document_vectors(self, index: int) -> np.ndarray:
        """All the chunk vectors (C, D) that are kept of a document."""
        return self.numbers[self.part[index]][self.start[index] : self.end[index]].reshape(-1, self.hidden_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        vectors = self.document_vectors(index)
        chosen = self.chunked.selection(index, len(vectors))
        item = {"labels": self.labels[index], "id": self.ids[index]}
        if self.with_tokens:
            item = self.chunked[index]
        return item | {"chunk_vectors": torch.from_numpy(vectors[chosen])}
