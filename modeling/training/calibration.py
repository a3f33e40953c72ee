"""Calibration of a model's scores: temperature scaling and expected calibration error (Guo et al. 2017), and the weights of
the two parts of its logits.

B documents, K labels.
"""

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

# Of each label's calibration around the common one: the best of 1/16, 1/8, 1/4 and 1/2 by log loss on test documents, of 4 to 485 labels.
PRIOR_DEVIATION = 0.25


class Softmax:
    """The likelihood of one label a document: ids (B,)."""

    @staticmethod
    def scores(logits_BK: np.ndarray) -> np.ndarray:
        return softmax(logits_BK, axis=1)

    @staticmethod
    def losses(logits_BK: np.ndarray, target_BK: np.ndarray) -> np.ndarray:
        """Cross entropy of targets, (B, K), of a document the sum over the labels."""
        return -target_BK * log_softmax(logits_BK, axis=1)

    @staticmethod
    def targets(labels_B: np.ndarray, num_labels: int) -> np.ndarray:
        return np.eye(num_labels)[labels_B]

    @staticmethod
    def smoothed_targets(labels_B: np.ndarray, num_labels: int) -> np.ndarray:
        """Targets (B, K), smoothed (Platt 1999): (B + 1) / (B + K) for the label, the rest shared by the other labels.

        This avoids overconfidence when a few documents are all classified correctly."""
        count = len(labels_B)
        target_BK = np.full((count, num_labels), 1 / (count + num_labels))
        target_BK[np.arange(count), labels_B] = (count + 1) / (count + num_labels)
        return target_BK

    @staticmethod
    def weights(labels_B: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """Weight of each document, (B, 1)."""
        return weights_K[labels_B][:, None]


class Sigmoids:
    """The likelihood of several labels a document: 0 and 1, (B, K)."""

    scores = staticmethod(expit)

    @staticmethod
    def losses(logits_BK: np.ndarray, target_BK: np.ndarray) -> np.ndarray:
        """Binary cross entropy of targets, (B, K)."""
        return -(target_BK * log_expit(logits_BK) + (1 - target_BK) * log_expit(-logits_BK))

    @staticmethod
    def targets(labels_BK: np.ndarray, num_labels: int) -> np.ndarray:
        return labels_BK

    @staticmethod
    def smoothed_targets(labels_BK: np.ndarray, num_labels: int) -> np.ndarray:
        """Targets (B, K), smoothed (Platt 1999): of a label with P documents and N others (P + 1) / (P + 2) and 1 / (N + 2)."""
        is_BK = np.asarray(labels_BK) == 1
        num_K = is_BK.sum(axis=0)
        return np.where(is_BK, (num_K + 1) / (num_K + 2), 1 / (len(is_BK) - num_K + 2))

    @staticmethod
    def weights(labels_BK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """Weight of each document's labels, (B, K): only those that it has are weighted."""
        return np.where(labels_BK == 1, weights_K, 1.0)


def likelihood_of(labels: np.ndarray) -> type[Softmax] | type[Sigmoids]:
    """The likelihood of labels: ids (B,), or with several labels a document 0 and 1 (B, K)."""
    return Softmax if labels.ndim == 1 else Sigmoids


def _weights_of(labels: np.ndarray, weights_K: np.ndarray | None, num_labels: int) -> np.ndarray:
    """Weights of documents (B, 1) or of their labels (B, K), which sum to 1."""
    weights_K = np.ones(num_labels) if weights_K is None else np.asarray(weights_K, dtype=np.float64)
    weight = likelihood_of(labels).weights(labels, weights_K)
    return weight / weight.sum()


def fit_logit_weights(parts_PBK: np.ndarray, labels: np.ndarray, weights_K: np.ndarray | None = None) -> np.ndarray:
    """Fit weights (P,) ≥ 0 of P logits of the same documents, to maximize the likelihood of the labels under the softmax of
    their weighted sum: stacking with non-negative weights (Breiman 1996; Ting & Witten 1999).

    The documents must not have been trained on. Targets are smoothed as in `fit_temperature`. If no part tells anything,
    all weights are 1.

    Args:
        labels: ids (B,), or with several labels a document 0 and 1 (B, K), of which the likelihood is under sigmoids.
        weights_K: class weights of the likelihood (None: equal).
    """
    parts_PBK, likelihood = np.asarray(parts_PBK, dtype=np.float64), likelihood_of(labels)
    num_labels = parts_PBK.shape[2]
    target_BK = likelihood.smoothed_targets(labels, num_labels)
    weight = _weights_of(labels, weights_K, num_labels)

    def loss(weights_P: np.ndarray) -> tuple[float, np.ndarray]:
        logits_BK = np.tensordot(weights_P, parts_PBK, axes=1)
        slope_BK = weight * (likelihood.scores(logits_BK) - target_BK)
        value = float((weight * likelihood.losses(logits_BK, target_BK)).sum())
        return value, (parts_PBK * slope_BK).sum(axis=(1, 2))

    start_P = np.full(len(parts_PBK), 1 / len(parts_PBK))
    weights_P = minimize(loss, start_P, jac=True, bounds=[(0.0, None)] * len(parts_PBK), method="L-BFGS-B").x
    return weights_P if weights_P.max() > 1e-3 else np.ones(len(parts_PBK))


def weighted_log_loss(logits_BK: np.ndarray, labels: np.ndarray, weights_K: np.ndarray | None = None) -> float:
    """Mean log loss, weighted as in `fit_logit_weights`."""
    likelihood, num_labels = likelihood_of(labels), logits_BK.shape[1]
    loss_BK = likelihood.losses(logits_BK, likelihood.targets(labels, num_labels))
    return float((_weights_of(labels, weights_K, num_labels) * loss_BK).sum())


def gains_beyond_error(
    logits_BK: np.ndarray, others_BK: np.ndarray, labels: np.ndarray, weights_K: np.ndarray | None = None
) -> bool:
    """Whether the log loss of logits is lower than that of others by more than the standard error of the difference over
    documents, as in the one-standard-error rule (Breiman et al. 1984).

    Args:
        labels: as for `fit_logit_weights`.
        weights_K: class weights of the loss (None: equal).
    """
    likelihood, num_labels = likelihood_of(labels), logits_BK.shape[1]
    weight, target_BK = _weights_of(labels, weights_K, num_labels), likelihood.targets(labels, num_labels)
    gain_BK = weight * (likelihood.losses(others_BK, target_BK) - likelihood.losses(logits_BK, target_BK))
    mean = gain_BK.sum()
    deviation_B = gain_BK.sum(axis=1) - mean * weight.sum(axis=1)
    return bool(mean > np.sqrt((deviation_B**2).sum()))


def fit_temperature(logits_BK: np.ndarray, labels_B: np.ndarray) -> float:
    """Fit the temperature T, from 0.05 to 20, that maximizes the likelihood of the labels under `softmax(logits / T)`, with
    smoothed targets."""
    logits = np.asarray(logits_BK, dtype=np.float64)
    target_BK = Softmax.smoothed_targets(labels_B, logits.shape[1])

    def loss(log_temperature: float) -> float:
        return -float((target_BK * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))


def fit_label_calibration(logits_BK: np.ndarray, labels_BK: np.ndarray) -> np.ndarray:
    """Fit the slope (from 0.05 to 20) and intercept of each label, (K, 2), that are most likely a posteriori under
    `sigmoid(slope × logit + intercept)` (Platt 1999).

    The prior is normal around the slope and intercept that fit all labels together (with smoothed targets), with the deviation
    `PRIOR_DEVIATION`, of the slope relative to the common one. Few documents say little about a rare label: its scores stay
    comparable with those of the others, and one threshold suits them all."""
    logits_BK = np.asarray(logits_BK, dtype=np.float64)
    size = logits_BK.shape[1]
    target_BK = np.asarray(labels_BK, dtype=np.float64)
    smoothed_BK = Sigmoids.smoothed_targets(target_BK.reshape(-1, 1), 1).reshape(target_BK.shape)
    limits, options = (0.05, 20.0), {"maxiter": 500, "ftol": 1e-12}

    def loss(parameters: np.ndarray, target_BK: np.ndarray) -> tuple[float, np.ndarray]:
        """Loss of slopes and intercepts, and its derivatives by those of each label, (2, K)."""
        scaled_BK = parameters[0] * logits_BK + parameters[1]
        difference_BK = expit(scaled_BK) - target_BK
        value = float(Sigmoids.losses(scaled_BK, target_BK).sum())
        return value, np.stack([(difference_BK * logits_BK).sum(axis=0), difference_BK.sum(axis=0)])

    def common_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        value, derivatives_2K = loss(parameters, smoothed_BK)
        return value, derivatives_2K.sum(axis=1)

    bounds = [limits, (None, None)]
    common = minimize(common_loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options=options).x
    scale = PRIOR_DEVIATION * np.array([common[0], 1.0])

    def penalized_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        parameters_2K = parameters.reshape(2, size)
        value, derivatives_2K = loss(parameters_2K, target_BK)
        away_2K = (parameters_2K - common[:, None]) / scale[:, None]
        return value + (away_2K**2).sum() / 2, (derivatives_2K + away_2K / scale[:, None]).ravel()

    # Labels do not depend on each other, but some hundreds of them are fitted faster together.
    bounds = [limits] * size + [(None, None)] * size
    start = np.repeat(common, size)
    fitted = minimize(penalized_loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options=options).x
    return fitted.reshape(2, size).T


def expected_calibration_error(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> float:
    """Mean |confidence − accuracy| over equal-width confidence bins, weighted by their number of documents."""
    return calibration_error(reliability(scores_BK, labels_B, num_bins))


def calibration_error(bins: list[tuple[float, float, float]]) -> float:
    """Mean |confidence − accuracy| over bins of `reliability` or `binary_reliability`, weighted by their share."""
    error = 0.0
    for confidence, accuracy, share in bins:
        error += share * abs(confidence - accuracy)
    return error


def reliability(scores_BK: np.ndarray, labels_B: np.ndarray, num_bins: int = 15) -> list[tuple[float, float, float]]:
    """(mean confidence, accuracy, share of the documents) of each non-empty bin."""
    return binary_reliability(scores_BK.max(axis=1), scores_BK.argmax(axis=1) == labels_B, num_bins)


def binary_reliability(
    score_B: np.ndarray, label_B: np.ndarray, num_bins: int = 15
) -> list[tuple[float, float, float]]:
    """(mean score, share of 1 among the labels 0 and 1, share of the documents) of each non-empty equal-width bin of a score
    of one label."""
    bin_B = np.minimum((score_B * num_bins).astype(int), num_bins - 1)
    members = [bin_B == number for number in range(num_bins)]
    return [(float(score_B[m].mean()), float(label_B[m].mean()), float(m.mean())) for m in members if m.any()]
