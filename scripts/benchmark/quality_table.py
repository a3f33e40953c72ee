"""Results of scripts.benchmark.quality as metrics and as a table.

B documents, K labels, R resamples, S seeds.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.common.markdown import markdown_table
from scripts.evaluation.statistics import interval, metrics_of

NUM_RESAMPLES = 2000
REFERENCE = "tfidf_tuned"  # also for the number of flagged documents
WORDS = "words_alone"


@dataclass
class Predictions:
    """Scores (S, B, K) and predicted class ids (S, B) of a system, by seed."""

    scores_SBK: np.ndarray
    predicted_SB: np.ndarray


def read_predictions(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, int, np.ndarray]]:
    """id → (label id, predicted id, scores (K,)) from predictions_test.csv."""
    id_of = {name: k for k, name in enumerate(names)}
    with open(folder / "predictions_test.csv", encoding="utf-8", newline="") as file:
        return {
            row["id"]: (id_of[row["label"]], id_of[row["predicted"]], np.array([float(row[name]) for name in names]))
            for row in csv.DictReader(file)
        }


def macro_f1(labels_B: np.ndarray, predicted_B: np.ndarray, rows_RB: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Macro-F1 on each of R samples of documents, (R,)."""
    num_labels = len(names)
    cells_B = labels_B * num_labels + predicted_B
    confusion_RKK = np.stack([np.bincount(cells_B[rows], minlength=num_labels**2) for rows in rows_RB])
    return metrics_of(confusion_RKK.reshape(-1, num_labels, num_labels), names, [1.0] * num_labels)["f1_macro"]


def flagged(scores_BK: np.ndarray, folds_B: np.ndarray, counts: dict[int, int]) -> np.ndarray:
    """Flag the `counts[fold]` documents with the highest score of the most severe class per fold, (B,) of 0 and 1."""
    marked_B = np.zeros(len(scores_BK))
    for fold, count in counts.items():
        rows = np.flatnonzero(folds_B == fold)
        marked_B[rows[np.argsort(-scores_BK[rows, -1], kind="stable")[:count]]] = 1
    return marked_B


class PairedComparison:
    """Paired bootstrap comparison (Efron 1979) of systems with the tuned TF-IDF and with the lexical features alone, on
    the same documents."""

    def __init__(
        self,
        labels_B: np.ndarray,
        folds_B: np.ndarray,
        names: Sequence[str],
        reference: Predictions,
        words: Predictions,
    ):
        self.labels_B, self.folds_B, self.names = labels_B, folds_B, names
        self.is_most_severe_B = labels_B == len(names) - 1
        flagged_B = reference.predicted_SB[0] == len(names) - 1
        self.counts = {int(fold): int(flagged_B[folds_B == fold].sum()) for fold in np.unique(folds_B)}
        self.rows_RB = np.random.default_rng(0).integers(len(labels_B), size=(NUM_RESAMPLES, len(labels_B)))
        self.reference, self.words = self.measured(reference), self.measured(words)

    def measured(self, system: Predictions) -> dict[str, np.ndarray]:
        """`f1` and `missed_at_rate`, each (1 + R,): on all documents, then on each resample; means over seeds."""
        all_1B = np.arange(len(self.labels_B))[None]
        rows = (all_1B, self.rows_RB)
        f1 = [
            np.concatenate([macro_f1(self.labels_B, predicted_B, r, self.names) for r in rows])
            for predicted_B in system.predicted_SB
        ]
        caught_B = (
            np.mean([flagged(one, self.folds_B, self.counts) for one in system.scores_SBK], axis=0)
            * self.is_most_severe_B
        )
        missed = [1 - caught_B[r].sum(axis=1) / np.maximum(self.is_most_severe_B[r].sum(axis=1), 1) for r in rows]
        return {"f1": np.mean(f1, axis=0), "missed_at_rate": np.concatenate(missed)}

    def figures(self, system: Predictions) -> dict[str, Any]:
        """Metrics of a system and their differences from the tuned TF-IDF and from the lexical features alone."""
        measured = self.measured(system)
        f1_less_reference, f1_less_words = (measured["f1"] - other["f1"] for other in (self.reference, self.words))
        missed_less_reference = measured["missed_at_rate"] - self.reference["missed_at_rate"]
        by_fold = np.zeros(len(self.counts))
        for index, fold in enumerate(self.counts):
            rows_1B = np.flatnonzero(self.folds_B == fold)[None]
            f1 = [macro_f1(self.labels_B, one_B, rows_1B, self.names)[0] for one_B in system.predicted_SB]
            by_fold[index] = np.mean(f1)
        right_SB = system.predicted_SB == self.labels_B
        in_class = [self.labels_B == k for k in range(len(self.names))]
        return {
            "seeds": len(system.predicted_SB),
            "f1_macro": {"mean": by_fold.mean(), "deviation": by_fold.std(ddof=1) if len(by_fold) > 1 else 0.0},
            "by_fold": by_fold.tolist(),
            f"f1_macro_less_{REFERENCE}": interval(f1_less_reference[0], f1_less_reference[1:]),
            f"f1_macro_less_{WORDS}": interval(f1_less_words[0], f1_less_words[1:]),
            "recall": [float((right_SB & of_B).sum(axis=1).mean() / max(of_B.sum(), 1)) for of_B in in_class],
            "missed_at_rate": float(measured["missed_at_rate"][0]),
            f"missed_at_rate_less_{REFERENCE}": interval(missed_less_reference[0], missed_less_reference[1:]),
        }


def finished_runs(runs: Path, seeds: dict[str, list[int]]) -> dict[str, dict[tuple[int, int], Path]]:
    """system → (fold, seed) → directory of each finished run."""
    done: dict[str, dict[tuple[int, int], Path]] = {name: {} for name in seeds}
    for name, system_seeds in seeds.items():
        for path in sorted(runs.glob(f"{name}/fold-*-seed-*/cost.json")):
            number, run_seed = map(int, path.parent.name.split("-")[1::2])
            if run_seed in system_seeds:
                done[name][number, run_seed] = path.parent
    return done


def costs_of(folders: Sequence[Path]) -> dict[str, float | None]:
    """Mean duration and maximum peak memory of runs, if known."""
    costs = [json.loads((folder / "cost.json").read_text(encoding="utf-8")) for folder in folders]
    seconds = [cost["seconds"] for cost in costs if cost["seconds"] is not None]
    peaks = [cost["peak_mib"] for cost in costs if cost["peak_mib"] is not None]
    return {"seconds": float(np.mean(seconds)) if seconds else None, "peak_mib": max(peaks, default=None)}


def summary(runs: Path, names: Sequence[str], seeds: dict[str, list[int]]) -> dict[str, Any]:
    """Metrics of each system on the folds that all systems have finished, and their differences from the tuned
    TF-IDF and from the lexical features alone.

    `missed_at_rate` is the share of the most severe class that is not flagged when each fold flags as many documents,
    those with the highest score, as the tuned TF-IDF predicts to be of that class.

    Args:
        seeds: system → seeds; the system is the name of its directory in `runs`. Both baselines are among them.
    """
    done = finished_runs(runs, seeds)
    folds = sorted({fold for fold, _ in done[REFERENCE]})
    folds = [fold for fold in folds if all((fold, seed) in done[name] for name in seeds for seed in seeds[name])]
    if not folds:
        return {"folds": 0, "labels": list(names), "systems": {}}
    labels: list[int] = []
    fold_of: list[int] = []
    rows: dict[str, list[list[tuple[int, int, np.ndarray]]]] = {
        name: [[] for _ in system_seeds] for name, system_seeds in seeds.items()
    }
    for fold in folds:
        reference = read_predictions(done[REFERENCE][fold, seeds[REFERENCE][0]], names)
        labels += [label for label, *_ in reference.values()]
        fold_of += [fold] * len(reference)
        for name, system_seeds in seeds.items():
            for index, seed in enumerate(system_seeds):
                by_id = read_predictions(done[name][fold, seed], names)
                rows[name][index] += [by_id[id_] for id_ in reference]
    predictions = {
        name: Predictions(
            np.array([[scores_K for *_, scores_K in of_seed] for of_seed in by_seed]),
            np.array([[predicted for _, predicted, _ in of_seed] for of_seed in by_seed]),
        )
        for name, by_seed in rows.items()
    }
    comparison = PairedComparison(
        np.array(labels), np.array(fold_of), names, predictions[REFERENCE], predictions[WORDS]
    )
    systems = {
        name: comparison.figures(system) | costs_of([path for (fold, _), path in done[name].items() if fold in folds])
        for name, system in predictions.items()
    }
    return {"folds": len(folds), "documents": len(labels), "labels": list(names), "systems": systems}


def markdown(measured: dict[str, Any]) -> str:
    """The results as a Markdown table, best system first."""
    if not measured["systems"]:
        return "No fold has been finished by all systems yet.\n"
    most_severe = measured["labels"][-1]
    head = ["", "macro-F1 over folds", "less tuned TF-IDF [95 %]", "less words alone [95 %]"]
    head += [
        f"recall {' / '.join(measured['labels'])}",
        f"{most_severe} missed at the tuned TF-IDF's flag rate",
        "less tuned TF-IDF [95 %]",
        "seeds",
        "s per run",
        "peak MiB",
    ]
    rows = []
    order = sorted(measured["systems"].items(), key=lambda item: -item[1]["f1_macro"]["mean"])
    for name, system in order:
        f1 = system["f1_macro"]
        row = [
            name,
            f"{f1['mean']:.3f} ± {f1['deviation']:.3f}",
            "" if name == REFERENCE else format_interval(system[f"f1_macro_less_{REFERENCE}"]),
            "" if name == WORDS else format_interval(system[f"f1_macro_less_{WORDS}"]),
            " / ".join(f"{recall:.2f}" for recall in system["recall"]),
            f"{system['missed_at_rate']:.3f}",
            "" if name == REFERENCE else format_interval(system[f"missed_at_rate_less_{REFERENCE}"]),
            str(system["seeds"]),
            "" if system["seconds"] is None else f"{system['seconds']:.0f}",
            "" if system["peak_mib"] is None else f"{system['peak_mib']:.0f}",
        ]
        rows.append(row)
    note = f"{measured['documents']} documents in {measured['folds']} folds; ± is the standard deviation over folds. "
    note += (
        "Run times of frozen encoders exclude the one-off encoding of all documents, but with the chunk policy lexical "
    )
    note += "the first seed of each fold encodes its own selection."
    if measured.get("first_chunk_length"):
        note += f" first_chunk and head_tail see chunks of {measured['first_chunk_length']} tokens."
    return f"{markdown_table(head, rows)}\n\n{note}\n"


def format_interval(value: dict[str, float]) -> str:
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
