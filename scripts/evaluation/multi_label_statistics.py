"""Metrics of several labels a document with bootstrap intervals, calibration of each label, and errors that go together.

B documents, K labels, R resamples.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import rankdata
from sklearn.metrics import f1_score

from modeling.training.calibration import binary_reliability, calibration_error
from modeling.training.metrics import multi_label_metrics
from scripts.evaluation.statistics import NUM_RESAMPLES, Prediction, interval

# Labels, the most frequent ones, whose own metrics get intervals.
MOST_INTERVALS = 50
# Resamples held at once, and the work (documents × labels × resamples) for intervals of average precision, which are of
# fewer resamples, at least 200, beyond it.
RESAMPLES_AT_ONCE, MAX_RANKED = 250, 500_000_000
OVERALL = (
    *("f1_macro", "f1_micro", "f1_weighted", "f1_samples", "subset_accuracy", "hamming_loss"),
    *("label_ranking_average_precision", "average_precision_macro", "precision_macro", "recall_macro"),
)

OVER_LABELS = ("f1_macro", "f1_weighted", "average_precision_macro", "precision_macro", "recall_macro")


@lru_cache(maxsize=1)
def resample_counts(num_documents: int, seed: int = 0) -> np.ndarray:
    """How often each document is in each bootstrap resample (Efron 1979), (B, R)."""
    draws = np.random.default_rng(seed).multinomial(
        num_documents, np.full(num_documents, 1 / num_documents), size=NUM_RESAMPLES
    )
    return np.ascontiguousarray(draws.T.astype(np.uint8))


def resampled_metrics(labels_BK: np.ndarray, prediction: Prediction, num_own: int) -> dict[str, np.ndarray]:
    """The metrics of `multi_label_metrics` on bootstrap resamples, each (R,): all over labels, and precision, recall and F1 of
    the first `num_own` labels, NaN where a resample lacks the label.

    Means over labels, NaN without any, are of the labels that a resample has: `centred_interval` takes out the bias of that.
    They are multiplied by the share of the labels that documents like these may have at all, as others count 0.
    """
    labels_BK, predicted_BK = np.asarray(labels_BK) == 1, np.asarray(prediction.predicted) == 1
    parts = [
        sparse.csr_matrix(part, dtype=np.float64).T for part in (labels_BK & predicted_BK, labels_BK, predicted_BK)
    ]
    shared_B = (labels_BK & predicted_BK).sum(axis=1)
    size_B = labels_BK.sum(axis=1) + predicted_BK.sum(axis=1)
    by_document = {
        "f1_samples": np.where(size_B > 0, 2 * shared_B / np.maximum(size_B, 1), 1.0),
        "subset_accuracy": (labels_BK == predicted_BK).all(axis=1).astype(np.float64),
        "hamming_loss": (labels_BK != predicted_BK).mean(axis=1),
        "label_ranking_average_precision": ranking_precision(labels_BK, prediction.scores),
    }
    share = possible_share(labels_BK)
    blocks: list[dict[str, np.ndarray]] = []
    count_BR = resample_counts(len(labels_BK))
    for start in range(0, NUM_RESAMPLES, RESAMPLES_AT_ONCE):
        block_BR = count_BR[:, start : start + RESAMPLES_AT_ONCE].astype(np.float64)
        right_KR, support_KR, predicted_KR = (part @ block_BR for part in parts)
        rates = (
            _ratio(right_KR, predicted_KR),
            _ratio(right_KR, support_KR),
            _ratio(2 * right_KR, support_KR + predicted_KR),
        )
        precision_KR, recall_KR, f1_KR = np.where(support_KR > 0, rates, np.nan)
        block = {
            "f1_macro": share * _mean(f1_KR),
            "f1_micro": _ratio(2 * right_KR.sum(axis=0), (support_KR + predicted_KR).sum(axis=0)),
            "f1_weighted": _ratio(np.nansum(f1_KR * support_KR, axis=0), support_KR.sum(axis=0)),
            "precision_macro": share * _mean(precision_KR),
            "recall_macro": share * _mean(recall_KR),
        }
        block |= {name: value_B @ block_BR / len(labels_BK) for name, value_B in by_document.items()}
        for k in range(num_own):
            block |= {f"precision_{k}": precision_KR[k], f"recall_{k}": recall_KR[k], f"f1_{k}": f1_KR[k]}
        blocks.append(block)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def possible_share(labels_BK: np.ndarray) -> float:
    """Share of the labels that occur, or may occur in other documents like these: the labels with one and two documents tell
    how many of the others do (bias-corrected estimate of Chao 1984).

    >>> possible_share(np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]))
    0.5
    """
    number_K = np.asarray(labels_BK).sum(axis=0)
    once, twice = (number_K == 1).sum(), (number_K == 2).sum()
    unseen = once * (once - 1) / (2 * (twice + 1))
    return float(min(1.0, ((number_K > 0).sum() + unseen) / len(number_K)))


def resampled_average_precision(labels_BK: np.ndarray, scores_BK: np.ndarray, num_resamples: int) -> np.ndarray:
    """Average precision of each label on resamples, (K, R): NaN where a resample has no document of the label.

    Documents with equal scores count together, as in scikit-learn.
    """
    count_BR = resample_counts(len(labels_BK))[:, :num_resamples]
    average_KR = np.full((labels_BK.shape[1], num_resamples), np.nan)
    for k in np.flatnonzero(np.asarray(labels_BK).any(axis=0)):
        order = np.argsort(-scores_BK[:, k], kind="stable")
        score_B, is_BR = scores_BK[order, k], count_BR[order]
        label_B = np.asarray(labels_BK)[order, k] == 1
        # The rows of equal scores that hold a document of the label; those between them count in the precision only.
        last_B = np.searchsorted(-score_B, -score_B, side="right") - 1
        ends = np.unique(last_B[label_B])
        starts = np.concatenate([[0], ends[:-1] + 1])
        seen_PR = np.cumsum(np.add.reduceat(is_BR[: ends[-1] + 1], starts, axis=0, dtype=np.float32), axis=0)
        own_BR = is_BR[label_B]
        own_starts = np.searchsorted(np.flatnonzero(label_B), starts)
        own_PR = np.add.reduceat(own_BR, own_starts, axis=0, dtype=np.float32)
        precision_PR = _ratio(np.cumsum(own_PR, axis=0), seen_PR)
        num_R = own_PR.sum(axis=0)
        average_KR[k] = np.where(num_R > 0, (precision_PR * own_PR).sum(axis=0) / np.maximum(num_R, 1), np.nan)
    return average_KR


def centred_interval(value: float, resampled_R: np.ndarray) -> dict[str, float]:
    """`interval` of a mean over labels, from 0 to 1, with resamples shifted by their bias (Efron & Tibshirani 1993, chapter 10),
    so that their mean is the value: labels that a resample lacks are not in its mean, and with one or two documents of a
    label, resamples that have one score it too high."""
    return interval(value, np.clip(_centred(value, resampled_R), 0.0, 1.0))


def difference_interval(value: float, resampled_R: np.ndarray) -> dict[str, float]:
    """`interval` of a difference of two such means, likewise shifted, but not so that it excludes 0 only for that."""
    plain, shifted = interval(value, resampled_R), interval(value, _centred(value, resampled_R))
    if plain["low"] <= 0 <= plain["high"]:
        shifted |= {"low": min(shifted["low"], 0.0), "high": max(shifted["high"], 0.0)}
    return shifted


def metrics_with_intervals(
    labels_BK: np.ndarray, prediction: Prediction, names: Sequence[str], most: int = MOST_INTERVALS
) -> dict[str, dict[str, float]]:
    """`{metric: {"value", "low", "high"}}` with 95 % bootstrap intervals over the documents; of labels that are not among the
    `most` frequent ones `{"value"}` alone."""
    labels_BK = np.asarray(labels_BK)
    order = np.argsort(-labels_BK.sum(axis=0), kind="stable")
    own = order[:most]
    observed = multi_label_metrics(prediction.predicted, labels_BK, prediction.scores, names)
    reordered = Prediction(prediction.predicted[:, order], prediction.scores[:, order])
    resampled = resampled_metrics(labels_BK[:, order], reordered, len(own))
    num_resamples = int(np.clip(MAX_RANKED // max(labels_BK.size, 1), 200, NUM_RESAMPLES))
    average_KR = resampled_average_precision(labels_BK[:, order], reordered.scores, num_resamples)
    resampled["average_precision_macro"] = _mean(average_KR)
    intervals = {
        name: (centred_interval if name in OVER_LABELS else interval)(observed[name], resampled[name])
        for name in OVERALL
    }
    rank_of = {int(k): rank for rank, k in enumerate(own)}
    for k, name in enumerate(names):
        for kind in ("precision", "recall", "f1", "average_precision"):
            entry = {"value": observed[f"{kind}_{name}"]}
            if k in rank_of and labels_BK[:, k].any():
                rank = rank_of[k]
                own_R = average_KR[rank] if kind == "average_precision" else resampled[f"{kind}_{rank}"]
                entry = interval(entry["value"], own_R)
            intervals[f"{kind}_{name}"] = entry
    return intervals


def difference(labels_BK: np.ndarray, model: Prediction, other: Prediction) -> dict[str, float]:
    """Difference in macro-F1, model minus other, on the same documents, with its paired bootstrap interval."""
    model_value, other_value = (
        f1_score(labels_BK, each.predicted.astype(np.int64), average="macro", zero_division=0)
        for each in (model, other)
    )
    model_R, other_R = (resampled_metrics(labels_BK, each, 0)["f1_macro"] for each in (model, other))
    return difference_interval(model_value - other_value, model_R - other_R)


def ranking_precision(labels_BK: np.ndarray, scores_BK: np.ndarray) -> np.ndarray:
    """Label ranking average precision of each document, (B,): 1 for all labels or none, as in scikit-learn."""
    values_B = np.ones(len(labels_BK))
    for row, (label_K, score_K) in enumerate(zip(np.asarray(labels_BK) == 1, scores_BK, strict=True)):
        if 0 < label_K.sum() < len(label_K):
            rank_K = rankdata(-score_K, "max")
            values_B[row] = (rankdata(-score_K[label_K], "max") / rank_K[label_K]).mean()
    return values_B


def calibration_of_labels(
    before_BK: np.ndarray, after_BK: np.ndarray, labels_BK: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """Expected calibration error of the scores as probabilities of a label, before and after calibration: over all labels
    together, and `labels`: of each."""
    before, after = (
        [calibration_error(binary_reliability(scores_BK[:, k], labels_BK[:, k])) for k in range(len(names))]
        for scores_BK in (before_BK, after_BK)
    )
    return {
        "ece_before": calibration_error(binary_reliability(before_BK.ravel(), labels_BK.ravel())),
        "ece_after": calibration_error(binary_reliability(after_BK.ravel(), labels_BK.ravel())),
        "labels": {name: {"ece_before": b, "ece_after": a} for name, b, a in zip(names, before, after, strict=True)},
    }


def errors_together(
    labels_BK: np.ndarray, predicted_BK: np.ndarray, names: Sequence[str], most: int = 20
) -> list[dict[str, Any]]:
    """Pairs of a label that is missed and another that is predicted in the same document without being one of its labels, and
    the number of documents, the most frequent first."""
    labels_BK, predicted_BK = np.asarray(labels_BK) == 1, np.asarray(predicted_BK) == 1
    missed = sparse.csr_matrix(labels_BK & ~predicted_BK, dtype=np.int64)
    added = sparse.csr_matrix(predicted_BK & ~labels_BK, dtype=np.int64)
    both = (missed.T @ added).tocoo()
    order = np.lexsort([both.col, both.row, -both.data])[:most]
    return [
        {"missed": names[both.row[i]], "predicted": names[both.col[i]], "documents": int(both.data[i])} for i in order
    ]


def by_group(
    groups: Mapping[str, np.ndarray], labels_BK: np.ndarray, prediction: Prediction, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Number of documents, macro-F1 over the labels that occur in it, micro-F1 and subset accuracy, per non-empty group."""
    rows = []
    for name, member_B in groups.items():
        index = np.flatnonzero(member_B)
        if len(index):
            there = np.flatnonzero(labels_BK[index].any(axis=0))
            own, predicted = labels_BK[index] == 1, prediction.predicted[index] == 1
            right_K, size_K = (own & predicted).sum(axis=0), own.sum(axis=0) + predicted.sum(axis=0)
            f1_K = _ratio(2.0 * right_K, size_K)
            row = {
                "group": name,
                "documents": len(index),
                "f1_macro": float(f1_K[there].mean()) if len(there) else None,
            }
            row |= {"f1_micro": float(_ratio(2.0 * right_K.sum(), size_K.sum()))}
            rows.append(row | {"subset_accuracy": float((own == predicted).all(axis=1).mean())})
    return rows


def _mean(values_KR: np.ndarray) -> np.ndarray:
    """Mean over the labels that are not NaN, (R,): NaN without any."""
    num_R = (~np.isnan(values_KR)).sum(axis=0)
    return np.where(num_R > 0, _ratio(np.nansum(values_KR, axis=0), num_R), np.nan)


def _centred(value: float, resampled_R: np.ndarray) -> np.ndarray:
    """Resamples that are not NaN, shifted so that their mean is the value; the value alone without any."""
    defined_R = resampled_R[~np.isnan(resampled_R)]
    return defined_R - defined_R.mean() + value if len(defined_R) else np.array([value])


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Elementwise division, 0 where the denominator is 0."""
    numerator = np.asarray(numerator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=np.asarray(denominator) > 0)
