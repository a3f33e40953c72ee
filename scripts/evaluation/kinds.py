"""One label a document or several: chosen here once for an evaluation; and the baselines of a dataset."""

from collections.abc import Sequence

import datasets
import numpy as np

from data.labels import label_array
from scripts.evaluation.multi_label import MultiLabel
from scripts.evaluation.single_label import SingleLabel
from scripts.training import kinds as training_kinds


def kind_of(part: datasets.Dataset, severity_weights: str | None = None) -> SingleLabel | MultiLabel:
    """The kind of a prepared split, as `scripts.training.kinds.kind_of`."""
    kind = training_kinds.kind_of(part, severity_weights)
    if isinstance(kind, training_kinds.SingleLabel):
        return SingleLabel(kind.names, kind.severity)
    return MultiLabel(kind.names)


def baseline_metrics(
    splits: datasets.DatasetDict, evaluated: Sequence[str]
) -> tuple[dict[str, dict[str, dict[str, float]]], str]:
    """Metrics of TF-IDF (`tfidf`, `tfidf_tuned`) and of the most frequent class or labels (`majority`), fitted on `train`.

    Returns:
        `{split: {baseline: {metric: value}}}` for each of the `evaluated` splits; and what the tuned TF-IDF chose.
    """
    train, test = splits["train"], datasets.concatenate_datasets([splits[split] for split in evaluated])
    kind, labels = kind_of(train), label_array(test)
    predictions = {name: baseline(train, test) for name, baseline in kind.text_baselines().items()}
    ends = np.cumsum([len(splits[split]) for split in evaluated])
    metrics = {}
    for split, end in zip(evaluated, ends, strict=True):
        rows = slice(end - len(splits[split]), end)
        metrics[split] = {
            name: kind.metrics(each.predicted[rows], labels[rows], each.scores[rows])
            for name, each in predictions.items()
        }
    return metrics, predictions["tfidf_tuned"].options
