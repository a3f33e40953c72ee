"""Metrics with bootstrap intervals, operating points and selective prediction.

B documents, K ordered labels, R resamples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

NUM_RESAMPLES = 2000


class Prediction(NamedTuple):
    """What is predicted for documents.

    Attributes:
        predicted: class ids (B,), or with several labels a document whether it has each, (B, K).
        scores: (B, K), which rank the documents of a label.
        options: what a tuned baseline chose, in words.
    """

    predicted: np.ndarray
    scores: np.ndarray
    options: str = ""


# From the training documents and those to predict.
TextBaseline = Callable[[datasets.Dataset, datasets.Dataset], Prediction]


def confusion(labels_B: np.ndarray, predicted_B: np.ndarray, num_labels: int) -> np.ndarray:
    """Confusion matrix (1, K, K): rows are labels, columns are predictions."""
    cells_B = np.asarray(labels_B) * num_labels + np.asarray(predicted_B)
    return np.bincount(cells_B, minlength=num_labels**2).reshape(1, num_labels, num_labels)


def resampled_pair(
    labels_B: np.ndarray, one_B: np.ndarray, other_B: np.ndarray, num_labels: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrices (R, K, K) of two predictions on the same bootstrap resamples of the documents (Efron 1979).

    Drawing B documents with replacement is a multinomial draw over the non-empty cells (label, one, other), so memory
    and time do not depend on the number of documents.
    """
    cells_B = (np.asarray(labels_B) * num_labels + np.asarray(one_B)) * num_labels + np.asarray(other_B)
    cells_X, counts_X = np.unique(cells_B, return_counts=True)
    drawn_RX = np.random.default_rng(seed).multinomial(len(cells_B), counts_X / len(cells_B), size=NUM_RESAMPLES)
    label_X, one_X, other_X = np.unravel_index(cells_X, (num_labels,) * 3)
    pair = tuple(np.zeros((NUM_RESAMPLES, num_labels, num_labels), dtype=np.int32) for _ in range(2))
    for drawn_R, label, *both in zip(drawn_RX.T, label_X, one_X, other_X, strict=True):
        for confusion_RKK, predicted in zip(pair, both, strict=True):
            confusion_RKK[:, label, predicted] += drawn_R
    return pair[0], pair[1]


def metrics_of(
    confusion_RKK: np.ndarray, names: Sequence[str], severity: Sequence[float], absent: float | np.ndarray = np.nan
) -> dict[str, np.ndarray]:
    """The metrics of modeling/training/metrics.py for many confusion matrices at once, each (R,); and for ordered
    labels `missed_NAME`, the share of the most severe class predicted as a milder one, and `mean_distance` of the
    predictions.

    Args:
        absent: recall and F1 of a class without documents, a scalar or (K,). NaN excludes the class from the means:
            scikit-learn's 0 would lower an interval by every resample that happens to lack a rare class.
    """
    counts = np.asarray(confusion_RKK, dtype=np.float64)
    total, right = counts.sum(axis=(1, 2)), np.einsum("rkk->rk", counts)
    support, predicted = counts.sum(axis=2), counts.sum(axis=1)
    precision = _ratio(right, predicted)
    recall = np.where(support > 0, _ratio(right, support), absent)
    f1 = np.where(support > 0, _ratio(2 * right, support + predicted), absent)
    weights = np.asarray(severity, dtype=np.float64)
    counted = (support > 0) | (absent == 0)
    distance = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names))))
    by_chance = np.einsum("ri,rj->rij", support, predicted) / np.maximum(total, 1)[:, None, None]
    expected = (by_chance * distance**2).sum(axis=(1, 2))
    values = {
        "accuracy": right.sum(axis=1) / np.maximum(total, 1),
        "f1_macro": _mean(f1, counted),
        "f1_weighted": _ratio(np.nansum(f1 * support, axis=1), total),
        "precision_macro": _mean(precision, counted),
        "recall_macro": _mean(recall, counted),
        "severity_f1": _mean(f1, weights * counted),
        # With a single class, all agreement is chance.
        "quadratic_kappa": np.where(expected > 0, 1 - _ratio((counts * distance**2).sum(axis=(1, 2)), expected), 0.0),
        "mean_distance": _ratio((counts * distance).sum(axis=(1, 2)), total),
        f"missed_{names[-1]}": np.where(support[:, -1] > 0, 1 - recall[:, -1], np.nan),
    }
    for k, name in enumerate(names):
        values |= {f"precision_{name}": precision[:, k], f"recall_{name}": recall[:, k], f"f1_{name}": f1[:, k]}
    return values


def _mean(values_RK: np.ndarray, weights_RK: np.ndarray) -> np.ndarray:
    """Weighted mean over the classes, ignoring NaN, (R,)."""
    weights = np.broadcast_to(np.asarray(weights_RK, dtype=np.float64), values_RK.shape)
    return _ratio((np.nan_to_num(values_RK) * weights).sum(axis=1), weights.sum(axis=1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Elementwise division, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def interval(value: float, resampled_R: np.ndarray) -> dict[str, float]:
    """A value with the central 95 % interval of its resamples, ignoring NaN."""
    defined = resampled_R[~np.isnan(resampled_R)]
    low, high = np.quantile(defined, [0.025, 0.975]) if len(defined) else (np.nan, np.nan)
    return {"value": float(value), "low": float(low), "high": float(high)}


def metrics_with_intervals(
    labels_B: np.ndarray, predicted_B: np.ndarray, names: Sequence[str], severity: Sequence[float]
) -> dict[str, dict[str, float]]:
    """`{metric: {"value", "low", "high"}}` with 95 % bootstrap intervals over the documents."""
    observed = metrics_of(confusion(labels_B, predicted_B, len(names)), names, severity, absent=0.0)
    resamples = resampled_pair(labels_B, predicted_B, predicted_B, len(names))[0]
    resampled = metrics_of(resamples, names, severity, _absent_from_resamples(labels_B, len(names)))
    return {name: interval(value[0], resampled[name]) for name, value in observed.items()}


def _absent_from_resamples(labels_B: np.ndarray, num_labels: int) -> np.ndarray:
    """`absent` for resamples, (K,): NaN, but 0 for a class that has no documents at all, as in the observed value."""
    return np.where(np.bincount(labels_B, minlength=num_labels) > 0, np.nan, 0.0)


def difference(
    labels_B: np.ndarray, model_B: np.ndarray, other_B: np.ndarray, names: Sequence[str], metric: str = "f1_macro"
) -> dict[str, float]:
    """Difference in a metric, model minus other, on the same documents, with its paired bootstrap interval."""
    equal = [1.0] * len(names)
    observed_model, observed_other = (
        metrics_of(confusion(labels_B, predicted, len(names)), names, equal, absent=0.0)[metric]
        for predicted in (model_B, other_B)
    )
    model, other = (
        metrics_of(resampled, names, equal, _absent_from_resamples(labels_B, len(names)))[metric]
        for resampled in resampled_pair(labels_B, model_B, other_B, len(names))
    )
    return interval(observed_model[0] - observed_other[0], model - other)


def operating_points(
    validation_BK: np.ndarray, validation_labels_B: np.ndarray, scores_BK: np.ndarray, labels_B: np.ndarray
) -> list[dict[str, float]]:
    """For 90, 95 and 99 % recall of the most severe class: the score threshold that reaches it on validation, and the
    recall, precision and share of flagged documents at that threshold on `scores_BK`."""
    most_severe = scores_BK.shape[1] - 1
    positives = np.sort(validation_BK[validation_labels_B == most_severe, most_severe])[::-1]
    points = []
    for recall in (0.90, 0.95, 0.99):
        if len(positives) == 0:
            continue
        threshold = float(positives[int(np.ceil(recall * len(positives))) - 1])
        flagged = scores_BK[:, most_severe] >= threshold
        hit = flagged & (labels_B == most_severe)
        points.append(
            {
                "target_recall": recall,
                "threshold": threshold,
                "recall": float(hit.sum() / max((labels_B == most_severe).sum(), 1)),
                "precision": float(hit.sum() / max(flagged.sum(), 1)),
                "flagged_share": float(flagged.mean()),
            }
        )
    return points


def abstain_curve(scores_BK: np.ndarray, labels_B: np.ndarray, predicted_B: np.ndarray) -> list[dict[str, float]]:
    """Selective prediction: accuracy on the documents with the highest score of their predicted label, by the share that is
    kept."""
    confidence = scores_BK[np.arange(len(scores_BK)), predicted_B]
    order = np.argsort(-confidence, kind="stable")
    right = (predicted_B == labels_B)[order]
    curve = []
    for share in np.arange(1.0, 0.04, -0.05):
        kept = max(1, round(share * len(order)))
        curve.append(
            {
                "kept_share": kept / len(order),
                "confidence": float(confidence[order[kept - 1]]),
                "accuracy": float(right[:kept].mean()),
            }
        )
    return curve


def by_group(
    groups: dict[str, np.ndarray], labels_B: np.ndarray, predicted_B: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Number of documents, accuracy, macro-F1 and missed share of the most severe class, per non-empty group."""
    equal = [1.0] * len(names)
    rows = []
    for name, member_B in groups.items():
        index = np.flatnonzero(member_B)
        if len(index):
            values = metrics_of(confusion(labels_B[index], predicted_B[index], len(names)), names, equal)
            row = {"group": name, "documents": len(index)}
            rows.append(row | {m: float(values[m][0]) for m in ("accuracy", "f1_macro", f"missed_{names[-1]}")})
    return rows
