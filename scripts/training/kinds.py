"""One label a document or several: what training does differently, chosen here once for a run.

B documents, K labels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import torch
from scipy.special import log_softmax
from transformers import EvalPrediction

from data.documents import shorten
from data.labels import MULTI, SINGLE, is_multi_label, label_names
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.decision import decide
from modeling.training.calibration import fit_temperature
from modeling.training.decision_metric import (
    check_decision_metric,
    fit_decision,
    no_recall_message,
    parse_decision_metric,
)
from modeling.training.losses import balanced_class_weights, balanced_positive_weights
from modeling.training.metrics import (
    check_label_names,
    check_metric_name,
    classification_metrics,
    compute_metrics_fn,
    logged_labels,
    multi_label_metrics,
    multi_label_metrics_fn,
)
from modeling.training.monitor import extreme_weights_message
from modeling.training.thresholds import fit_multi_label_decision, parse_threshold_metric
from modeling.training.training_args import HierarchicalTrainingArguments, parse_severity_weights

logger = logging.getLogger("train_hf")


@dataclass
class SingleLabel:
    """Training with one label a document, an id.

    Attributes:
        names: label names, mildest first.
        severity: weight of each label in `severity_f1`.
    """

    names: list[str]
    severity: list[float]
    problem_type: ClassVar[str] = SINGLE
    is_multi_label: ClassVar[bool] = False

    def check(self, args: HierarchicalTrainingArguments, validation_labels_B: np.ndarray) -> None:
        """Raise ValueError if `metric_for_best_model` or `decision_metric` is invalid, or cannot be measured on validation."""
        absent = [name for k, name in enumerate(self.names) if k not in validation_labels_B]
        known = classification_metrics([0], [0], self.names, self.severity)
        check_metric_name(args.metric_for_best_model, known, absent)
        check_decision_metric(args.decision_metric, self.names, validation_labels_B)

    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return compute_metrics_fn(self.names, self.severity)

    def balanced_weights(self, count_of: dict[str, int], num_documents: int) -> torch.Tensor:
        return balanced_class_weights(count_of)

    def weights_message(self, weight_of: dict[str, float], count_of: dict[str, int]) -> str | None:
        return extreme_weights_message(weight_of, count_of)

    def fit_decision(
        self, config: HierarchicalRobertaConfig, metric: str | None, logits_BK: np.ndarray, labels_B: np.ndarray
    ) -> None:
        """Fit in `config`, on validation documents, the temperature and the class biases of `decision_metric`, if any."""
        config.temperature = fit_temperature(logits_BK, labels_B)
        logger.info(f"Scores are softmax(logits / {config.temperature:.3f}), fitted on validation.")
        if metric is not None:
            self.choose_class_biases(config, metric, logits_BK, labels_B)

    def choose_class_biases(
        self, config: HierarchicalRobertaConfig, text: str, logits_BK: np.ndarray, labels_B: np.ndarray
    ) -> None:
        """Set the class biases in `config` that are best by a decision metric on validation documents."""
        metric = parse_decision_metric(text, self.names)
        log_scores_BK = log_softmax(logits_BK / config.temperature, axis=1)
        config.class_biases = fit_decision(metric, log_scores_BK, labels_B, self.severity).tolist()
        config.decision_metric = text
        before, after = (
            classification_metrics(decide(log_scores_BK, biases).tolist(), labels_B.tolist(), self.names, self.severity)
            for biases in (None, config.class_biases)
        )
        biases = ", ".join(f"{name} {bias:+.3f}" for name, bias in zip(self.names, config.class_biases, strict=True))
        recall = f"recall_{self.names[-1 if metric.label is None else metric.label]}"
        changes = ", ".join(
            f"{name} {before[name]:.4f} → {after[name]:.4f}"
            for name in dict.fromkeys(["f1_macro", metric.name, recall])
        )
        logger.info(f"Class biases for {text}, fitted on validation: {biases}; there {changes}.")
        if after[recall] < metric.recall - 1e-9:
            logger.warning(f"No class bias reaches {text} on validation.")

    def fitted(self, config: HierarchicalRobertaConfig) -> str:
        """What was fitted on validation and changes decisions; "" if nothing."""
        return "" if config.class_biases is None else "class biases"

    def metrics(self, predicted_B: np.ndarray, labels_B: np.ndarray, scores_BK: np.ndarray) -> dict[str, float]:
        return classification_metrics(predicted_B.tolist(), labels_B.tolist(), self.names, self.severity)


@dataclass
class MultiLabel:
    """Training with several labels a document: 0 and 1, (B, K).

    Attributes:
        names: label names in order.
    """

    names: list[str]
    problem_type: ClassVar[str] = MULTI
    is_multi_label: ClassVar[bool] = True

    def __post_init__(self) -> None:
        none_BK = np.zeros((1, 2), dtype=np.int64)
        check_label_names(self.names, multi_label_metrics(none_BK, none_BK, none_BK, []))

    def check(self, args: HierarchicalTrainingArguments, validation_labels_BK: np.ndarray) -> None:
        """Raise ValueError if `metric_for_best_model` or `decision_metric` is invalid, or a recall of a label that no validation
        document has."""
        none_BK = np.zeros((1, len(self.names)), dtype=np.int64)
        known = multi_label_metrics(none_BK, none_BK, none_BK, logged_labels(self.names))
        without = [name for k, name in enumerate(self.names) if not validation_labels_BK[:, k].any()]
        check_metric_name(args.metric_for_best_model, known, without)
        metric = args.decision_metric or "f1_macro"
        _, recalls = parse_threshold_metric(metric, self.names)
        absent = [self.names[k] for k in recalls if self.names[k] in without]
        if absent and len(recalls) == 1:
            raise ValueError(no_recall_message(metric, absent[0]))
        if absent:
            logger.warning(f"No validation document has {shorten(absent)}: no threshold is chosen there for a recall.")

    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return multi_label_metrics_fn(self.names)

    def balanced_weights(self, count_of: dict[str, int], num_documents: int) -> torch.Tensor:
        return balanced_positive_weights(list(count_of.values()), num_documents)

    def weights_message(self, weight_of: dict[str, float], count_of: dict[str, int]) -> None:
        """None: high weights are usual where most labels are rare."""

    def fit_decision(
        self, config: HierarchicalRobertaConfig, metric: str | None, logits_BK: np.ndarray, labels_BK: np.ndarray
    ) -> None:
        """Fit in `config`, on validation documents, the calibration and the threshold of each label."""
        config.decision_metric = metric or "f1_macro"
        config.label_calibration, config.thresholds = fit_multi_label_decision(
            logits_BK, labels_BK, *parse_threshold_metric(config.decision_metric, self.names)
        )
        listed = [f"{name} {value:.3f}" for name, value in zip(self.names, config.thresholds, strict=True)]
        logger.info(
            f"Scores are calibrated for each label, and thresholds chosen for {config.decision_metric}, on validation: "
            f"{shorten(listed, 20)}."
        )

    def fitted(self, config: HierarchicalRobertaConfig) -> str:
        """What was fitted on validation and changes decisions."""
        return "thresholds"

    def metrics(self, predicted_BK: np.ndarray, labels_BK: np.ndarray, scores_BK: np.ndarray) -> dict[str, float]:
        return multi_label_metrics(predicted_BK, labels_BK, scores_BK, self.names)


def kind_of(part: datasets.Dataset, severity_weights: str | None = None) -> SingleLabel | MultiLabel:
    """The kind of a prepared split.

    Args:
        severity_weights: see `parse_severity_weights`.

    Raises:
        ValueError: invalid severity weights, or some for several labels a document; or, there, a label named `macro` or the
            like, whose metrics would overwrite others.
    """
    names = label_names(part)
    if not is_multi_label(part):
        return SingleLabel(names, parse_severity_weights(severity_weights, len(names)))
    if severity_weights is not None:
        raise ValueError("`severity_weights` are for one label a document, and these have several: leave them out.")
    return MultiLabel(names)
