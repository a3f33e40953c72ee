"""What scripts.benchmark.quality measures of a system's predictions, with one label a document or several.

B documents, K labels, R resamples. A system has one prediction for each of its seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import f1_score

from modeling.training.metrics import multi_label_metrics
from scripts.evaluation import multi_label_statistics, statistics
from scripts.evaluation.statistics import NUM_RESAMPLES, Prediction, metrics_of


def flagged(scores_BK: np.ndarray, folds_B: np.ndarray, counts: dict[int, int]) -> np.ndarray:
    """Flag the `counts[fold]` documents with the highest score of the most severe class per fold, (B,) of 0 and 1."""
    marked_B = np.zeros(len(scores_BK))
    for fold, count in counts.items():
        rows = np.flatnonzero(folds_B == fold)
        marked_B[rows[np.argsort(-scores_BK[rows, -1], kind="stable")[:count]]] = 1
    return marked_B


def macro_f1(labels_B: np.ndarray, predicted_B: np.ndarray, rows_RB: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Macro-F1 on each of R samples of documents, (R,)."""
    num_labels = len(names)
    cells_B = labels_B * num_labels + predicted_B
    confusion_RKK = np.stack([np.bincount(cells_B[rows], minlength=num_labels**2) for rows in rows_RB])
    return metrics_of(confusion_RKK.reshape(-1, num_labels, num_labels), names, [1.0] * num_labels)["f1_macro"]


class SingleLabelMeasures:
    """Macro-F1, recall of each class, and the missed share of the most severe class.

    `missed_at_rate` is the share of the most severe class that is not flagged when each fold flags as many documents, those
    with the highest score, as the reference predicts to be of that class.
    """

    second, second_title = "missed_at_rate", "{} missed at the tuned TF-IDF's flag rate"
    f1_interval = staticmethod(statistics.interval)

    def __init__(self, names: Sequence[str], labels_B: np.ndarray, folds_B: np.ndarray, reference: Prediction):
        self.names, self.labels_B, self.folds_B = names, labels_B, folds_B
        self.is_most_severe_B = labels_B == len(names) - 1
        flagged_B = reference.predicted == len(names) - 1
        self.counts = {int(fold): int(flagged_B[folds_B == fold].sum()) for fold in np.unique(folds_B)}
        self.rows_RB = np.random.default_rng(0).integers(len(labels_B), size=(NUM_RESAMPLES, len(labels_B)))

    def measured(self, seeds: Sequence[Prediction]) -> dict[str, np.ndarray]:
        """`f1_macro` and `missed_at_rate`, each (1 + R,): on all documents, then on each resample; means over seeds."""
        rows = (np.arange(len(self.labels_B))[None], self.rows_RB)
        f1 = [np.concatenate([macro_f1(self.labels_B, one.predicted, r, self.names) for r in rows]) for one in seeds]
        flags = [flagged(one.scores, self.folds_B, self.counts) for one in seeds]
        caught_B = np.mean(flags, axis=0) * self.is_most_severe_B
        missed = [1 - caught_B[r].sum(axis=1) / np.maximum(self.is_most_severe_B[r].sum(axis=1), 1) for r in rows]
        return {"f1_macro": np.mean(f1, axis=0), "missed_at_rate": np.concatenate(missed)}

    def fold_f1(self, one: Prediction, rows: np.ndarray) -> float:
        """Macro-F1 on a fold, over the classes that occur in it."""
        return float(macro_f1(self.labels_B, one.predicted, rows[None], self.names)[0])

    def own(self, seeds: Sequence[Prediction]) -> dict[str, Any]:
        right_SB = np.stack([one.predicted == self.labels_B for one in seeds])
        in_class = [self.labels_B == k for k in range(len(self.names))]
        return {"recall": [float((right_SB & of_B).sum(axis=1).mean() / max(of_B.sum(), 1)) for of_B in in_class]}

    @staticmethod
    def own_cells(names: Sequence[str], systems: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
        """Title → cells of what only these predictions have."""
        return {f"recall {' / '.join(names)}": [" / ".join(f"{r:.2f}" for r in each["recall"]) for each in systems]}


class MultiLabelMeasures:
    """Macro-F1 and micro-F1."""

    second, second_title = "f1_micro", "micro-F1"
    f1_interval = staticmethod(multi_label_statistics.difference_interval)

    def __init__(self, names: Sequence[str], labels_BK: np.ndarray, folds_B: np.ndarray, reference: Prediction):
        self.labels_BK = labels_BK

    def measured(self, seeds: Sequence[Prediction]) -> dict[str, np.ndarray]:
        """`f1_macro` and `f1_micro`, each (1 + R,): on all documents, then on each resample; means over seeds."""
        names = ("f1_macro", "f1_micro")
        values = [multi_label_metrics(one.predicted, self.labels_BK, one.scores, []) for one in seeds]
        resampled = [multi_label_statistics.resampled_metrics(self.labels_BK, one, 0) for one in seeds]
        pairs = list(zip(values, resampled, strict=True))
        return {name: np.mean([np.append(value[name], rs[name]) for value, rs in pairs], axis=0) for name in names}

    def fold_f1(self, one: Prediction, rows: np.ndarray) -> float:
        """Macro-F1 on a fold, over the labels that occur in it."""
        labels_bK = self.labels_BK[rows]
        if not labels_bK.any():
            return 0.0
        return float(
            f1_score(labels_bK, one.predicted[rows], average=None, zero_division=0)[labels_bK.any(axis=0)].mean()
        )

    def own(self, seeds: Sequence[Prediction]) -> dict[str, Any]:
        return {}

    @staticmethod
    def own_cells(names: Sequence[str], systems: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
        return {}
