"""Whether explanations are true: what is lost when the evidence goes, and whether it stands where it is known to stand.

C chunks of a document, S variants of it, K labels.
"""

import json
from typing import Any

import numpy as np
import torch

from data.chunk_dataset import ChunkedDocuments
from modeling.hierarchical_roberta.chunk_attribution import logits_of_subsets
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.hierarchical_roberta.precision import full_precision
from scripts.evaluation.explanations import DocumentResult

SHARES = np.arange(0, 1.0, 0.1)
RANDOM_ORDERS = 5
SENTENCES = 5
# Sentences are deleted from the text and encoded again, in so many documents at the most.
DOCUMENTS = 50


def chunk_curves(
    model: HierarchicalRobertaForSequenceClassification, readings: list[DocumentResult], seed: int = 0
) -> dict[str, Any]:
    """Mean probability of the predicted label while chunks are deleted, and while they alone are inserted, strongest
    first and at random, at each share of the document's chunks (Petsiuk et al. 2018); and the mean of each curve.

    Documents of one chunk have nothing to take away and are left out.
    """
    rng = np.random.default_rng(seed)
    curves: dict[str, list[np.ndarray]] = {}
    for reading in readings:
        count = len(reading.chunk_CD)
        if count < 2:
            continue
        orders = {"": [np.argsort(-reading.contributions, kind="stable")]}
        orders["_random"] = [rng.permutation(count) for _ in range(RANDOM_ORDERS)]
        for name, given in orders.items():
            deletion, insertion = [], []
            for order in given:
                gone = np.ones((len(SHARES), count), dtype=bool)
                there = np.zeros((len(SHARES), count), dtype=bool)
                for row, share in enumerate(SHARES):
                    number = min(round(share * count), count - 1)
                    gone[row, order[:number]] = False
                    there[row, order[: max(number, 1)]] = True
                kept_SC = torch.from_numpy(np.concatenate([gone, there]))
                p_S = logits_of_subsets(model, reading.chunk_CD, kept_SC).softmax(dim=1)[:, reading.predicted]
                deletion.append(p_S[: len(SHARES)].cpu().numpy())
                insertion.append(p_S[len(SHARES) :].cpu().numpy())
            curves.setdefault(f"deletion{name}", []).append(np.mean(deletion, axis=0))
            curves.setdefault(f"insertion{name}", []).append(np.mean(insertion, axis=0))
    return summary(curves, SHARES.tolist())


def sentence_curves(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    readings: list[DocumentResult],
    seed: int = 0,
) -> dict[str, Any]:
    """As `chunk_curves`, while 0 to 5 sentences of the explained chunks are deleted from the text, or alone left of them.
    The chunks are encoded again each time."""
    rng = np.random.default_rng(seed)
    curves: dict[str, list[np.ndarray]] = {}
    explained = [reading for reading in readings if len(reading.sentences) > 1]
    for reading in explained[:DOCUMENTS]:
        count = len(reading.sentences)
        orders = {"": np.arange(count), "_random": rng.permutation(count)}
        for name, order in orders.items():
            for kind in ("deletion", "insertion"):
                kept = [
                    set(order[number:].tolist() if kind == "deletion" else order[:number].tolist())
                    for number in range(min(SENTENCES, count) + 1)
                ]
                found = _with_sentences(model, chunked, reading, kept)
                # A document of few sentences stays where it was when the last of them had gone.
                curves.setdefault(kind + name, []).append(np.pad(found, (0, SENTENCES + 1 - len(found)), mode="edge"))
    return summary(curves, list(range(SENTENCES + 1)))


@torch.no_grad()
def _with_sentences(
    model: HierarchicalRobertaForSequenceClassification,
    chunked: ChunkedDocuments,
    reading: DocumentResult,
    kept: list[set[int]],
) -> np.ndarray:
    """Probability of the predicted label with only these sentences left in the explained chunks, for each variant. Tokens
    go with the sentence that they are in, from each of these chunks that has them; those in none (half a sentence, where
    chunks overlap) stay."""
    tokens = chunked.documents[reading.index]["input_ids"]
    explained = sorted({sentence.chunk for sentence in reading.sentences})
    chunks = []
    for those in kept:
        is_left = np.ones(len(tokens), dtype=bool)
        for number, sentence in enumerate(reading.sentences):
            if number not in those:
                is_left[sentence.first_token : sentence.end_token] = False
        for place in explained:
            chunk = slice(*reading.bounds[reading.read[place]])
            chunks.append(torch.from_numpy(chunked.chunker.with_special_tokens(tokens[chunk][is_left[chunk]])))
    padding = chunked.tokenizer.pad_token_id
    ids_NL = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True, padding_value=padding)
    lengths = torch.tensor([len(chunk) for chunk in chunks])
    mask_NL = (torch.arange(ids_NL.shape[1]) < lengths[:, None]).long()
    with full_precision(model.device):
        vectors_ND = model.extract_features(ids_NL.to(model.device), mask_NL.to(model.device))
    chunk_SCD = reading.chunk_CD.to(model.device).expand(len(kept), -1, -1).clone()
    chunk_SCD[:, explained] = vectors_ND.reshape(len(kept), len(explained), -1).to(chunk_SCD.dtype)
    logits_SK, _ = model.classify(chunk_SCD.flatten(0, 1), [len(reading.chunk_CD)] * len(kept))
    return logits_SK.softmax(dim=1)[:, reading.predicted].cpu().numpy()


def summary(curves: dict[str, list[np.ndarray]], places: list[float]) -> dict[str, Any]:
    """Mean curves over the documents, and the mean of each: low for deletion and high for insertion where the explanation
    is faithful. Empty where no document had anything to take away."""
    if not curves:
        return {}
    means = {name: np.mean(rows, axis=0) for name, rows in curves.items()}
    return {
        **{name: float(curve.mean()) for name, curve in means.items()},
        "documents": len(next(iter(curves.values()))),
        "curves": {"at": places, **{name: curve.tolist() for name, curve in means.items()}},
    }


def pointing_game(
    readings: list[DocumentResult], evidence: list[str], labels: np.ndarray, label: int
) -> dict[str, Any]:
    """Where the true evidence is known: the share of rightly rated documents of a label whose strongest chunk, and whose
    strongest sentence, stands in it: at least half of the shorter of the two must lie in the other."""
    chunks, sentences = [], []
    for reading in readings:
        spans = json.loads(evidence[reading.index] or "[]")
        if not spans or labels[reading.index] != label or reading.predicted != label:
            continue
        chunks.append(any(_overlaps(reading.span_of(reading.strongest()[0]), span) for span in spans))
        if reading.sentences:
            best = reading.sentences[0]
            sentences.append(any(_overlaps((best.start, best.end), span) for span in spans))
    found: dict[str, Any] = {"documents": len(chunks)}
    if chunks:
        found["chunk"] = float(np.mean(chunks))
    if sentences:
        found["sentence"] = float(np.mean(sentences))
    return found


def _overlaps(span: tuple[int, int], evidence: dict[str, int]) -> bool:
    shared = min(span[1], evidence["end"]) - max(span[0], evidence["start"])
    return shared > 0 and 2 * shared >= min(span[1] - span[0], evidence["end"] - evidence["start"])
