"""Predictions with the attributions of their chunks and sentences.

B documents, C chunks of a document that the model read, L tokens, D hidden, K labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.chunk_attribution import attributions_of_labels
from modeling.hierarchical_roberta.decision import decision_of
from modeling.hierarchical_roberta.encoder_batches import batches_by_tokens
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.precision import full_precision
from modeling.hierarchical_roberta.results import explained_labels
from modeling.token_attribution import token_attributions

# Number of chunks per document, the strongest ones, that get token attributions.
EXPLAINED_CHUNKS = 3
# Of several labels that a document got, those with the highest scores are explained.
EXPLAINED_LABELS = 10


@dataclass
class Sentence:
    """A sentence of an explained chunk.

    Attributes:
        chunk: index of the chunk among those read.
        start: first character in the text; `end` is exclusive.
        first_token: index in the document's tokens; `end_token` is exclusive.
        score: contribution to the log-odds of the predicted label.
        words: `{"start", "end", "score"}` of each word.
    """

    chunk: int
    start: int
    end: int
    first_token: int
    end_token: int
    score: float
    words: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class DocumentResult:
    """Prediction and explanation of one document, for one label.

    Attributes:
        predicted: class id that the model decides for; with several labels a document, the one that is explained.
        decided: ids of all labels that the model decides for, those with the highest scores first.
        read: indices of the chunks that the encoder read.
        input_ids: their tokens, with special tokens.
        rest_M: counts of the lexical features in the other chunks, with the chunk policy `lexical`.
        bounds: token span of every chunk in the document's tokens, including those not read.
        spans: character span of every chunk.
        contributions: (C,) leave-one-out contributions to the predicted label.
        sentences: sentences of the explained chunks, strongest first.
    """

    index: int
    predicted: int
    decided: list[int]
    logits_K: torch.Tensor
    chunk_CD: torch.Tensor
    weights_C: torch.Tensor
    read: list[int]
    bounds: list[tuple[int, int]]
    spans: list[tuple[int, int]]
    input_ids: list[np.ndarray]
    rest_M: torch.Tensor | None = None
    contributions: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sentences: list[Sentence] = field(default_factory=list)

    @property
    def truncated(self) -> bool:
        """Whether a part of the document was neither encoded nor counted."""
        return self.rest_M is None and len(self.read) < len(self.bounds)

    def chunk_counts(self, model: HierarchicalRobertaForSequenceClassification) -> torch.Tensor | None:
        """Counts of the lexical features in the encoded chunks, (C, M); None if the model has none."""
        if model.lexical is None:
            return None
        return model.lexical.count_chunks(self.input_ids, model.config.num_prefix_tokens)

    def document_counts(self, model: HierarchicalRobertaForSequenceClassification) -> torch.Tensor | None:
        """Counts of the lexical features in the whole document, as far as it is read, (M,); None if the model has none."""
        if (count_CM := self.chunk_counts(model)) is None:
            return None
        count_M = count_CM.sum(dim=0)
        return count_M if self.rest_M is None else count_M + self.rest_M.to(count_M)

    def by_label(self) -> list["DocumentResult"]:
        """The document once for each label that it got, at most `EXPLAINED_LABELS`; if it got none, for the likeliest one."""
        labels = self.decided[:EXPLAINED_LABELS] or [self.predicted]
        return [self, *(replace(self, predicted=label) for label in labels[1:])]

    def strongest(self, number: int = 1) -> list[int]:
        """The chunks that contribute most, as indices into `read`."""
        return np.argsort(-self.contributions, kind="stable")[:number].tolist()

    def span_of(self, position: int) -> tuple[int, int]:
        """Character span of the chunk at `position` in `read`."""
        return self.spans[self.read[position]]


@torch.no_grad()
def read_documents(
    model: HierarchicalRobertaForSequenceClassification, chunked: ChunkedDocuments, collator: DocumentCollator
) -> Iterator[DocumentResult]:
    """Predict every document of a split in fp32, in order."""
    decision = decision_of(model.config)
    items = ({**chunked[index], "index": index} for index in range(len(chunked)))
    for batch in batches_by_tokens(items, 8 * model.encoder_batch_size()[0]):
        inputs = send_to_device(collator(batch), model.device)
        del inputs["labels"]
        with full_precision(model.device):
            output = model(**inputs)
        counts = [len(lengths) for lengths in inputs["chunk_lengths"]]
        # On the CPU: the embeddings of a split may not fit on the device.
        values = [value.cpu() for value in (output.logits, output.chunk_vectors, output.chunk_weights)]
        parts = (values[0], values[1].split(counts), values[2].split(counts))
        for item, logits_K, chunk_CD, weights_C in zip(batch, *parts, strict=True):
            decided = decision.labels_of(logits_K.numpy())
            bounds, spans = spans_of(chunked, item["index"])
            read, rest = item["selected"].tolist(), item.get("rest_counts")
            yield DocumentResult(
                item["index"],
                explained_labels(decision, logits_K.numpy())[0],
                decided,
                logits_K,
                chunk_CD,
                weights_C,
                read,
                bounds,
                spans,
                item["input_ids"],
                None if rest is None else torch.from_numpy(rest),
            )


def spans_of(chunked: ChunkedDocuments, index: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Token and character spans of all chunks of a document. Character spans are (0, 0) for an empty text and for
    legacy tensors, which have no offsets."""
    row = chunked.documents.with_format("numpy", columns=["input_ids", "token_start", "token_end", "token_break"])[
        index
    ]
    bounds = chunked.chunker.spans(len(row["input_ids"]), row["token_break"])
    if len(row["input_ids"]) == 0 or row["token_start"][0] < 0:
        return bounds, [(0, 0)] * len(bounds)
    return bounds, [(int(row["token_start"][a]), int(row["token_end"][b - 1])) for a, b in bounds]


def explain_chunks(model: HierarchicalRobertaForSequenceClassification, results: list[DocumentResult]) -> None:
    """Set `contributions` of each result, to its predicted label; those of a document, side by side, at the cost of one."""
    for _, group in groupby(results, key=lambda result: result.index):
        first, *others = group
        labels = [result.predicted for result in (first, *others)]
        counts = (first.chunk_counts(model), first.rest_M)
        attribution_EC = attributions_of_labels(model, first.chunk_CD, labels, *counts).cpu().numpy()
        for result, attribution_C in zip((first, *others), attribution_EC, strict=True):
            result.contributions = attribution_C


def explain_sentences(
    model: HierarchicalRobertaForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    chunked: ChunkedDocuments,
    results: list[DocumentResult],
) -> None:
    """Set `sentences` of each result: token attributions of its strongest chunks, summed over words and sentences."""
    mask_id = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.pad_token_id
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    documents = chunked.documents.with_format(
        "numpy", columns=["input_ids", "token_start", "token_end", "token_break", "text"]
    )
    for result in results:
        result.sentences = []
        row = documents[result.index]
        candidates: list[Sentence] = []
        count_M = result.document_counts(model)
        for position in result.strongest(EXPLAINED_CHUNKS) if len(row["input_ids"]) else []:
            first, end = result.bounds[result.read[position]]
            ids_L = torch.from_numpy(result.input_ids[position]).to(model.device)
            baseline_L = ids_L.clone()
            before = len(chunked.chunker.prefix)
            baseline_L[before : before + end - first] = mask_id
            scores_L = token_attributions(
                model, ids_L, baseline_L, result.chunk_CD, position, result.predicted, count_M
            )
            scores = scores_L[before : before + end - first].cpu().numpy()
            candidates += sentences_of(row, first, end, scores, position)
        # Overlapping chunks share sentences: keep each once, where it is strongest.
        candidates.sort(key=lambda sentence: -sentence.score)
        seen: set[tuple[int, int]] = set()
        for sentence in candidates:
            if not any(sentence.start < end and start < sentence.end for start, end in seen):
                seen.add((sentence.start, sentence.end))
                result.sentences.append(sentence)
    for parameter in parameters:
        parameter.requires_grad_(True)


def sentences_of(row: dict[str, Any], first: int, end: int, scores: np.ndarray, chunk: int) -> list[Sentence]:
    """Sentences of a chunk, with scores summed over their tokens and words. Whitespace tokens between two sentences
    count towards the first."""
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
    """Merge tokens into whitespace-separated words; whitespace tokens count towards the adjacent word."""
    text = str(row["text"])
    words: list[dict[str, Any]] = []
    carried = 0.0
    for position, score in zip(range(first, end), scores.tolist(), strict=True):
        start, stop = int(row["token_start"][position]), int(row["token_end"][position])
        # Some tokenizers include the preceding space in a word's offsets.
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
