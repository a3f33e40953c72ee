"""Results of scripts.benchmark.quality as metrics and as a table.

B documents, K labels, R resamples.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmark.quality_measures import MultiLabelMeasures, SingleLabelMeasures
from scripts.common.markdown import markdown_table
from scripts.common.predictions_io import PredictedDocument, label_codes, read_predictions
from scripts.evaluation.statistics import Prediction, interval

REFERENCE = "tfidf_tuned"  # also for the number of flagged documents
WORDS = "words_alone"
FILE = "predictions_test.csv"
KINDS: dict[bool, type[SingleLabelMeasures] | type[MultiLabelMeasures]] = {
    False: SingleLabelMeasures,
    True: MultiLabelMeasures,
}


def figures(
    measures: SingleLabelMeasures | MultiLabelMeasures,
    folds_B: np.ndarray,
    seeds: Sequence[Prediction],
    measured: dict[str, np.ndarray],
    others: dict[str, dict[str, np.ndarray]],
) -> dict[str, Any]:
    """Metrics of a system, and their differences from others on the same documents: a paired bootstrap (Efron 1979).

    Args:
        measured, others: `measures.measured` of the system, and of the tuned TF-IDF and the lexical features alone.
    """

    def less(metric: str, other: str) -> dict[str, float]:
        difference = measured[metric] - others[other][metric]
        return (measures.f1_interval if metric == "f1_macro" else interval)(difference[0], difference[1:])

    rows = [np.flatnonzero(folds_B == fold) for fold in np.unique(folds_B)]
    by_fold = np.array([np.mean([measures.fold_f1(one, of_fold) for one in seeds]) for of_fold in rows])
    return {
        "seeds": len(seeds),
        "f1_macro": {"mean": by_fold.mean(), "deviation": by_fold.std(ddof=1) if len(by_fold) > 1 else 0.0},
        "by_fold": by_fold.tolist(),
        **{f"f1_macro_less_{other}": less("f1_macro", other) for other in others},
        **measures.own(seeds),
        measures.second: float(measured[measures.second][0]),
        f"{measures.second}_less_{REFERENCE}": less(measures.second, REFERENCE),
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


def summary(
    runs: Path, names: Sequence[str], seeds: dict[str, list[int]], is_multi_label: bool = False
) -> dict[str, Any]:
    """Metrics of each system on the folds that all systems have finished, and their differences from the tuned
    TF-IDF and from the lexical features alone.

    Args:
        seeds: system → seeds; the system is the name of its directory in `runs`. Both baselines are among them.
    """
    done, kind = finished_runs(runs, seeds), KINDS[is_multi_label]
    folds = sorted({fold for fold, _ in done[REFERENCE]})
    folds = [fold for fold in folds if all((fold, seed) in done[name] for name in seeds for seed in seeds[name])]
    about = {"folds": len(folds), "labels": list(names), "is_multi_label": is_multi_label}
    if not folds:
        return {**about, "systems": {}}
    labels: list[str] = []
    fold_of: list[int] = []
    rows: dict[str, list[list[PredictedDocument]]] = {
        name: [[] for _ in system_seeds] for name, system_seeds in seeds.items()
    }
    for fold in folds:
        reference = read_predictions(done[REFERENCE][fold, seeds[REFERENCE][0]] / FILE, names)
        labels += [document.label for document in reference.values()]
        fold_of += [fold] * len(reference)
        for name, system_seeds in seeds.items():
            for index, seed in enumerate(system_seeds):
                by_id = read_predictions(done[name][fold, seed] / FILE, names)
                rows[name][index] += [by_id[id_] for id_ in reference]
    predictions = {
        name: [
            Prediction(
                label_codes([row.predicted for row in of_seed], names, is_multi_label),
                np.array([row.scores_K for row in of_seed]),
            )
            for of_seed in by_seed
        ]
        for name, by_seed in rows.items()
    }
    folds_B = np.array(fold_of)
    measures = kind(names, label_codes(labels, names, is_multi_label), folds_B, predictions[REFERENCE][0])
    measured = {name: measures.measured(system) for name, system in predictions.items()}
    others = {name: measured[name] for name in (REFERENCE, WORDS)}
    systems = {
        name: figures(measures, folds_B, system, measured[name], others)
        | costs_of([path for (fold, _), path in done[name].items() if fold in folds])
        for name, system in predictions.items()
    }
    return {**about, "documents": len(labels), "systems": systems}


def markdown(measured: dict[str, Any]) -> str:
    """The results as a Markdown table, best system first."""
    if not measured["systems"]:
        return "No fold has been finished by all systems yet.\n"
    order = sorted(measured["systems"].items(), key=lambda item: -item[1]["f1_macro"]["mean"])
    names, systems = [name for name, _ in order], [system for _, system in order]
    kind = KINDS[measured["is_multi_label"]]

    def less(metric: str, other: str) -> list[str]:
        differences = [system[f"{metric}_less_{other}"] for system in systems]
        pairs = zip(names, differences, strict=True)
        return ["" if name == other else format_interval(difference) for name, difference in pairs]

    def known(key: str) -> list[str]:
        return ["" if system[key] is None else f"{system[key]:.0f}" for system in systems]

    columns = [
        ("", names),
        ("macro-F1 over folds", ["{mean:.3f} ± {deviation:.3f}".format(**system["f1_macro"]) for system in systems]),
        ("less tuned TF-IDF [95 %]", less("f1_macro", REFERENCE)),
        ("less words alone [95 %]", less("f1_macro", WORDS)),
        *kind.own_cells(measured["labels"], systems).items(),
        (kind.second_title.format(measured["labels"][-1]), [f"{system[kind.second]:.3f}" for system in systems]),
        ("less tuned TF-IDF [95 %]", less(kind.second, REFERENCE)),
        ("seeds", [str(system["seeds"]) for system in systems]),
        ("s per run", known("seconds")),
        ("peak MiB", known("peak_mib")),
    ]
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    note = f"{measured['documents']} documents in {measured['folds']} folds; ± is the standard deviation over folds; "
    note += "differences are over all documents together. "
    note += (
        "Run times of frozen encoders exclude the one-off encoding of all documents, but with the chunk policy lexical "
    )
    note += "the first seed of each fold encodes its own selection."
    if measured.get("first_chunk_length"):
        note += f" first_chunk and head_tail see chunks of {measured['first_chunk_length']} tokens."
    return f"{markdown_table([title for title, _ in columns], rows)}\n\n{note}\n"


def format_interval(value: dict[str, float]) -> str:
    shown = {name: f"{round(number, 3) + 0.0:+.3f}" for name, number in value.items()}  # + 0.0: not -0.000
    return "{value} [{low}, {high}]".format(**shown)
