"""Text → tokens with character offsets → chunks, and coverage statistics.

A document is tokenized once, without special tokens, into a flat sequence of ids. Chunks are cut from it when it is
read, so the geometry can change without retokenizing. Each chunk gets its own special tokens and prefix.
Pushed to the hub with the model, and part of an export to ONNX: imports nothing else from the project, nor torch.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the chunks that the policy `lexical` selects, the share that is spread over the document, whatever its words say.
SPREAD_SHARE = 0.25
# Chunks preferably start at a paragraph (2), else at a sentence or line (1). Of the sentence's patterns each begins with a
# literal, which `re` finds many times as fast as one of a set.
PARAGRAPH = re.compile(r"\n[^\S\n]*\n\s*")
CLOSING = r"[\"'”’»)\]]*\s+"
SENTENCES = [
    *(re.compile(re.escape(mark) + CLOSING) for mark in ".!?…"),
    *(re.compile(f"{mark}(?:{CLOSING})?") for mark in "。！？"),
    re.compile(r"\n\s*"),
]


def nfc_with_offsets(text: str) -> tuple[str, np.ndarray, np.ndarray]:
    """Text in Unicode NFC, as in training, with the start and end of each character in the original text.

    >>> nfc_with_offsets("e\\u0301t")[1:]
    (array([0, 2]), array([2, 3]))
    """
    if unicodedata.is_normalized("NFC", text):
        offsets = np.arange(len(text) + 1)
        return text, offsets[:-1], offsets[1:]
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []

    def add(start: int, end: int) -> None:
        piece = unicodedata.normalize("NFC", text[start:end])
        pieces.append(piece)
        starts.extend([start] * len(piece))
        ends.extend([end] * len(piece))

    start = 0
    for index in range(1, len(text)):
        character = text[index]
        if unicodedata.combining(character):
            continue
        if character >= "\u0300":
            # Keep a character that composes with the preceding ones (Hangul, some Indic vowels) in the same piece.
            separate = [unicodedata.normalize("NFC", part) for part in (text[start:index], character)]
            if unicodedata.normalize("NFC", text[start : index + 1]) != "".join(separate):
                continue
        add(start, index)
        start = index
    add(start, len(text))
    return "".join(pieces), np.array(starts), np.array(ends)


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without leading and trailing whitespace."""
    body = text[start:end]
    start += len(body) - len(body.lstrip())
    return start, start + len(body.strip())


def evidence_spans(
    text: str, spans: Sequence[tuple[int, int]], attributions: Sequence[float], number: int
) -> list[dict[str, Any]]:
    """The `number` chunks with the highest attributions, highest first: `{"start", "end", "score", "text"}` without
    surrounding whitespace. All but the first must have a positive one.
    """
    order = sorted(range(len(spans)), key=lambda i: -attributions[i])[:number]
    shown = [i for rank, i in enumerate(order) if rank == 0 or attributions[i] > 0]
    parts = [(*trimmed(text, *spans[i]), attributions[i]) for i in shown]
    return [
        {"start": start, "end": end, "score": score, "text": text[start:end]}
        for start, end, score in parts
        if start < end
    ]


def unlimited_backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """The Rust tokenizer, which neither truncates nor pads. To be called once before threads use it."""
    backend = tokenizer.backend_tokenizer
    # Some tokenizer files enable both, which would silently truncate a text at 128 tokens.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def tokenize_batch(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Tokenize texts without special tokens, on one core; threads may do so at once.

    Returns:
        For each text: `input_ids`, `token_start` and `token_end` (character offsets, end exclusive), and `token_break`
        (2 if a paragraph starts at the token, 1 if a sentence or line does, else 0).
    """
    backend = unlimited_backend(tokenizer)
    columns: dict[str, list[np.ndarray]] = {"input_ids": [], "token_start": [], "token_end": [], "token_break": []}
    for text in texts:
        # One at a time: an encoding is ten times the size of the arrays. `encode` would keep other threads waiting.
        [encoding] = backend.encode_batch([text], add_special_tokens=False)
        # fromiter over flat values is twice as fast as np.array of pairs; this is half of the time outside the tokenizer.
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32, 2 * len(encoding)).reshape(-1, 2)
        row = np.array(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1], token_breaks(text, offsets[:, 1])
        for column, values in zip(columns.values(), row, strict=True):
            column.append(values)
    return columns


def token_breaks(text: str, token_end: np.ndarray) -> np.ndarray:
    """int8 per token: 2 if a paragraph starts at it, 1 if a sentence or line does, else 0."""
    breaks = np.zeros(len(token_end) + 1, dtype=np.int8)
    for level, patterns in ((1, SENTENCES), (2, [PARAGRAPH])):
        positions = [match.end() for pattern in patterns for match in pattern.finditer(text)]
        breaks[np.searchsorted(token_end, positions, side="right")] = level
    breaks[:1] = 0
    return breaks[:-1]


def special_token_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer adds before and after a text, `([0], [2])` for RoBERTa."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = encoding["input_ids"], encoding["special_tokens_mask"]
    return ids[: is_special.index(0)], ids[len(ids) - is_special[::-1].index(0) :]


class Chunker:
    """Cut a document's flat tokens into chunks with special tokens and, after the leading ones, those of `chunk_prefix`.

    Spaces at the end of `chunk_prefix` are left out: the tokens of a text bring their own (but for the first of a line in
    byte-level BPE).

    Raises:
        ValueError: `chunk_prefix` leaves no room for text, or `chunk_overlap` none for new tokens.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", chunk_length: int, chunk_overlap: int = 0, chunk_prefix: str = ""
    ):
        prefix, suffix = special_token_frame(tokenizer)
        prefix += tokenizer(chunk_prefix.rstrip(" "), add_special_tokens=False)["input_ids"]
        self.prefix, self.suffix = np.array(prefix, dtype=np.int64), np.array(suffix, dtype=np.int64)
        self.body_length, self.chunk_overlap = chunk_length - len(prefix) - len(suffix), chunk_overlap
        # A chunk needs at least one token: without special tokens an empty document gets a padding token.
        self.filler = np.array([] if prefix or suffix else [tokenizer.pad_token_id], dtype=np.int64)
        if chunk_prefix and self.body_length < 1:
            raise ValueError(
                f"`chunk_prefix` and the special tokens are {len(prefix) + len(suffix)} tokens, which leaves no room for "
                f"text in a chunk of {chunk_length}: shorten `chunk_prefix` or raise `chunk_length`."
            )
        if self.body_length <= chunk_overlap:
            taken = "special tokens and `chunk_prefix`" if chunk_prefix else "special tokens"
            raise ValueError(
                f"`chunk_overlap` ({chunk_overlap}) must be below `chunk_length` minus the {taken} "
                f"({self.body_length}): lower it or raise `chunk_length`."
            )

    def spans(self, num_tokens: int, breaks: np.ndarray | None = None) -> list[tuple[int, int]]:
        """Start and end of each chunk of a document (see `chunk_bounds`)."""
        return chunk_bounds(num_tokens, self.body_length, self.chunk_overlap, breaks)

    def with_special_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Add the special tokens and the prefix to a chunk's tokens."""
        return np.concatenate([self.prefix, tokens if len(tokens) else self.filler, self.suffix])


def chunk_bounds(
    num_tokens: int, body_length: int, overlap: int = 0, breaks: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Start and end (exclusive) of each chunk of a document, in flat tokens.

    Uses as few chunks as possible, of nearly equal length, none longer than `body_length`. Each starts `overlap` tokens
    before the end of the previous one, moved by at most an eighth of a chunk to the start of a paragraph or sentence.

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
    """The best break in [low, high], trading its level against its distance from `even`; `even` if there is none."""
    positions = low + np.flatnonzero(breaks[low : high + 1])
    if len(positions) == 0:
        return even
    cost = np.abs(positions - even) / max(high - low, 1) * 2 - breaks[positions]
    return int(positions[cost.argmin()])


def num_chunks_of(num_tokens: np.ndarray, body_length: int, overlap: int = 0) -> np.ndarray:
    """Number of chunks that `chunk_bounds` returns for each number of tokens."""
    over = num_tokens > body_length
    return np.where(over, -(-(num_tokens - overlap) // (body_length - overlap)), 1)


def chunk_sizes(
    num_tokens: np.ndarray, chunk_length: int, overlap: int, max_chunks: int, num_special: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks read of each document, and their mean tokens, special tokens included.

    >>> chunk_sizes(np.array([3, 10]), chunk_length=6, overlap=0, max_chunks=2, num_special=2)
    (array([1, 2]), array([5.        , 5.33333333]))
    """
    body_length = chunk_length - num_special
    chunks = num_chunks_of(num_tokens, body_length, overlap)
    return np.minimum(chunks, max_chunks), (num_tokens + overlap * (chunks - 1)) / chunks + num_special


def select_chunks(num_chunks: int, max_chunks: int, policy: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Sorted indices of the chunks to read, at most `max_chunks`, by their positions (for `lexical` see `LexicalFeatures.select`).

    `random` samples with `rng`; without one (in evaluation) it is `uniform`.

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
    return evenly_spaced(num_chunks, max_chunks)


def select_telling_chunks(logits_CK: np.ndarray, max_chunks: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Sorted indices of the chunks that the policy `lexical` selects, of more than `max_chunks` (see `LexicalFeatures.select`).

    Args:
        logits_CK: logits of the K classes by each chunk's own lexical features.
        rng: draws the chunks that are spread over the rest; without one (in evaluation) they are evenly spaced.
    """
    logits_CK = logits_CK - logits_CK.mean(axis=1, keepdims=True)
    num_chunks, num_spread = len(logits_CK), int(max_chunks * SPREAD_SHARE)
    # Each class's most telling chunk, then each class's second, …; in each round those that tell most come first.
    order_CK = np.argsort(-logits_CK, axis=0, kind="stable")
    turns_CK = np.argsort(-np.take_along_axis(logits_CK, order_CK, axis=0), axis=1, kind="stable")
    order_CK = np.take_along_axis(order_CK, turns_CK, axis=1)
    chosen = list(dict.fromkeys(order_CK.ravel().tolist()))[: max_chunks - num_spread]
    others = np.setdiff1d(np.arange(num_chunks), chosen)
    spread = evenly_spaced(len(others), num_spread)
    if rng is not None:
        spread = rng.choice(len(others), num_spread, replace=False)
    return np.sort(np.concatenate([chosen, others[spread]]))


def evenly_spaced(num_chunks: int, count: int) -> np.ndarray:
    """Indices of `count` evenly spaced chunks, the first and the last among them."""
    return np.linspace(0, num_chunks - 1, count).round().astype(int)


def coverage(num_tokens: Sequence[int] | np.ndarray, body_length: int, overlap: int, max_chunks: int) -> dict[str, Any]:
    """Statistics of the text beyond `max_chunks`, assuming chunks of equal length.

    Returns:
        `documents`, `documents_cut`, `documents_cut_share`, `tokens`, `tokens_cut`, `tokens_cut_share`, `most_chunks`.
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


def chunks_of_text(
    text: str, tokenizer: "PreTrainedTokenizerBase", chunker: Chunker
) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """The chunks of a text, as tokens without special ones (int64), and their character spans in it.

    Raises:
        ValueError: no text, or one with an unpaired surrogate.
    """
    if not isinstance(text, str):
        raise ValueError(f"Expected a text, got {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text contains an unpaired surrogate ({text[error.start]!a} at character {error.start}): decode "
            "its source with errors='replace'."
        ) from error
    clean, starts, ends = nfc_with_offsets(text)
    [tokens], [first], [last], [breaks] = tokenize_batch([clean], tokenizer).values()
    bounds = chunker.spans(len(tokens), breaks)
    chunks = [tokens[slice(*span)].astype(np.int64) for span in bounds]
    if not len(tokens):
        return chunks, [(0, 0)] * len(chunks)
    # RoBERTa's token of a space at the end of the text begins after it.
    first = np.minimum(first, len(starts) - 1)
    return chunks, [(int(starts[first[a]]), int(ends[max(last[b - 1], 1) - 1])) for a, b in bounds]
