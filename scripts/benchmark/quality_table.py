"""What scripts.benchmark.quality measured, as figures and as a table.

B documents, K labels, R resamples, S seeds.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.evaluation.statistics import interval, metrics_of

NUM_RESAMPLES = 2000
REFERENCE = "tfidf"


def read_scores(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, np.ndarray]]:
    """id → (label, scores (K,)) from predictions_test.csv."""
    with open(folder / "predictions_test.csv", encoding="utf-8", newline="") as file:
        return {
            row["id"]: (list(names).index(row["label"]), np.array([float(row[name]) for name in names]))
            for row in csv.DictReader(file)
        }


def macro_f1(labels_B: np.ndarray, predicted_B: np.ndarray, rows_RB: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Macro-F1 of each of R choices of documents, (R,)."""
    num_labels = len(names)
    cells_B = labels_B * num_labels + predicted_B
    confusion_RKK = np.stack([np.bincount(cells_B[rows], minlength=num_labels**2) for rows in rows_RB])
    return metrics_of(confusion_RKK.reshape(-1, num_labels, num_labels), names, [1.0] * num_labels)["f1_macro"]


def flagged(scores_BK: np.ndarray, folds_B: np.ndarray, counts: dict[int, int]) -> np.ndarray:
    """In each fold the so many documents that have the highest score for the severest class, (B,) of 0 and 1."""
    marked_B = np.zeros(len(scores_BK))
    for fold, count in counts.items():
        rows = np.flatnonzero(folds_B == fold)
        marked_B[rows[np.argsort(-scores_BK[rows, -1], kind="stable")[:count]]] = 1
    return marked_B


def summary(runs: Path, names: Sequence[str]) -> dict[str, Any]:
    """Each contestant's figures over the folds that all of them have finished, and its difference to TF-IDF: a paired
    bootstrap over the documents (Efron 1979), of the mean over seeds.

    `missed_at_rate` is the share of the severest class that is not flagged when, in each fold, as many documents are
    flagged as TF-IDF rates so: those with the highest score.
    """
    done: dict[str, dict[tuple[int, int], Path]] = {}
    for path in sorted(runs.glob("*/fold-*-seed-*/cost.json")):
        number, run_seed = map(int, path.parent.name.split("-")[1::2])
        done.setdefault(path.parent.parent.name, {})[number, run_seed] = path.parent
    seeds = {name: sorted({seed for _, seed in of}) for name, of in done.items()}
    folds = sorted({fold for fold, _ in done[REFERENCE]})
    folds = [fold for fold in folds if all((fold, seed) in done[name] for name in done for seed in seeds[name])]
    if not folds:
        return {"folds": 0, "labels": list(names), "contestants": {}}
    ids: list[str] = []
    labels: list[int] = []
    fold_of: list[int] = []
    scores: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in of] for name, of in seeds.items()}
    for fold in folds:
        reference = read_scores(done[REFERENCE][fold, seeds[REFERENCE][0]], names)
        ids += list(reference)
        labels += [label for label, _ in reference.values()]
        fold_of += [fold] * len(reference)
        for name, folders in done.items():
            for place, seed in enumerate(seeds[name]):
                by_id = read_scores(folders[fold, seed], names)
                scores[name][place] += [by_id[id_][1] for id_ in reference]
    labels_B, folds_B = np.array(labels), np.array(fold_of)
    scores_SBK = {name: np.array(of) for name, of in scores.items()}
    rows_RB = np.random.default_rng(0).integers(len(ids), size=(NUM_RESAMPLES, len(ids)))
    own_1B = np.arange(len(ids))[None]
    severest_B = labels_B == len(names) - 1
    rated = scores_SBK[REFERENCE][0].argmax(axis=1) == len(names) - 1
    counts = {fold: int(rated[folds_B == fold].sum()) for fold in folds}
    caught = {
        name: np.mean([flagged(one, folds_B, counts) for one in of], axis=0) * severest_B
        for name, of in scores_SBK.items()
    }
    resampled = {}
    for name, of in scores_SBK.items():
        resampled[name] = np.mean([macro_f1(labels_B, one.argmax(axis=1), rows_RB, names) for one in of], axis=0)
    severest_R = np.maximum(severest_B[rows_RB].sum(axis=1), 1)
    contestants = {}
    for name, of in scores_SBK.items():
        by_fold = np.array(
            [
                np.mean(
                    [
                        macro_f1(labels_B, one.argmax(axis=1), np.flatnonzero(folds_B == fold)[None], names)[0]
                        for one in of
                    ]
                )
                for fold in folds
            ]
        )
        pooled = np.mean([macro_f1(labels_B, one.argmax(axis=1), own_1B, names)[0] for one in of])
        reference_pooled = macro_f1(labels_B, scores_SBK[REFERENCE][0].argmax(axis=1), own_1B, names)[0]
        missed = 1 - caught[name].sum() / max(severest_B.sum(), 1)
        reference_missed = 1 - caught[REFERENCE].sum() / max(severest_B.sum(), 1)
        missed_R = (caught[REFERENCE] - caught[name])[rows_RB].sum(axis=1) / severest_R
        costs = [
            json.loads((path / "cost.json").read_text()) for (fold, _), path in done[name].items() if fold in folds
        ]
        peaks = [cost["peak_mib"] for cost in costs if cost["peak_mib"] is not None]
        contestants[name] = {
            "seeds": len(of),
            "f1_macro": {
                "mean": float(by_fold.mean()),
                "deviation": float(by_fold.std(ddof=1)) if len(folds) > 1 else 0.0,
            },
            "by_fold": by_fold.tolist(),
            "f1_macro_less_tfidf": interval(pooled - reference_pooled, resampled[name] - resampled[REFERENCE]),
            "missed": float(np.mean([(one.argmax(axis=1) != len(names) - 1)[severest_B].mean() for one in of])),
            "missed_at_rate": float(missed),
            "missed_at_rate_less_tfidf": interval(missed - reference_missed, missed_R),
            "recall": [
                float(np.mean([(one.argmax(axis=1) == k)[labels_B == k].mean() for one in of]))
                for k in range(len(names))
            ],
            "seconds": float(np.mean([cost["seconds"] for cost in costs])),
            "peak_mib": max(peaks) if peaks else None,
        }
    return {"folds": len(folds), "documents": len(ids), "labels": list(names), "contestants": contestants}


def markdown(measured: dict[str, Any]) -> str:
    """The table, the best first."""
    if not measured["contestants"]:
        return "No fold is finished by all contestants yet.\n"
    severest = measured["labels"][-1]
    head = ["", "macro-F1, folds", "less TF-IDF [95 %]", f"recall {' / '.join(measured['labels'])}"]
    head += [f"{severest} missed at TF-IDF's flag rate", "less TF-IDF [95 %]", "seeds", "s a run", "peak MiB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    order = sorted(measured["contestants"].items(), key=lambda item: -item[1]["f1_macro"]["mean"])
    for name, of in order:
        f1 = of["f1_macro"]
        cells = [
            name,
            f"{f1['mean']:.3f} ± {f1['deviation']:.3f}",
            "" if name == REFERENCE else shown(of["f1_macro_less_tfidf"]),
            " / ".join(f"{recall:.2f}" for recall in of["recall"]),
            f"{of['missed_at_rate']:.3f}",
            "" if name == REFERENCE else shown(of["missed_at_rate_less_tfidf"]),
            str(of["seeds"]),
            f"{of['seconds']:.0f}",
            "" if of["peak_mib"] is None else f"{of['peak_mib']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = f"{measured['documents']} documents in {measured['folds']} folds; deviation between the folds."
    return "\n".join([*lines, "", note, ""])


def shown(value: dict[str, float]) -> str:
    return f"{value['value']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
