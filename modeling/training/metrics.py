"""Classification metrics as an `evaluate.Metric` that works offline.

metric = ClassificationMetrics(["General", "Teen", "Mature"])
metric.compute(predictions=[0, 1, 2], references=[0, 1, 1])
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    hamming_loss,
    label_ranking_average_precision_score,
    precision_recall_fscore_support,
)
from transformers import EvalPrediction

from ..hierarchical_roberta.decision import MultiLabelDecision

OF_LABEL = ("precision", "recall", "f1", "average_precision")
# With more labels than this, their own metrics are not logged during training.
MOST_LOGGED_LABELS = 50


class ClassificationMetrics(evaluate.Metric):
    """Accuracy, F1 (macro, weighted, by severity), macro precision and recall, quadratic kappa, and per-class values.

    Computed with scikit-learn over all labels; absent labels score 0. `severity_f1` is the mean F1 of the classes
    weighted by `severity_weights`. `quadratic_kappa` (Cohen 1968) treats the labels as ordered.

    Args:
        label_names: labels in order; per-class values are named after them, e.g. `recall_Mature`.
        severity_weights: one weight per label (None: equal weights).
    """

    def __init__(self, label_names: Sequence[str], severity_weights: Sequence[float] | None = None, **kwargs: Any):
        self.label_names = list(label_names)
        self.severity_weights = list(severity_weights or [1.0] * len(self.label_names))
        if len(self.severity_weights) != len(self.label_names):
            raise ValueError(f"Got {len(self.severity_weights)} severity weights for {len(self.label_names)} labels.")
        check_label_names(self.label_names, classification_metrics([0], [0], [""], [1.0]))
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
    """Compute the values of `ClassificationMetrics` directly."""
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


def multi_label_metrics(
    predicted_BK: np.ndarray, labels_BK: np.ndarray, scores_BK: np.ndarray, label_names: Sequence[str]
) -> dict[str, float]:
    """Metrics of several labels a document, with scikit-learn: F1 (micro, macro, weighted, samples), subset accuracy, Hamming
    loss, label ranking average precision, mean average precision, and precision, recall, F1, average precision and support
    of each label.

    A label that no document has scores 0, but is left out of the mean average precision. A document without labels for
    which none are predicted counts 1 in `f1_samples`.

    Args:
        predicted_BK, labels_BK: 0 and 1.
        scores_BK: anything that ranks the documents of a label, and the labels of a document.
    """
    labels_BK = np.asarray(labels_BK).astype(np.int64)
    predicted_BK, scores_BK = np.asarray(predicted_BK).astype(np.int64), np.asarray(scores_BK, dtype=np.float64)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels_BK, predicted_BK, average=None, zero_division=0
    )
    has_both_K = (support > 0) & (support < len(labels_BK))
    average_precision = np.where(support == len(labels_BK), 1.0, 0.0)
    if has_both_K.any():
        # In Fortran's order: scikit-learn takes columns one by one, of 2,000 labels ten times as fast.
        columns = (np.asfortranarray(values_BK[:, has_both_K]) for values_BK in (labels_BK, scores_BK))
        average_precision[has_both_K] = average_precision_score(*columns, average=None)
    averages = {
        name: f1_score(labels_BK, predicted_BK, average=name, zero_division=0)
        for name in ("micro", "macro", "weighted")
    }
    samples = (
        2 * (labels_BK & predicted_BK).sum(axis=1) / np.maximum(labels_BK.sum(axis=1) + predicted_BK.sum(axis=1), 1)
    )
    samples[(labels_BK.sum(axis=1) == 0) & (predicted_BK.sum(axis=1) == 0)] = 1.0
    values = {f"f1_{name}": value for name, value in averages.items()}
    values |= {
        "f1_samples": samples.mean(),
        "subset_accuracy": accuracy_score(labels_BK, predicted_BK),
        "hamming_loss": hamming_loss(labels_BK, predicted_BK),
        "label_ranking_average_precision": label_ranking_average_precision_score(labels_BK, scores_BK),
        "average_precision_macro": average_precision[support > 0].mean() if support.any() else 0.0,
        "precision_macro": precision.mean(),
        "recall_macro": recall.mean(),
    }
    for i, name in enumerate(label_names):
        values |= {f"precision_{name}": precision[i], f"recall_{name}": recall[i], f"f1_{name}": f1[i]}
        values |= {f"average_precision_{name}": average_precision[i], f"support_{name}": support[i]}
    return {name: float(value) for name, value in values.items()}


def highest_macro(supports: Iterable[float]) -> float:
    """The highest possible macro-F1 where labels with a support of 0 count 0, rounded down to three digits."""
    has_documents = [support > 0 for support in supports]
    return np.floor(1000 * np.mean(has_documents)) / 1000


def absent_labels_note(metrics: Mapping[str, float]) -> str:
    """What to know about means over labels, of which some have no document (`support_LABEL` is 0); "" without such.

    >>> absent_labels_note({"support_a": 3, "support_b": 0})
    '1 of 2 labels has no document here and counts 0, so that it is at most 0.500'
    """
    supports = [value for name, value in metrics.items() if name.startswith("support_")]
    absent = sum(not value for value in supports)
    if not absent:
        return ""
    verbs = ("has", "counts") if absent == 1 else ("have", "count")
    return (
        f"{absent:,} of {len(supports):,} labels {verbs[0]} no document here and {verbs[1]} 0, so that it is at most "
        f"{highest_macro(supports):.3f}"
    )


def check_label_names(label_names: Sequence[str], overall: Iterable[str]) -> None:
    """Raise ValueError if a metric of a label has the name of one of all, such as `f1_macro`."""
    of_label = {f"{kind}_{name}" for kind in OF_LABEL for name in label_names}
    if duplicates := sorted(of_label & set(overall)):
        raise ValueError(f"Per-class metrics would overwrite {', '.join(duplicates)}: rename the label.")


def check_metric_name(name: str | None, known: Iterable[str], absent: Iterable[str] = ()) -> None:
    """Raise ValueError if `metric_for_best_model` is neither a known metric nor the loss, or that of a label in `absent`, which
    no validation document has."""
    names = ["loss", *(metric for metric in known if not metric.startswith("support_"))]
    if (metric := (name or "loss").removeprefix("eval_")) not in names:
        raise ValueError(f"`metric_for_best_model` must be one of {', '.join(names)}, got {name!r}.")
    for label in absent:
        if metric in [f"{kind}_{label}" for kind in OF_LABEL]:
            raise ValueError(
                f"`metric_for_best_model` {name!r}: no validation document is labelled {label}. Add documents to the "
                "validation split, or choose another metric."
            )


def quadratic_kappa(predictions: Sequence[int], references: Sequence[int], ids: Sequence[int]) -> float:
    """Quadratic weighted kappa of scikit-learn; 0 if a single class occurs in both, as by chance."""
    if len(set(predictions) | set(references)) < 2:
        return 0.0
    return cohen_kappa_score(references, predictions, labels=ids, weights="quadratic")


def compute_metrics_fn(
    label_names: Sequence[str], severity_weights: Sequence[float]
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Build the `compute_metrics` function for `Trainer`."""
    metric = ClassificationMetrics(label_names, severity_weights)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions.argmax(axis=-1), references=prediction.label_ids)

    return compute_metrics


def logged_labels(label_names: Sequence[str]) -> Sequence[str]:
    """Of several labels a document, those whose own metrics are logged during training: all, or none of many."""
    return label_names if len(label_names) <= MOST_LOGGED_LABELS else []


def multi_label_metrics_fn(label_names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics_fn` for several labels a document: of decisions at a score of 0.5 before calibration."""
    logged, decision = logged_labels(label_names), MultiLabelDecision()

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # A model that diverged has metrics too, as with one label a document; its loss is not finite.
        logits_BK = np.nan_to_num(prediction.predictions, nan=-1e4, posinf=1e4, neginf=-1e4)
        return multi_label_metrics(decision.decide(logits_BK), prediction.label_ids, logits_BK, logged)

    return compute_metrics
