"""The project's metric: an `evaluate.Metric` that needs no network.

metric = ClassificationMetrics(["General", "Teen", "Mature"])
metric.compute(predictions=[0, 1, 2], references=[0, 1, 1])
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, cohen_kappa_score, precision_recall_fscore_support
from transformers import EvalPrediction


class ClassificationMetrics(evaluate.Metric):
    """Accuracy, F1 (macro, weighted, by severity), macro precision and recall, quadratic kappa, and each class's own.

    Values are scikit-learn's over all labels, an absent one included (as 0). `severity_f1` is the mean of the classes'
    F1 under `severity_weights`. `quadratic_kappa` (Cohen 1968) takes the labels as ordered.

    Args:
        label_names: in their order; classes' own values are named after them, as in `recall_Mature`.
        severity_weights: one a label (None: equal ones).
    """

    def __init__(self, label_names: Sequence[str], severity_weights: Sequence[float] | None = None, **kwargs: Any):
        self.label_names = list(label_names)
        self.severity_weights = list(severity_weights or [1.0] * len(self.label_names))
        if len(self.severity_weights) != len(self.label_names):
            raise ValueError(
                f"There are {len(self.severity_weights)} severity weights for {len(self.label_names)} labels."
            )
        overall = classification_metrics([0], [0], [""], [1.0])
        of_each = [f"{kind}_{name}" for kind in ("precision", "recall", "f1") for name in self.label_names]
        if taken := [name for name in of_each if name in overall]:
            raise ValueError(
                f"A class's own {', '.join(taken)} would stand for that of all classes: give the label another name."
            )
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions and references: class ids",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return classification_metrics(predictions, references, self.label_names, self.severity_weights)


def classification_metrics(
    predictions: Sequence[int], references: Sequence[int], label_names: Sequence[str], severity_weights: Sequence[float]
) -> dict[str, float]:
    """The values of `ClassificationMetrics`, without its bookkeeping."""
    ids = list(range(len(label_names)))
    precision, recall, f1, support = precision_recall_fscore_support(
        references, predictions, labels=ids, zero_division=0
    )
    weights = np.asarray(severity_weights, dtype=float)
    values = {
        "accuracy": accuracy_score(references, predictions),
        "f1_macro": f1.mean(),
        "f1_weighted": float(f1 @ support / max(support.sum(), 1)),
        "precision_macro": precision.mean(),
        "recall_macro": recall.mean(),
        "quadratic_kappa": quadratic_kappa(predictions, references, ids),
        "severity_f1": float(f1 @ weights / weights.sum()),
    }
    for i, name in enumerate(label_names):
        values |= {f"precision_{name}": precision[i], f"recall_{name}": recall[i], f"f1_{name}": f1[i]}
        values[f"support_{name}"] = support[i]
    return {name: float(value) for name, value in values.items()}


def check_metric_name(name: str | None, label_names: Sequence[str]) -> None:
    """Raises ValueError where `metric_for_best_model` is none of the project's metrics, nor the loss."""
    weights = [1.0] * len(label_names)
    names = ["loss", *classification_metrics([0], [0], label_names, weights)]
    if (name or "loss").removeprefix("eval_") not in names:
        raise ValueError(f"metric_for_best_model is {name!r}; expected one of {', '.join(names)}.")


def quadratic_kappa(predictions: Sequence[int], references: Sequence[int], ids: Sequence[int]) -> float:
    """Scikit-learn's, and 0 where only one class occurs in both: agreement that chance explains."""
    if len(set(predictions) | set(references)) < 2:
        return 0.0
    return cohen_kappa_score(references, predictions, labels=ids, weights="quadratic")


def compute_metrics_fn(
    label_names: Sequence[str], severity_weights: Sequence[float]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """What `Trainer` takes as `compute_metrics`."""
    metric = ClassificationMetrics(label_names, severity_weights)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids)

    return compute_metrics
