"""Faithfulness of explanations: deletion and insertion curves, and the pointing game against gold evidence.

C chunks of a document, S perturbed variants of it, O orders of deletion, U distinct subsets of chunks, K labels.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.chunk_attribution import log_odds, logits_of_subsets
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.precision import full_precision
from scripts.evaluation.explanations import DocumentResult

SHARES = np.arange(0, 1.0, 0.1)
RANDOM_ORDERS = 5
SENTENCES = 5
# Maximum number of documents for sentence curves, which re-encode every variant.
DOCUMENTS = 50


def chunk_curves(
    model: HierarchicalRobertaForSequenceClassification, results: list[DocumentResult], seed: int = 0
) -> dict[str, Any]:
    """Deletion and insertion curves over chunks (Petsiuk et al. 2018): mean probability of the predicted label as
    chunks are removed, or as only they are kept, strongest first and in random order, at each share of the document's
    chunks; and the mean of each curve.

    Documents with a single chunk are skipped.
    """
    rng = np.random.default_rng(seed)
    curves: dict[str, list[np.ndarray]] = {}
    for result in results:
        count = len(result.chunk_CD)
        if count < 2:
            continue
        orders = [np.argsort(-result.contributions, kind="stable")]
        orders += [rng.permutation(count) for _ in range(RANDOM_ORDERS)]
        place_O1C = np.argsort(orders, axis=1)[:, None]
        number_S1 = np.minimum(np.round(SHARES * count), count - 1)[:, None]
        kept_2OSC = np.stack([place_O1C >= number_S1, place_O1C < np.maximum(number_S1, 1)])
        # Orders share many subsets, for a few chunks most of them.
        kept_UC, subset = np.unique(kept_2OSC.reshape(-1, count), axis=0, return_inverse=True)
        counts = (result.chunk_counts(model), result.rest_M)
        logits_UK = logits_of_subsets(model, result.chunk_CD, torch.from_numpy(kept_UC), *counts)
        p_U = log_odds(logits_UK, result.predicted, model.config.is_multi_label).sigmoid().cpu().numpy()
        for kind, p_OS in zip(("deletion", "insertion"), p_U[subset].reshape(kept_2OSC.shape[:3]), strict=True):
            curves.setdefault(kind, []).append(p_OS[0])
            curves.setdefault(f"{kind}_random", []).append(p_OS[1:].mean(axis=0))
    return summary(curves, SHARES.tolist())


def sentence_curves(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    results: list[DocumentResult],
    seed: int = 0,
) -> dict[str, Any]:
    """As `chunk_curves`, for 0 to 5 sentences of the explained chunks, which are re-encoded for every variant."""
    rng = np.random.default_rng(seed)
    curves: dict[str, list[np.ndarray]] = {}
    explained = [result for result in results if len(result.sentences) > 1]
    for result in explained[:DOCUMENTS]:
        count = len(result.sentences)
        orders = {"": np.arange(count), "_random": rng.permutation(count)}
        for name, order in orders.items():
            for kind in ("deletion", "insertion"):
                kept = [
                    set(order[number:].tolist() if kind == "deletion" else order[:number].tolist())
                    for number in range(min(SENTENCES, count) + 1)
                ]
                probabilities = _with_sentences(model, chunked, result, kept)
                # A document with fewer sentences keeps its last value.
                padding = (0, SENTENCES + 1 - len(probabilities))
                curves.setdefault(kind + name, []).append(np.pad(probabilities, padding, mode="edge"))
    return summary(curves, list(range(SENTENCES + 1)))


@torch.no_grad()
def _with_sentences(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    result: DocumentResult,
    kept: list[set[int]],
) -> np.ndarray:
    """Probability of the predicted label for each variant, (S,), with only the sentences in `kept` left in the
    explained chunks. A sentence is removed from every explained chunk that contains it; tokens outside all sentences (a
    partial sentence where chunks overlap) are kept."""
    tokens = chunked.documents[result.index]["input_ids"]
    explained = sorted({sentence.chunk for sentence in result.sentences})
    chunks = []
    for kept_sentences in kept:
        is_left = np.ones(len(tokens), dtype=bool)
        for number, sentence in enumerate(result.sentences):
            if number not in kept_sentences:
                is_left[sentence.first_token : sentence.end_token] = False
        for position in explained:
            chunk = slice(*result.bounds[result.read[position]])
            chunks.append(chunked.chunker.with_special_tokens(tokens[chunk][is_left[chunk]]))
    batch = DocumentCollator(chunked.tokenizer.pad_token_id)([{"input_ids": chunks}])
    with full_precision(model.device):
        vectors_ND = model.encode_chunks(*(batch[name].to(model.device) for name in ("input_ids", "attention_mask")))
    chunk_SCD = result.chunk_CD.to(model.device).expand(len(kept), -1, -1).clone()
    chunk_SCD[:, explained] = vectors_ND.reshape(len(kept), len(explained), -1).to(chunk_SCD.dtype)
    count_CM, count_M, count_SM = result.chunk_counts(model), result.document_counts(model), None
    if model.lexical is not None and count_CM is not None and count_M is not None:
        changed_NM = model.lexical.count_chunks(chunks, model.config.num_prefix_tokens)
        changed_SM = changed_NM.view(len(kept), len(explained), -1).sum(dim=1)
        count_SM = count_M - count_CM[explained].sum(dim=0) + changed_SM
    logits_SK, _ = model.classify(chunk_SCD.flatten(0, 1), [len(result.chunk_CD)] * len(kept), count_SM)
    return log_odds(logits_SK, result.predicted, model.config.is_multi_label).sigmoid().cpu().numpy()


def summary(curves: dict[str, list[np.ndarray]], at: list[float]) -> dict[str, Any]:
    """Mean curves over the documents and the mean of each curve (faithful explanations: low for deletion, high for
    insertion). Empty if there are no curves."""
    if not curves:
        return {}
    means = {name: np.mean(rows, axis=0) for name, rows in curves.items()}
    return {
        **{name: float(curve.mean()) for name, curve in means.items()},
        "documents": len(next(iter(curves.values()))),
        "curves": {"at": at, **{name: curve.tolist() for name, curve in means.items()}},
    }


def pointing_game(results: list[DocumentResult], evidence: list[str], names: Sequence[str]) -> dict[str, Any]:
    """Pointing game: share of the results with gold evidence whose top chunk, and whose top sentence, hits it, i.e. overlaps
    it by at least half of the shorter span.

    Args:
        results: of labels that were given correctly.
        evidence: per document, a JSON list of `{"start", "end"}` in characters, or "". Spans with a "label" count for that
            label only.
        names: label names in order.
    """
    chunks, sentences = [], []
    for result in results:
        spans = json.loads(evidence[result.index] or "[]")
        spans = [span for span in spans if span.get("label") in (None, names[result.predicted])]
        if not spans:
            continue
        chunks.append(any(_overlaps(result.span_of(result.strongest()[0]), span) for span in spans))
        if result.sentences:
            best = result.sentences[0]
            sentences.append(any(_overlaps((best.start, best.end), span) for span in spans))
    metrics: dict[str, Any] = {"documents": len(chunks)}
    if chunks:
        metrics["chunk"] = float(np.mean(chunks))
    if sentences:
        metrics["sentence"] = float(np.mean(sentences))
    return metrics


def _overlaps(span: tuple[int, int], evidence: dict[str, int]) -> bool:
    shared = min(span[1], evidence["end"]) - max(span[0], evidence["start"])
    return shared > 0 and 2 * shared >= min(span[1] - span[0], evidence["end"] - evidence["start"])
