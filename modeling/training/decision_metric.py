"""The option `--decision_metric`: class biases that are best by it on validation documents.

B documents, K labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decision import OVERSHOOT, f1_of, fit_averaged_biases, macro_f1_of

AVERAGES = ("f1_macro", "severity_f1")


@dataclass
class DecisionMetric:
    """What decisions are chosen for.

    Attributes:
        name: a metric's name, e.g. `f1_macro` or `recall_Mature`.
        label: class id of a recall (None: a mean over the classes).
        recall: recall to reach.
    """

    name: str
    label: int | None = None
    recall: float = 0.0


def parse_decision_metric(text: str, label_names: Sequence[str]) -> DecisionMetric:
    """Parse `f1_macro`, `severity_f1`, or a recall to reach such as `recall_Mature=0.95`.

    Raises:
        ValueError: another metric, an unknown label, or a recall outside (0, 1].
    """
    if text in AVERAGES:
        return DecisionMetric(text)
    recalls = [f"recall_{name}" for name in label_names]
    expected = f"expected {', '.join(AVERAGES)}, or a recall to reach, such as {recalls[-1]}=0.95"
    name, separator, value = text.rpartition("=")
    if not separator or not name.startswith("recall_"):
        raise ValueError(f"Invalid `decision_metric` {text!r}: {expected}.")
    if name not in recalls:
        raise ValueError(
            f"Invalid `decision_metric` {text!r}: there is no label {name.removeprefix('recall_')!r}; the labels are "
            f"{', '.join(label_names)}."
        )
    try:
        recall = float(value)
    except ValueError:
        recall = 0.0
    if not 0 < recall <= 1:
        raise ValueError(f"Invalid `decision_metric` {text!r}: the recall must be above 0 and at most 1; {expected}.")
    return DecisionMetric(name, recalls.index(name), recall)


def check_decision_metric(text: str | None, label_names: Sequence[str], validation_labels_B: np.ndarray) -> None:
    """Raise ValueError if `decision_metric` is invalid, or a recall of a label that no validation document has."""
    if text is None:
        return
    metric = parse_decision_metric(text, label_names)
    if metric.label is not None and metric.label not in validation_labels_B:
        raise ValueError(no_recall_message(text, label_names[metric.label]))


def no_recall_message(text: str, label: str) -> str:
    return (
        f"`decision_metric` {text!r}: no validation document is labelled {label}, so its recall cannot be measured. Add "
        "documents to the validation split, or choose another metric."
    )


def fit_decision(
    metric: DecisionMetric, log_scores_BK: np.ndarray, labels_B: np.ndarray, severity_weights_K: Sequence[float]
) -> np.ndarray:
    """Fit class biases (K,) for a metric to the scores and labels of documents that the model was not trained on.

    Args:
        severity_weights_K: weights of the classes in `severity_f1`.

    Raises:
        ValueError: as for `fit_class_biases`.
    """
    if metric.label is not None:
        return fit_recall_bias(log_scores_BK, labels_B, metric.label, metric.recall)
    weights_K = np.asarray(severity_weights_K, dtype=np.float64)
    average = (
        macro_f1_of if metric.name == "f1_macro" else lambda confusion: f1_of(confusion) @ weights_K / weights_K.sum()
    )
    return fit_averaged_biases(log_scores_BK, labels_B, average)


def fit_recall_bias(log_scores_BK: np.ndarray, labels_B: np.ndarray, label: int, recall: float) -> np.ndarray:
    """The smallest bias of one class with which its recall reaches a value, as biases (K,) that are 0 for the others.

    It may be negative: a class whose recall is higher without a bias is predicted less often. Between two values at
    which the decision on a document changes, all biases give the same decisions: the middle is taken, which rounding of
    the scores cannot change, and at most `OVERSHOOT` above the lower value. Documents with equal scores are decided
    alike, so that the recall may be higher than asked for. If no bias reaches it, since scores of -inf rule the class
    out, the bias with the highest recall is taken.

    Args:
        log_scores_BK, labels_B: as for `fit_class_biases`.
        label: id of a class with documents.
        recall: in (0, 1].
    """
    scores_BK = np.asarray(log_scores_BK, dtype=np.float64)
    others_BK = np.delete(scores_BK, label, axis=1)
    # A document is decided as the class if the bias is above its threshold: inf is never, -inf always.
    threshold_B = np.full(len(scores_BK), np.inf)
    possible_B = ~np.isneginf(scores_BK[:, label])
    threshold_B[possible_B] = others_BK[possible_B].max(axis=1) - scores_BK[possible_B, label]
    biases_K = np.zeros(scores_BK.shape[1])
    edges = np.unique(threshold_B[np.isfinite(threshold_B)])
    if not len(edges):
        return biases_K
    of_class = np.sort(threshold_B[np.asarray(labels_B) == label])
    # Products such as 0.55 × 20 are rounded up.
    num_found = int(np.ceil(recall * len(of_class) - 1e-9))
    lowest = np.clip(of_class[num_found - 1], edges[0] - 2 * OVERSHOOT, edges[-1])
    above = edges[edges > lowest]
    biases_K[label] = min((lowest + above[0]) / 2, lowest + OVERSHOOT) if len(above) else lowest + OVERSHOOT
    return biases_K
