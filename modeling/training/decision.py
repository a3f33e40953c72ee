"""Class biases: from scores to decisions that are best by a metric of the confusion matrix, such as macro-F1.

Scores of a classifier that is trained on likelihood decide best by accuracy at their argmax, and by no other metric. A bias
per class, added to the log scores, moves the boundaries between the classes.

B documents, K labels, T candidate values of one bias.
"""

from collections.abc import Callable

import numpy as np

MAX_SWEEPS = 5
# Cells of the confusion matrices of one class's candidates (4 MiB): of more candidates those nearest to the current bias are tried.
MAX_CELLS = 2**19
# How far beyond its last threshold a bias goes if nothing bounds it there: a factor of e in the scores.
OVERSHOOT = 1.0
# Metric values that differ by less are rounding.
TOLERANCE = 1e-9


def f1_of(confusion: np.ndarray) -> np.ndarray:
    """F1 of each class, (..., K), of confusion matrices (..., K, K); see `macro_f1_of`."""
    counts = np.asarray(confusion, dtype=np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    total = counts.sum(axis=-1) + counts.sum(axis=-2)
    return np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0)


def macro_f1_of(confusion: np.ndarray) -> np.ndarray:
    """Macro-F1 of confusion matrices.

    Args:
        confusion: counts of documents, (..., K, K): rows are labels, columns are predictions.

    Returns:
        (...,): the mean over all K classes of `2 true positives / (documents + predictions)`. A class that has neither
        documents nor predictions counts 0, as in modeling/training/metrics.py.
    """
    return f1_of(confusion).mean(axis=-1)


def fit_class_biases(
    log_scores_BK: np.ndarray, labels_B: np.ndarray, metric: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Fit the biases b for which `argmax(log_scores_BK + b)` maximizes a metric, by coordinate ascent.

    In each sweep the bias of one class after the other is set to the best of its candidates, the other biases held: one
    candidate between any two consecutive values at which the decision on a document changes (the cyclic optimization of
    thresholds of Fan & Lin 2007, "A Study on Threshold Selection for Multi-label Classification", for decisions between
    classes; see also Lin, Chen, Wu & Lin 2023, "Linear Classifier: An Often-Forgotten Baseline for Text
    Classification"). The bias is put in the middle of the best plateau, the values between which the metric is the same.
    It ends with the first sweep that changes nothing, or after `MAX_SWEEPS`. A bias changes only if that improves the metric, so that biases
    which do not help are zero; of several best plateaus the one nearest to zero is taken.

    Fit on documents that the classifier was not trained on. On few of them, `fit_averaged_biases` is better. A sweep sorts the documents and computes the metric of at most
    B + 1 confusion matrices for each class: O(K (B K + B log B)) and the metric. With many documents and labels (above
    `MAX_CELLS` / K² documents), only the candidates nearest to the current bias are tried.

    Args:
        log_scores_BK: log-probabilities or logits, (B, K). -inf rules a class out for a document.
        labels_B: gold labels, 0 to K - 1, (B,).
        metric: function from counts of documents (..., K, K), rows labels, columns predictions, to values (...,), of
            which more is better, such as `macro_f1_of`.

    Returns:
        The biases, (K,) float64, their mean 0. Zeros if there are no documents.

    Raises:
        ValueError: the shapes do not agree, a score is NaN or +inf, or a label is outside 0 to K - 1.
    """
    scores_BK, labels_B = _checked(log_scores_BK, labels_B)
    num_labels = scores_BK.shape[1]
    biases_K = np.zeros(num_labels)
    if not len(labels_B) or num_labels < 2:
        return biases_K
    for _ in range(MAX_SWEEPS):
        before_K = biases_K.copy()
        for k in range(num_labels):
            biases_K[k] = _best_bias(k, scores_BK + biases_K, biases_K[k], labels_B, metric)
        if np.array_equal(before_K, biases_K):
            break
    return biases_K - biases_K.mean()


def fit_averaged_biases(
    log_scores_BK: np.ndarray,
    labels_B: np.ndarray,
    metric: Callable[[np.ndarray], np.ndarray],
    num_resamples: int = 20,
    seed: int = 0,
) -> np.ndarray:
    """Fit class biases as the mean of those that `fit_class_biases` fits to bootstrap resamples of the documents.

    The metric jumps at every document, so that the best biases of a few hundred documents are largely chance. Their mean
    over resamples (bagging: Breiman 1996, "Bagging Predictors") varies less, and is nearer to zero where biases are of
    little use. It is zero if it does not improve the metric on the documents themselves.

    Args:
        log_scores_BK, labels_B, metric: as for `fit_class_biases`.
        num_resamples: number of resamples.
        seed: of the resamples; the same seed gives the same biases.

    Returns:
        The biases, (K,) float64, their mean 0. Zeros if there are no documents.

    Raises:
        ValueError: as for `fit_class_biases`.
    """
    scores_BK, labels_B = _checked(log_scores_BK, labels_B)
    zeros_K = np.zeros(scores_BK.shape[1])
    if not len(labels_B):
        return zeros_K
    rows_RB = np.random.default_rng(seed).integers(len(labels_B), size=(num_resamples, len(labels_B)))
    biases_K = np.mean([fit_class_biases(scores_BK[rows], labels_B[rows], metric) for rows in rows_RB], axis=0)
    before, after = (
        metric(_confusion(labels_B, (scores_BK + some_K).argmax(axis=1), len(zeros_K)))
        for some_K in (zeros_K, biases_K)
    )
    return biases_K if after > before + TOLERANCE else zeros_K


def _checked(log_scores_BK: np.ndarray, labels_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (B, K), float64, and labels (B,).

    Raises:
        ValueError: see `fit_class_biases`.
    """
    scores_BK, labels_B = np.asarray(log_scores_BK, dtype=np.float64), np.asarray(labels_B)
    if scores_BK.ndim != 2 or labels_B.shape != scores_BK.shape[:1]:
        raise ValueError(f"Expected scores (B, K) and labels (B,), got {scores_BK.shape} and {labels_B.shape}.")
    if np.isnan(scores_BK).any() or np.isposinf(scores_BK).any():
        raise ValueError("The log scores must be finite or -inf.")
    num_labels = scores_BK.shape[1]
    if len(labels_B) and not 0 <= labels_B.min() <= labels_B.max() < num_labels:
        raise ValueError(f"Labels must be from 0 to {num_labels - 1}, got {labels_B.min()} to {labels_B.max()}.")
    return scores_BK, labels_B


def _best_bias(
    k: int, biased_BK: np.ndarray, bias: float, labels_B: np.ndarray, metric: Callable[[np.ndarray], np.ndarray]
) -> float:
    """The best bias of class k, given scores with all biases, its own included; `bias` if no other is better."""
    num_labels = biased_BK.shape[1]
    others_BK = biased_BK.copy()
    others_BK[:, k] = -np.inf
    rival_B, rival_score_B = others_BK.argmax(axis=1), others_BK.max(axis=1)
    # The decision on a document is k where the bias is above its threshold: inf is never, -inf always.
    threshold_B = np.full(len(labels_B), np.inf)
    possible_B = ~np.isneginf(biased_BK[:, k])
    threshold_B[possible_B] = rival_score_B[possible_B] - (biased_BK[possible_B, k] - bias)
    edges = np.unique(threshold_B[np.isfinite(threshold_B)])
    if not len(edges):
        return bias
    edges = np.concatenate([[edges[0] - 2 * OVERSHOOT], edges, [edges[-1] + 2 * OVERSHOOT]])
    num_candidates = max(2, MAX_CELLS // num_labels**2)
    first = max(0, min(np.searchsorted(edges, bias) - num_candidates // 2, len(edges) - 1 - num_candidates))
    lows_T, highs_T = edges[:-1][first : first + num_candidates], edges[1:][first : first + num_candidates]
    values_T = (lows_T + highs_T) / 2
    metric_T = metric(_confusions(values_T, threshold_B, labels_B, rival_B, k, num_labels))
    if metric_T.max() <= metric(_confusion(labels_B, biased_BK.argmax(axis=1), num_labels)) + TOLERANCE:
        return bias
    is_best_T = metric_T >= metric_T.max() - TOLERANCE
    starts = np.flatnonzero(is_best_T & ~np.concatenate([[False], is_best_T[:-1]]))
    ends = np.flatnonzero(is_best_T & ~np.concatenate([is_best_T[1:], [False]]))
    centres = (lows_T[starts] + highs_T[ends]) / 2
    nearest = np.abs(centres).argmin()
    plateau = values_T[starts[nearest] : ends[nearest] + 1]
    return float(plateau[np.abs(plateau - centres[nearest]).argmin()])


def _confusion(labels_B: np.ndarray, predicted_B: np.ndarray, num_labels: int) -> np.ndarray:
    """Confusion matrix (K, K)."""
    return np.bincount(labels_B * num_labels + predicted_B, minlength=num_labels**2).reshape(num_labels, num_labels)


def _confusions(
    values_T: np.ndarray, threshold_B: np.ndarray, labels_B: np.ndarray, rival_B: np.ndarray, k: int, num_labels: int
) -> np.ndarray:
    """Confusion matrices (T, K, K) with each value, ascending, as the bias of class k: all documents are decided as their
    rivals at first, and from the first value above its threshold on a document is decided as k."""
    size = num_labels**2
    moved_at_B = np.searchsorted(values_T, threshold_B, side="right")
    moves_B = moved_at_B < len(values_T)
    from_B, to_B = labels_B * num_labels + rival_B, labels_B * num_labels + k
    start = np.bincount(from_B, minlength=size)
    lost, won = (
        np.bincount((moved_at_B * size + cell_B)[moves_B], minlength=len(values_T) * size) for cell_B in (from_B, to_B)
    )
    changes = (won - lost).reshape(len(values_T), size).cumsum(axis=0)
    return (start + changes).reshape(len(values_T), num_labels, num_labels)
