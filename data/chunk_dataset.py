"""Datasets of prepared documents: chunks of tokens, or cached embeddings of a frozen encoder."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from data.labels import is_multi_label, label_array, label_names
from modeling.hierarchical_roberta.chunking import Chunker, select_chunks
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures


class ChunkedDocuments(Dataset):
    """Documents of a prepared split, cut into chunks on access.

    An item is `{"input_ids": [chunk, …], "selected": indices, "labels": int, "id": str}` (labels: a float32 array (K,) of 0
    and 1 where a document may have several): the document's selected chunks,
    each an int64 array with special tokens. With `training` and the policy `random` or `lexical`, the sampled chunks
    depend on seed, epoch and document only, so a resumed run samples the same ones.

    With the policy `lexical` the selected chunks are those to encode, and in evaluation an item has `rest_counts` too: the
    counts of the lexical features (M,) in the document's other chunks.

    Args:
        documents: a split with `input_ids`, `token_break`, `label` and `id`.
        chunk_length: tokens in a chunk, special tokens and `chunk_prefix` included.
        chunk_prefix: text at the start of each chunk.
        lexical: features that select chunks with the policy `lexical`, on the CPU; may be set later, once fitted.
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
        chunk_prefix: str = "",
        training: bool = False,
        seed: int = 42,
        lexical: LexicalFeatures | None = None,
    ):
        self.documents = documents.with_format("numpy", columns=["input_ids", "token_break", "label", "id"])
        self.is_multi_label = is_multi_label(documents)
        self.num_labels = len(label_names(documents)) if self.is_multi_label else 0  # of an array of labels
        self.tokenizer, self.chunker = tokenizer, Chunker(tokenizer, chunk_length, chunk_overlap, chunk_prefix)
        self.max_chunks, self.chunk_policy = max_chunks, chunk_policy
        self.training, self.seed, self.epoch, self.lexical = training, seed, 0, lexical

    def __len__(self) -> int:
        return len(self.documents)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for sampling chunks."""
        self.epoch = epoch

    def random_state(self, index: int) -> np.random.Generator | None:
        """Generator for sampling a document's chunks in this epoch; None in evaluation."""
        return np.random.default_rng([self.seed, self.epoch, index]) if self.training else None

    def chunks(self, document: dict[str, Any]) -> list[np.ndarray]:
        """Tokens of all chunks of a tokenized document, without special tokens and prefix."""
        tokens = document["input_ids"].astype(np.int64)
        return [tokens[slice(*span)] for span in self.chunker.spans(len(tokens), document["token_break"])]

    def texts_read(self, rows: Iterable[int]) -> Iterator[list[np.ndarray]]:
        """The chunks of documents that are read at evaluation, encoded or only counted, as `chunks`."""
        for row in rows:
            chunks = self.chunks(self.documents[int(row)])
            if self.chunk_policy != "lexical":
                chunks = [chunks[i] for i in select_chunks(len(chunks), self.max_chunks, self.chunk_policy)]
            yield chunks

    def encoded(self, label: Any) -> int | np.ndarray:
        """A document's label as an int, or its labels as float32 (K,) of 0 and 1."""
        if not self.is_multi_label:
            return int(label)
        label_K = np.zeros(self.num_labels, dtype=np.float32)
        label_K[np.asarray(label, dtype=np.int64)] = 1
        return label_K

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.documents[index])

    def item(self, index: int, document: dict[str, Any]) -> dict[str, Any]:
        """Build a training item from a tokenized document; `index` seeds the chunk sampling."""
        chunks, rng = self.chunks(document), self.random_state(index)
        item: dict[str, Any] = {"labels": self.encoded(document["label"]), "id": str(document["id"])}
        if self.chunk_policy == "lexical" and self.lexical is not None:
            selected, rest_counts = self.lexical.select(chunks, self.max_chunks, rng)
            if not self.training:
                item["rest_counts"] = rest_counts
        else:
            selected = select_chunks(len(chunks), self.max_chunks, self.chunk_policy, rng)
        item["selected"] = selected
        item["input_ids"] = [self.chunker.with_special_tokens(chunks[i]) for i in selected]
        return item


class ChunkVectorDocuments(Dataset):
    """Like `ChunkedDocuments`, with cached embeddings `chunk_vectors` (C, D) instead of token ids.

    Args:
        chunked: the encoded documents, for labels and chunk selection.
        vectors: Arrow table with one row per document: `chunk_vectors`, C × D float32 values, flattened.
        with_tokens: also return `input_ids`, for lexical features.
    """

    def __init__(self, chunked: ChunkedDocuments, vectors: Any, hidden_size: int, with_tokens: bool = False):
        self.chunked, self.hidden_size, self.with_tokens = chunked, hidden_size, with_tokens
        labels = label_array(chunked.documents)
        self.labels = list(labels.astype(np.float32)) if chunked.is_multi_label else labels.tolist()
        self.ids = [str(id_) for id_ in chunked.documents["id"]]
        # Zero-copy views of the memory-mapped file: decoding row by row would take a third of an epoch on cached
        # embeddings. Values of each Arrow chunk ("part"), and each document's part, start and end.
        parts = vectors.data.table["chunk_vectors"].chunks
        self.values = [part.values.to_numpy(zero_copy_only=True) for part in parts]
        offsets = [part.offsets.to_numpy() for part in parts]
        self.part = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.start = np.concatenate([ends[:-1] for ends in offsets])
        self.end = np.concatenate([ends[1:] for ends in offsets])

    def __len__(self) -> int:
        return len(self.chunked)

    def set_epoch(self, epoch: int) -> None:
        self.chunked.set_epoch(epoch)

    def document_mean(self, index: int) -> torch.Tensor:
        """Mean (D,) of all cached embeddings of a document."""
        return torch.tensor(self.document_vectors(index)).mean(dim=0)

    def document_vectors(self, index: int) -> np.ndarray:
        """All cached embeddings (C, D) of a document."""
        return self.values[self.part[index]][self.start[index] : self.end[index]].reshape(-1, self.hidden_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        vectors, chunked = self.document_vectors(index), self.chunked
        # With the policy `lexical`, only the selected chunks are cached.
        selected = select_chunks(len(vectors), chunked.max_chunks, chunked.chunk_policy, chunked.random_state(index))
        item = {"labels": self.labels[index], "id": self.ids[index]}
        if self.with_tokens:
            item = chunked[index]
        return item | {"chunk_vectors": torch.from_numpy(vectors[selected])}
