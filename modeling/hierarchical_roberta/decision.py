"""From logits to scores and labels. A document has one of K labels, or several of them.

B documents, S subsets of a document's chunks, K labels.
Pushed to the hub with the model, and part of an export to ONNX: imports nothing else from the project, nor torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MULTI_LABEL = "multi_label_classification"
THRESHOLD = 0.5


def decide(log_scores_BK: np.ndarray, class_biases: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Class ids (B,) of the highest `log_scores_BK + class_biases`; of equal ones the first.

    Args:
        log_scores_BK: log-probabilities, or anything that differs from them by a constant for each document, such as
            logits / temperature, (B, K).
        class_biases: (K,), see `modeling/training/decision.py`. None: the label with the highest score.
    """
    scores_BK = np.asarray(log_scores_BK, dtype=np.float64)
    if class_biases is not None:
        scores_BK = scores_BK + np.asarray(class_biases, dtype=np.float64)
    return scores_BK.argmax(axis=-1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), without overflow."""
    logits = np.asarray(logits, dtype=np.float64)
    return np.exp(-np.logaddexp(0.0, -logits))


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    """exp(logits) over their sum, (B, K), without overflow."""
    logits_BK = np.asarray(logits_BK, dtype=np.float64)
    odds_BK = np.exp(logits_BK - logits_BK.max(axis=-1, keepdims=True))
    return odds_BK / odds_BK.sum(axis=-1, keepdims=True)


@dataclass
class SingleLabelDecision:
    """The softmax of logits / temperature; the label with the highest log score plus class bias."""

    temperature: float | None = None
    class_biases: Sequence[float] | None = None
    function = "softmax"
    is_multi_label = False

    def calibrated(self, logits_BK: np.ndarray) -> np.ndarray:
        return np.asarray(logits_BK, dtype=np.float64) / (self.temperature or 1.0)

    def scores(self, logits_BK: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (B, K)."""
        return softmax(self.calibrated(logits_BK))

    def decide(self, logits_BK: np.ndarray) -> np.ndarray:
        """Class ids (B,)."""
        return decide(self.calibrated(logits_BK), self.class_biases)

    def labels_of(self, logits_K: np.ndarray) -> list[int]:
        """Ids of a document's labels: one."""
        return [self.first_label(logits_K)]

    def first_label(self, logits_K: np.ndarray) -> int:
        """The id that is a result's `label`: what is decided."""
        return int(self.decide(logits_K))

    def log_odds(self, logits_SK: np.ndarray, label: int) -> np.ndarray:
        """log p − log(1 − p) of a label, before calibration, (S,)."""
        logits_SK = np.asarray(logits_SK, dtype=np.float64)
        others_SK = np.delete(logits_SK, label, axis=-1)
        highest_S = others_SK.max(axis=-1)
        return logits_SK[:, label] - highest_S - np.log(np.exp(others_SK - highest_S[:, None]).sum(axis=-1))


@dataclass
class MultiLabelDecision:
    """The sigmoid of slope × logit + intercept, for each label (Platt 1999); every label whose score reaches its threshold.

    Attributes:
        label_calibration: slope and intercept of each label (None: 1 and 0).
        thresholds: of the scores (None: 0.5).
    """

    label_calibration: Sequence[Sequence[float]] | None = None
    thresholds: Sequence[float] | None = None
    function = "sigmoid"
    is_multi_label = True

    def calibrated(self, logits_BK: np.ndarray) -> np.ndarray:
        logits_BK = np.asarray(logits_BK, dtype=np.float64)
        if self.label_calibration is None:
            return logits_BK
        slope_K, intercept_K = np.asarray(self.label_calibration, dtype=np.float64).T
        return slope_K * logits_BK + intercept_K

    def scores(self, logits_BK: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (B, K); each is of its label alone."""
        return sigmoid(self.calibrated(logits_BK))

    def decide(self, logits_BK: np.ndarray) -> np.ndarray:
        """Whether a document has a label, (B, K)."""
        return self.scores(logits_BK) >= (THRESHOLD if self.thresholds is None else np.asarray(self.thresholds))

    def labels_of(self, logits_K: np.ndarray) -> list[int]:
        """Ids of a document's labels, those with the highest scores first; it may have none."""
        score_K = self.scores(logits_K)
        ids = np.flatnonzero(self.decide(logits_K))
        return ids[np.argsort(-score_K[ids], kind="stable")].tolist()

    def first_label(self, logits_K: np.ndarray) -> int:
        """The id that is a result's `label`: the highest score, whether or not it reaches its threshold."""
        return int(self.scores(logits_K).argmax())

    def log_odds(self, logits_SK: np.ndarray, label: int) -> np.ndarray:
        """log p − log(1 − p) of a label, before calibration, (S,)."""
        return np.asarray(logits_SK, dtype=np.float64)[:, label]


def decision_of(config: Any) -> SingleLabelDecision | MultiLabelDecision:
    """The decision that a model's config describes."""
    if getattr(config, "problem_type", None) == MULTI_LABEL:
        return MultiLabelDecision(config.label_calibration, config.thresholds)
    return SingleLabelDecision(config.temperature, config.class_biases)
