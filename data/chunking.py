"""Text → tokens → chunks, with the characters that each token stands for; and what share of a document is read.

A document is tokenized once, without special tokens, into one flat row of ids. Chunks are cut from that row when it
is read, so the geometry can change without tokenizing again. Every chunk gets its own special tokens.
"""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

# A chunk prefers to begin where a paragraph begins (2), else where a sentence or a line does (1).
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s+|[。！？]|\n\s*")


def tokenize_batch(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[np.ndarray]]:
    """Flat tokens of each text: `input_ids`, `token_start` and `token_end` (characters into the text, end exclusive),
    and `token_break` (what begins at the token: 2 a paragraph, 1 a sentence or line, 0 neither)."""
    backend = tokenizer.backend_tokenizer
    # Some tokenizer files carry both, and would cut a text at 128 tokens without a word.
    backend.no_truncation()
    backend.no_padding()
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    ids = [encoding.ids for encoding in encodings]
    # fromiter over the flat numbers: twice as fast as an array of pairs, and half of what is not the tokenizer's time.
    offsets = [
        np.fromiter(chain.from_iterable(pairs), np.int32, 2 * len(pairs)).reshape(-1, 2)
        for pairs in (encoding.offsets for encoding in encodings)
    ]
    return {
        "input_ids": [np.fromiter(row, np.int32, len(row)) for row in ids],
        "token_start": [pairs[:, 0] for pairs in offsets],
        "token_end": [pairs[:, 1] for pairs in offsets],
        "token_break": [token_breaks(text, pairs[:, 1]) for text, pairs in zip(texts, offsets, strict=True)],
    }


def token_breaks(text: str, token_end: np.ndarray) -> np.ndarray:
    """int8 a token: 2 where a paragraph begins, 1 where a sentence or a line does, else 0."""
    breaks = np.zeros(len(token_end) + 1, dtype=np.int8)
    for level, pattern in ((1, SENTENCE), (2, PARAGRAPH)):
        positions = [match.end() for match in pattern.finditer(text)]
        breaks[np.searchsorted(token_end, positions, side="right")] = level
    breaks[:1] = 0
    return breaks[:-1]


def special_token_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text, `([0], [2])` for RoBERTa."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    before = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return framed[:before], framed[before + len(bare) :]


def chunk_bounds(
    num_tokens: int, body_length: int, overlap: int = 0, breaks: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Where each chunk of a document begins and ends (exclusive), in flat tokens.

    As few chunks as possible, of near-equal length, none over `body_length`. Each begins `overlap` tokens before the
    end of the one before it, moved by an eighth of a chunk at most to where a paragraph or a sentence begins.

    >>> chunk_bounds(10, body_length=4)
    [(0, 4), (4, 7), (7, 10)]
    >>> chunk_bounds(10, body_length=4, overlap=1)
    [(0, 4), (3, 7), (6, 10)]
    >>> chunk_bounds(0, body_length=4)
    [(0, 0)]
    """
    if num_tokens <= body_length:
        return [(0, num_tokens)]
    stride, span = body_length - overlap, num_tokens - overlap
    num_chunks = -(-span // stride)
    reach = body_length // 8
    starts = [0]
    for num_left in range(num_chunks - 1, 0, -1):
        even = starts[-1] - (starts[-1] - span) // (num_left + 1)
        low = max(span - num_left * stride, starts[-1] + 1, even - reach)
        high = min(starts[-1] + stride, even + reach)
        starts.append(even if breaks is None else _best_start(breaks, low, even, high))
    return [(start, end + overlap) for start, end in zip(starts, [*starts[1:], span], strict=True)]


def _best_start(breaks: np.ndarray, low: int, even: int, high: int) -> int:
    """The break in [low, high] worth its distance from `even`; `even` itself where there is none."""
    at = low + np.flatnonzero(breaks[low : high + 1])
    if len(at) == 0:
        return even
    cost = np.abs(at - even) / max(high - low, 1) * 2 - breaks[at]
    return int(at[cost.argmin()])


def num_chunks_of(num_tokens: np.ndarray, body_length: int, overlap: int = 0) -> np.ndarray:
    """How many chunks `chunk_bounds` makes of documents of so many tokens."""
    over = num_tokens > body_length
    return np.where(over, -(-(num_tokens - overlap) // (body_length - overlap)), 1)


def chunk_sizes(
    num_tokens: np.ndarray, chunk_length: int, overlap: int, max_chunks: int, num_special: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each document with so many tokens: how many chunks are read, and the mean tokens of one, special ones included.

    >>> chunk_sizes(np.array([3, 10]), chunk_length=6, overlap=0, max_chunks=2, num_special=2)
    (array([1, 2]), array([5.        , 5.33333333]))
    """
    body_length = chunk_length - num_special
    chunks = num_chunks_of(num_tokens, body_length, overlap)
    return np.minimum(chunks, max_chunks), (num_tokens + overlap * (chunks - 1)) / chunks + num_special


def select_chunks(num_chunks: int, max_chunks: int, policy: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Which chunks of a document are read: sorted indices, at most `max_chunks`.

    `random` draws from `rng`; without one (in evaluation) it is `uniform`.

    >>> select_chunks(10, 4, "head_tail").tolist(), select_chunks(10, 4, "uniform").tolist()
    ([0, 1, 8, 9], [0, 3, 6, 9])
    """
    if num_chunks <= max_chunks:
        return np.arange(num_chunks)
    if policy == "head":
        return np.arange(max_chunks)
    if policy == "head_tail":
        head = -(-max_chunks // 2)
        return np.concatenate([np.arange(head), np.arange(num_chunks - (max_chunks - head), num_chunks)])
    if policy == "random" and rng is not None:
        return np.sort(rng.choice(num_chunks, max_chunks, replace=False))
    return np.linspace(0, num_chunks - 1, max_chunks).round().astype(int)


def coverage(num_tokens: Sequence[int] | np.ndarray, body_length: int, overlap: int, max_chunks: int) -> dict[str, Any]:
    """What `max_chunks` leaves unread, with a document's chunks taken as equally long.

    Returns:
        documents, documents_cut (number and share), tokens, tokens_cut (number and share), most_chunks.
    """
    tokens = np.asarray(num_tokens, dtype=np.int64)
    chunks = num_chunks_of(tokens, body_length, overlap)
    cut = np.maximum(chunks - max_chunks, 0)
    tokens_cut = int((tokens * cut / chunks).sum())
    return {
        "documents": len(tokens),
        "documents_cut": int((cut > 0).sum()),
        "documents_cut_share": float((cut > 0).mean()) if len(tokens) else 0.0,
        "tokens": int(tokens.sum()),
        "tokens_cut": tokens_cut,
        "tokens_cut_share": tokens_cut / max(int(tokens.sum()), 1),
        "most_chunks": int(chunks.max(initial=0)),
    }


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
        prefix, suffix = special_token_frame(tokenizer)
        self.prefix, self.suffix = np.array(prefix, dtype=np.int64), np.array(suffix, dtype=np.int64)
        self.body_length = chunk_length - len(prefix) - len(suffix)
        # A chunk without a token cannot be encoded: where no special token fills an empty document, padding does.
        self.filler = np.array([] if prefix or suffix else [tokenizer.pad_token_id], dtype=np.int64)
        if self.body_length <= chunk_overlap:
            raise ValueError(
                f"chunk_overlap ({chunk_overlap}) must be below chunk_length minus the special tokens "
                f"({self.body_length}): lower it or raise chunk_length."
            )
        self.chunk_overlap, self.max_chunks, self.chunk_policy = chunk_overlap, max_chunks, chunk_policy
        self.training, self.seed, self.epoch = training, seed, 0

    def __len__(self) -> int:
        return len(self.documents)

    def set_epoch(self, epoch: int) -> None:
        """Draw the chunks of this epoch from now on."""
        self.epoch = epoch

    def bounds(self, index: int) -> list[tuple[int, int]]:
        """All chunks of a document, read or not, in flat tokens."""
        document = self.documents[index]
        breaks = document["token_break"]
        return chunk_bounds(len(document["input_ids"]), self.body_length, self.chunk_overlap, breaks)

    def selection(self, index: int, num_chunks: int) -> np.ndarray:
        """Which of a document's chunks are read in this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch, index]) if self.training else None
        return select_chunks(num_chunks, self.max_chunks, self.chunk_policy, rng)

    def __getitem__(self, index: int) -> dict[str, Any]:
        document = self.documents[index]
        tokens = document["input_ids"]
        bounds = chunk_bounds(len(tokens), self.body_length, self.chunk_overlap, document["token_break"])
        chunks = [self._frame(tokens[slice(*bounds[i])]) for i in self.selection(index, len(bounds))]
        return {"labels": int(document["label"]), "input_ids": chunks, "id": str(document["id"])}

    def _frame(self, body: np.ndarray) -> np.ndarray:
        body = body if len(body) else self.filler
        return np.concatenate([self.prefix, body, self.suffix])


class ChunkVectorDocuments(Dataset):
    """As `ChunkedDocuments`, with `chunk_vectors` (C, D) that a frozen encoder made before, in place of token ids.

    Args:
        chunked: the documents that the vectors were made of, for their labels and their selection of chunks.
        vectors: an Arrow table with a row a document: `chunk_vectors`, flat float32 of all its C × D numbers.
    """

    def __init__(self, chunked: ChunkedDocuments, vectors: Any, hidden_size: int):
        self.chunked, self.hidden_size = chunked, hidden_size
        self.labels = np.asarray(chunked.documents["label"], dtype=np.int64).tolist()
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
        return torch.tensor(self._all_of(index)).mean(dim=0)

    def _all_of(self, index: int) -> np.ndarray:
        return self.numbers[self.part[index]][self.start[index] : self.end[index]].reshape(-1, self.hidden_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        vectors = self._all_of(index)
        chosen = self.chunked.selection(index, len(vectors))
        return {"labels": self.labels[index], "chunk_vectors": torch.from_numpy(vectors[chosen])}
