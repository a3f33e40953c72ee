"""What the model read, and which chunks and sentences its rating stands on.

B documents, C chunks of a document that were read, L tokens, D hidden, K labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.chunk_attribution import leave_one_out_attributions
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.pipeline import batches_by_tokens
from modeling.hierarchical_roberta.precision import full_precision
from modeling.token_attribution import token_attributions

# Token attributions are made of so many chunks, those that contribute most.
EXPLAINED_CHUNKS = 3


@dataclass
class Sentence:
    """A sentence of an explained chunk: characters of the text, flat tokens, and what it adds to the log-odds."""

    chunk: int
    start: int
    end: int
    first_token: int
    end_token: int
    score: float
    words: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class DocumentResult:
    """A document as the model read it.

    Attributes:
        bounds: all chunks in flat tokens, read or not; `read` which of them were.
        spans: the same in characters of the text.
        contributions: (C,) of the predicted label.
        sentences: of the explained chunks, strongest first.
    """

    index: int
    logits_K: torch.Tensor
    chunk_CD: torch.Tensor
    weights_C: torch.Tensor
    read: list[int]
    bounds: list[tuple[int, int]]
    spans: list[tuple[int, int]]
    contributions: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sentences: list[Sentence] = field(default_factory=list)

    @property
    def predicted(self) -> int:
        return int(self.logits_K.argmax())

    @property
    def truncated(self) -> bool:
        return len(self.read) < len(self.bounds)

    def strongest(self, number: int = 1) -> list[int]:
        """The chunks that contribute most, as places among those read."""
        return np.argsort(-self.contributions, kind="stable")[:number].tolist()

    def span_of(self, place: int) -> tuple[int, int]:
        """Characters of a chunk that was read."""
        return self.spans[self.read[place]]


@torch.no_grad()
def read_documents(
    model: HierarchicalRobertaForSequenceClassification, chunked: ChunkedDocuments, collator: DocumentCollator
) -> Iterator[DocumentResult]:
    """Every document of a split, in its order, in fp32."""
    items = ({**chunked[index], "index": index} for index in range(len(chunked)))
    for batch in batches_by_tokens(items, 8 * model.encoder_batch_size()[0]):
        inputs = send_to_device(collator(batch), model.device)
        del inputs["labels"]
        with full_precision(model.device):
            output = model(**inputs)
        counts = [len(lengths) for lengths in inputs["chunk_lengths"]]
        # On the host: a split's embeddings may be more than a device holds beside the model.
        values = [value.cpu() for value in (output.logits, output.chunk_features, output.chunk_weights)]
        parts = (values[0], values[1].split(counts), values[2].split(counts))
        for item, logits_K, chunk_CD, weights_C in zip(batch, *parts, strict=True):
            bounds, spans = spans_of(chunked, item["index"])
            read = chunked.selection(item["index"], len(bounds)).tolist()
            yield DocumentResult(item["index"], logits_K, chunk_CD, weights_C, read, bounds, spans)


def spans_of(chunked: ChunkedDocuments, index: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All chunks of a document, in flat tokens and in characters (0 to 0 for an empty text, and where the characters are
    not known, as in the older tensors)."""
    row = chunked.documents.with_format("numpy", columns=["input_ids", "token_start", "token_end", "token_break"])[
        index
    ]
    bounds = chunked.chunker.spans(len(row["input_ids"]), row["token_break"])
    if len(row["input_ids"]) == 0 or row["token_start"][0] < 0:
        return bounds, [(0, 0)] * len(bounds)
    return bounds, [(int(row["token_start"][a]), int(row["token_end"][b - 1])) for a, b in bounds]


def explain_chunks(model: HierarchicalRobertaForSequenceClassification, readings: list[DocumentResult]) -> None:
    """Fill in the contributions of each document's chunks to its predicted label."""
    for reading in readings:
        reading.contributions = leave_one_out_attributions(model, reading.chunk_CD, reading.predicted).cpu().numpy()


def explain_sentences(
    model: HierarchicalRobertaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    chunked: ChunkedDocuments,
    readings: list[DocumentResult],
) -> None:
    """Fill in the sentences of each document's strongest chunks, by token attributions summed to words and sentences."""
    blank = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.pad_token_id
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    documents = chunked.documents.with_format(
        "numpy", columns=["input_ids", "token_start", "token_end", "token_break", "text"]
    )
    for reading in readings:
        reading.sentences = []
        row = documents[reading.index]
        found: list[Sentence] = []
        for place in reading.strongest(EXPLAINED_CHUNKS) if len(row["input_ids"]) else []:
            first, end = reading.bounds[reading.read[place]]
            ids_L = torch.from_numpy(chunked.chunker.with_special_tokens(row["input_ids"][first:end])).to(model.device)
            blank_L = ids_L.clone()
            before = len(chunked.chunker.prefix)
            blank_L[before : before + end - first] = blank
            scores_L = token_attributions(model, ids_L, blank_L, reading.chunk_CD, place, reading.predicted)
            scores = scores_L[before : before + end - first].cpu().numpy()
            found += sentences_of(row, first, end, scores, place)
        # Chunks that overlap share sentences: each counts once, where it is strongest.
        found.sort(key=lambda sentence: -sentence.score)
        seen: set[tuple[int, int]] = set()
        for sentence in found:
            if not any(sentence.start < end and start < sentence.end for start, end in seen):
                seen.add((sentence.start, sentence.end))
                reading.sentences.append(sentence)
    for parameter in parameters:
        parameter.requires_grad_(True)


def sentences_of(row: dict[str, Any], first: int, end: int, scores: np.ndarray, chunk: int) -> list[Sentence]:
    """The sentences of a chunk, each with the sum of its tokens' scores and its words with theirs. Tokens between two
    sentences that stand for white space belong to the one before."""
    breaks = np.flatnonzero(row["token_break"][first:end] > 0)
    starts = [0, *(int(start) for start in breaks if start > 0)]
    sentences: list[Sentence] = []
    for start, stop in zip(starts, [*starts[1:], end - first], strict=True):
        words = words_of(row, first + start, first + stop, scores[start:stop])
        score = float(scores[start:stop].sum())
        if words:
            tokens = (first + start if sentences else first, first + stop)
            sentences.append(Sentence(chunk, words[0]["start"], words[-1]["end"], *tokens, score, words))
        elif sentences:
            sentences[-1].end_token, sentences[-1].score = first + stop, sentences[-1].score + score
    return sentences


def words_of(row: dict[str, Any], first: int, end: int, scores: np.ndarray) -> list[dict[str, Any]]:
    """Tokens joined to words: one begins after white space, whose own tokens count with the word beside them."""
    text = str(row["text"])
    words: list[dict[str, Any]] = []
    carried = 0.0
    for place, score in zip(range(first, end), scores.tolist(), strict=True):
        start, stop = int(row["token_start"][place]), int(row["token_end"][place])
        # Some tokenizers count the space before a word as its own.
        start += len(text[start:stop]) - len(text[start:stop].lstrip())
        if start == stop and words:
            words[-1]["score"] += score
        elif start == stop:
            carried += score
        elif words and start <= words[-1]["end"]:
            words[-1] |= {"end": stop, "score": words[-1]["score"] + score}
        else:
            words.append({"start": start, "end": stop, "score": score + carried})
            carried = 0.0
    return words
