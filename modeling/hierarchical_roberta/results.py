"""What is returned for a document: labels, scores and evidence.

C chunks of a document, K labels, E explained labels.
Pushed to the hub with the model, and part of an export to ONNX: imports only its siblings that need no torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .chunking import evidence_spans
from .decision import MultiLabelDecision, SingleLabelDecision, sigmoid, softmax


def scores_of(decision: SingleLabelDecision | MultiLabelDecision, logits_K: np.ndarray, function: str) -> list[float]:
    """Softmax or sigmoid of the calibrated logits, or, with `none`, the logits themselves."""
    if function == "none":
        return np.asarray(logits_K, dtype=np.float64).tolist()
    return {"softmax": softmax, "sigmoid": sigmoid}[function](decision.calibrated(logits_K)).tolist()


def explained_labels(decision: SingleLabelDecision | MultiLabelDecision, logits_K: np.ndarray) -> list[int]:
    """Ids of the labels that evidence is given for: those of the document, or the one with the highest score if it has
    none."""
    return decision.labels_of(logits_K) or [decision.first_label(logits_K)]


def result_of(
    document: dict[str, Any],
    decision: SingleLabelDecision | MultiLabelDecision,
    names: Sequence[str],
    logits_K: np.ndarray,
    scores: Sequence[float],
    attribution_EC: Sequence[Sequence[float]] = (),
    evidence: int = 0,
    chunks: bool = False,
) -> dict[str, Any]:
    """The dict of a document; see `HierarchicalClassificationPipeline`.

    Args:
        document: `text`, `spans` of its C encoded chunks, `num_chunks` and `truncated`.
        names: of the K labels.
        scores: of the K labels.
        attribution_EC: leave-one-out attributions, a row for each of `explained_labels`; without any there is no evidence.
        evidence: maximum number of evidence chunks of a label.
        chunks: whether to return `chunks`.
    """
    label, spans = decision.first_label(logits_K), document["spans"]
    explained = [names[k] for k in explained_labels(decision, logits_K)]
    # Keys that only documents with several labels have.
    several: Callable[..., dict[str, Any]] = dict if decision.is_multi_label else lambda **_: {}
    result = {
        "label": names[label],
        "score": scores[label],
        **several(labels=[names[k] for k in decision.labels_of(logits_K)]),
        "scores": dict(zip(names, scores, strict=True)),
        "num_chunks": document["num_chunks"],
        "num_encoded_chunks": len(spans),
        "truncated": document["truncated"],
        "evidence": [
            {**several(label=name), **span}
            for name, attribution_C in zip(explained, attribution_EC, strict=False)
            for span in evidence_spans(document["text"], spans, attribution_C, evidence)
        ],
    }
    if chunks:
        result["chunks"] = [
            {
                "start": start,
                "end": end,
                "score": score_E[0],
                **several(scores=dict(zip(explained, score_E, strict=True))),
            }
            for (start, end), score_E in zip(spans, zip(*attribution_EC, strict=True), strict=True)
        ]
    return result
