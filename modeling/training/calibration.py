"""Calibration of a model's scores: temperature scaling and expected calibration error (Guo et al. 2017), and the weights of
the two parts of its logits.

B documents, K labels.
"""

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax


def smoothed_targets(labels_B: np.ndarray, num_labels: int) -> np.ndarray:
    """Targets (B, K), smoothed (Platt 1999): (B + 1) / (B + K) for the label, the rest shared by the other labels.

    This avoids overconfidence when a few documents are all classified correctly."""
    count = len(labels_B)
    target_BK = np.full((count, num_labels), 1 / (count + num_labels))
    target_BK[np.arange(count), labels_B] = (count + 1) / (count + num_labels)
    return target_BK


def fit_logit_weights(parts_PBK: np.ndarray, labels_B: np.ndarray, weights_K: np.ndarray | None = None) -> np.ndarray:
    """Fit weights (P,) ≥ 0 of P logits of the same documents, to maximize the likelihood of the labels under the softmax of
    their weighted sum: stacking with non-negative weights (Breiman 1996; Ting & Witten 1999).

    The documents must not have been trained on. Targets are smoothed as in `fit_temperature`. If no part tells anything,
    all weights are 1.

    Args:
        weights_K: class weights of the likelihood (None: equal).
    """
    parts_PBK = np.asarray(parts_PBK, dtype=np.float64)
    target_BK = smoothed_targets(labels_B, parts_PBK.shape[2])
    weight_B = np.ones(len(labels_B)) if weights_K is None else np.asarray(weights_K, dtype=np.float64)[labels_B]
    weight_B /= weight_B.sum()

    def loss(weights_P: np.ndarray) -> tuple[float, np.ndarray]:
        logits_BK = np.tensordot(weights_P, parts_PBK, axes=1)
        value = -float(weight_B @ (target_BK * log_softmax(logits_BK, axis=1)).sum(axis=1))
        slope_BK = weight_B[:, None] * (softmax(logits_BK, axis=1) - target_BK)
        return value, (parts_PBK * slope_BK).sum(axis=(1, 2))

    start_P = np.full(len(parts_PBK), 1 / len(parts_PBK))
    weights_P = minimize(loss, start_P, jac=True, bounds=[(0.0, None)] * len(parts_PBK), method="L-BFGS-B").x
    return weights_P if weights_P.max() > 1e-3 else np.ones(len(parts_PBK))


def gains_beyond_error(
    logits_BK: np.ndarray, others_BK: np.ndarray, labels_B: np.ndarray, weights_K: np.ndarray | None = None
) -> bool:
    """Whether the log loss of logits is lower than that of others by more than the standard error of the difference, as in
    the one-standard-error rule (Breiman et al. 1984).

    Args:
        weights_K: class weights of the loss (None: equal).
    """
    rows = np.arange(len(labels_B))
    weight_B = np.ones(len(labels_B)) if weights_K is None else np.asarray(weights_K, dtype=np.float64)[labels_B]
    weight_B /= weight_B.sum()
    gain_B = log_softmax(logits_BK, axis=1)[rows, labels_B] - log_softmax(others_BK, axis=1)[rows, labels_B]
    gain = weight_B @ gain_B
    return bool(gain > np.sqrt((weight_B**2 * (gain_B - gain) ** 2).sum()))


def fit_temperature(logits_BK: np.ndarray, labels_B: np.ndarray) -> float:
    """Fit the temperature T, from 0.05 to 20, that maximizes the likelihood of the labels under `softmax(logits / T)`, with
    smoothed targets."""
    logits = np.asarray(logits_BK, dtype=np.float64)
    target_BK = smoothed_targets(labels_B, logits.shape[1])

    def loss(log_temperature: float) -> float:
        return -float((target_BK * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def expected_calibration_error(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> float:
    """Mean |confidence − accuracy| over equal-width confidence bins, weighted by their number of documents."""
    error = 0.0
    for confidence, accuracy, share in reliability(scores_BK, labels_B, num_bins):
        error += share * abs(confidence - accuracy)
    return error


def reliability(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> list[tuple[float, float, float]]:
    """(mean confidence, accuracy, share of the documents) of each non-empty bin."""
    confidence, correct = scores_BK.max(axis=1), scores_BK.argmax(axis=1) == labels_B
    bin_B = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    members = [bin_B == number for number in range(num_bins)]
    return [(float(confidence[m].mean()), float(correct[m].mean()), float(m.mean())) for m in members if m.any()]
