"""Calibration of a model's scores: temperature scaling and expected calibration error (Guo et al. 2017).

B documents, K labels.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def fit_temperature(logits_BK: np.ndarray, labels_B: np.ndarray) -> float:
    """Fit the temperature T, from 0.05 to 20, that maximizes the likelihood of the labels under `softmax(logits / T)`.

    Targets are smoothed (Platt 1999): (B + 1) / (B + K) for the label, the rest shared by the other labels. This avoids
    overconfidence when a few documents are all classified correctly.
    """
    logits = np.asarray(logits_BK, dtype=np.float64)
    count, num_labels = logits.shape
    target_BK = np.full(logits.shape, 1 / (count + num_labels))
    target_BK[np.arange(count), labels_B] = (count + 1) / (count + num_labels)

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
