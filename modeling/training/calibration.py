"""How far a model's scores can be believed, and the one number that mends them (Guo et al. 2017).

B documents, K labels.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax


def fit_temperature(logits_BK: np.ndarray, labels_B: np.ndarray) -> float:
    """The temperature T under which `softmax(logits / T)` gives the labels the greatest likelihood, from 0.05 to 20.

    A label counts as (B + 1) / (B + K) of certain, the others share the rest (Platt 1999): of a few documents that all are
    rated rightly it does not follow that the next one will be.
    """
    logits = np.asarray(logits_BK, dtype=np.float64)
    count, num_labels = logits.shape
    target_BK = np.full(logits.shape, 1 / (count + num_labels))
    target_BK[np.arange(count), labels_B] = (count + 1) / (count + num_labels)

    def loss(log_temperature: float) -> float:
        return -float((target_BK * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def expected_calibration_error(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over equal-width bins of confidence, weighted by their documents."""
    error = 0.0
    for confidence, accuracy, share in reliability(scores_BK, labels_B, num_bins):
        error += share * abs(confidence - accuracy)
    return error


def reliability(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> list[tuple[float, float, float]]:
    """(mean confidence, accuracy, share of the documents) of each bin that has any."""
    confidence, right = scores_BK.max(axis=1), scores_BK.argmax(axis=1) == labels_B
    bin_of = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    members = [bin_of == number for number in range(num_bins)]
    return [(float(confidence[m].mean()), float(right[m].mean()), float(m.mean())) for m in members if m.any()]
