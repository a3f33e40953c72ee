"""Thresholds of the scores of several labels a document, fitted on validation documents.

B documents, K labels.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from modeling.hierarchical_roberta.decision import MultiLabelDecision

from .calibration import fit_label_calibration

# Labels with fewer validation documents have the threshold that is best over all labels together.
# So have those whose own best F1 is below MIN_F1: it is that of giving everyone a label that cannot be told (SCutFBR, Lewis
# et al. 2004; Fan & Lin 2007).
MIN_POSITIVES, MIN_F1 = 5, 0.1
METRICS = ("f1_macro", "f1_micro")


def parse_threshold_metric(text: str, label_names: Sequence[str]) -> tuple[str, dict[int, float]]:
    """What thresholds are chosen for: `f1_macro` (F1 of each label) or `f1_micro` (one threshold), and the recall to reach
    of some labels: all with `recall=0.9`, one with `recall_LABEL=0.9`.

    Raises:
        ValueError: another metric, an unknown label, or a recall outside (0, 1].

    >>> parse_threshold_metric("recall_drugs=0.9", ["violence", "drugs"])
    ('f1_macro', {1: 0.9})
    """
    if text in METRICS:
        return text, {}
    recalls = {"recall": list(range(len(label_names)))} | {f"recall_{name}": [k] for k, name in enumerate(label_names)}
    name, _, value = text.rpartition("=")
    try:
        recall = float(value)
    except ValueError:
        recall = 0.0
    if name not in recalls or not 0 < recall <= 1:
        raise ValueError(
            f"Invalid `decision_metric` {text!r}: expected {', '.join(METRICS)}, a recall of every label such as recall=0.9, or "
            f"of one, such as recall_{label_names[-1]}=0.9 (labels: {', '.join(label_names[:20])})."
        )
    return "f1_macro", dict.fromkeys(recalls[name], recall)


def fit_multi_label_decision(
    logits_BK: np.ndarray, labels_BK: np.ndarray, metric: str = "f1_macro", recalls: Mapping[int, float] | None = None
) -> tuple[list[list[float]], list[float]]:
    """The calibration of each label (slope and intercept), and thresholds of the calibrated scores; arguments as for
    `fit_thresholds`."""
    calibration = fit_label_calibration(logits_BK, labels_BK).tolist()
    scores_BK = MultiLabelDecision(calibration).scores(logits_BK)
    return calibration, fit_thresholds(scores_BK, labels_BK, metric, recalls or {}).tolist()


def fit_thresholds(
    scores_BK: np.ndarray, labels_BK: np.ndarray, metric: str, recalls: Mapping[int, float]
) -> np.ndarray:
    """Thresholds (K,) that are best on documents that the model was not trained on.

    Args:
        scores_BK: calibrated scores.
        labels_BK: 0 and 1.
        metric, recalls: see `parse_threshold_metric`.
    """
    scores_BK, labels_BK = np.asarray(scores_BK, dtype=np.float64), np.asarray(labels_BK) == 1
    shared = best_threshold(scores_BK.ravel(), labels_BK.ravel())
    thresholds_K = np.full(scores_BK.shape[1], shared)
    own = np.flatnonzero(labels_BK.sum(axis=0) >= MIN_POSITIVES).tolist() if metric == "f1_macro" else []
    for k in own:
        threshold = best_threshold(scores_BK[:, k], labels_BK[:, k])
        predicted_B = scores_BK[:, k] >= threshold
        if 2 * (predicted_B & labels_BK[:, k]).sum() >= MIN_F1 * (predicted_B.sum() + labels_BK[:, k].sum()):
            thresholds_K[k] = threshold
    for k, recall in recalls.items():
        own_scores = np.sort(scores_BK[labels_BK[:, k], k])[::-1]
        if len(own_scores):
            lowest = own_scores[int(np.ceil(recall * len(own_scores) - 1e-9)) - 1]
            thresholds_K[k] = _between(scores_BK[:, k], lowest)
    return thresholds_K


def best_threshold(score_B: np.ndarray, label_B: np.ndarray) -> float:
    """The threshold with the highest F1, halfway between two scores; 0.5 if no document has the label.

    >>> best_threshold(np.array([0.1, 0.2, 0.6, 0.7]), np.array([0, 0, 1, 1]))
    0.4
    """
    if not label_B.any():
        return 0.5
    order = np.argsort(-score_B, kind="stable")
    hits, places = np.cumsum(label_B[order]), np.arange(1, len(order) + 1)
    f1 = 2 * hits / (places + label_B.sum())
    f1[:-1][score_B[order][:-1] == score_B[order][1:]] = 0  # documents with equal scores are decided alike
    return _between(score_B, score_B[order][int(f1.argmax())])


def _between(score_B: np.ndarray, lowest: float) -> float:
    """Halfway between a score and the next lower one; that score where nothing is between them."""
    below = score_B[score_B < lowest].max(initial=0.0)
    middle = (lowest + below) / 2
    return float(middle if middle > below else lowest)
