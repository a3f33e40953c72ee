"""Compare runs: results, options that differ, and cost.

    python -m scripts.compare_runs outputs/one outputs/other [--split validation] [--output_dir outputs/comparison]

Prints Markdown; with --output_dir writes comparison.md, comparison.html (one self-contained page) and curves.png.
Differences are relative to the first run, on the documents predicted by both, with paired 95 % bootstrap intervals.
"""

import argparse
import base64
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from data.labels import MULTI
from modeling.file_utils import write_text
from scripts.common.cli import UserParser, run_main
from scripts.common.markdown import markdown_table
from scripts.common.predictions_io import PredictedDocument, label_codes, read_predictions
from scripts.evaluation.figures import learning_curves_figure
from scripts.evaluation.multi_label import MultiLabel
from scripts.evaluation.single_label import SingleLabel
from scripts.evaluation.statistics import Prediction

# Arguments that always differ between runs.
IGNORED_KEYS = {"output_dir", "run_name", "started", "command", "logging_dir", "data_sources", "precision_reason"}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title>
<style>
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; font: 1rem/1.55 system-ui, sans-serif; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } img { max-width: 100%; background: #fff; border-radius: 6px; }
p { color: GrayText; max-width: 50rem; }
</style></head><body><h1>{{ title }}</h1>
{% for table in tables %}<h2>{{ table.title }}</h2><p>{{ table.note }}</p>
<div class="scroll"><table><thead><tr>{% for cell in table.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>{% endfor %}
<h2>Learning curves</h2><img alt="Loss and macro-F1 of each run by epoch" src="data:image/png;base64,{{ curves }}"></body></html>
"""


@dataclass
class Run:
    """A run, as read from its directory.

    Attributes:
        predictions: documents of the compared split by id; empty if the run has none.
    """

    name: str
    history: dict[str, Any]
    metrics: dict[str, float]
    predictions: dict[str, PredictedDocument]
    labels: list[str]

    @property
    def is_multi_label(self) -> bool:
        return self.history["config"].get("problem_type") == MULTI

    @property
    def kind(self) -> SingleLabel | MultiLabel:
        return MultiLabel(self.labels) if self.is_multi_label else SingleLabel(self.labels, [1.0] * len(self.labels))

    def compared(self) -> list[str]:
        """The metrics of the table."""
        if self.is_multi_label:
            return ["f1_macro", "f1_micro", "f1_samples", "subset_accuracy", "average_precision_macro"]
        return ["f1_macro", "accuracy", "severity_f1", "quadratic_kappa", f"recall_{self.labels[-1]}"]

    def predicted(self, ids: Iterable[str]) -> tuple[Prediction, np.ndarray]:
        """The prediction of documents, and their labels."""
        rows = [self.predictions[id_] for id_ in ids]
        labels, predicted = (
            label_codes(cells, self.labels, self.is_multi_label)
            for cells in ([row.label for row in rows], [row.predicted for row in rows])
        )
        return Prediction(predicted, np.array([row.scores_K for row in rows])), labels


def kind_of(runs: Sequence[Run]) -> SingleLabel | MultiLabel:
    """How the runs are compared. Raises ValueError if only some have several labels a document."""
    kinds = {run.is_multi_label: run.name for run in runs}
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds[True]} gives a document several labels and {kinds[False]} one: they cannot be compared. Compare runs of "
            "one kind."
        )
    return runs[0].kind


@dataclass
class Table:
    """A table with a title and an explanatory note."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        return f"## {self.title}\n\n{self.note}\n\n{markdown_table(self.head, self.rows)}"


def read_run(folder: Path, name: str, split: str) -> Run:
    """Read a run's directory. Raises ValueError if it is not one."""
    path = folder / "training_history.json"
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        labels = history["config"]["labels"]
        history["epochs"][0]["train_loss"]
    except OSError:
        raise ValueError(f"{folder} is not a run: it has no training_history.json.") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"{path} is not the history of a run with at least one evaluation.") from None
    predictions, metrics = {}, {}
    if (folder / f"predictions_{split}.csv").is_file():
        predictions = read_predictions(folder / f"predictions_{split}.csv", labels)
    if (folder / "metrics.json").is_file():
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get(split, {})
    return Run(name, history, metrics, predictions, labels)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Directory names, or full paths if the names are not unique."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def differences_table(runs: Sequence[Run]) -> Table:
    """Arguments that differ between the runs."""
    configs = [{key: value for key, value in run.history["config"].items() if key not in IGNORED_KEYS} for run in runs]
    keys = sorted({key for config in configs for key in config})
    differ = [key for key in keys if len({json.dumps(config.get(key), sort_keys=True) for config in configs}) > 1]
    rows = [[key, *(shorten(config.get(key, "–")) for config in configs)] for key in differ]
    note = f"{len(keys) - len(differ)} {'other ' if differ else ''}arguments and facts are the same in all runs."
    return Table("Differences", note, ["", *(run.name for run in runs)], rows)


def shorten(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else text[: length - 1] + "…"


def results_table(runs: Sequence[Run], split: str) -> Table:
    """Metrics of each run's best model, with intervals, and the difference from the first run."""
    kind, compared = kind_of(runs), runs[0].compared()
    head = ["", *(metric.replace("_", " ") for metric in compared), f"macro-F1 − {runs[0].name}"]
    rows = []
    for run in runs:
        cells = [number(run.metrics.get(metric)) for metric in compared]
        if run.predictions:
            intervals = run.kind.intervals(*run.predicted(run.predictions), is_model=False)
            intervals.pop("severity_f1", None)  # its weights are the run's
            cells = [
                f"{cell} ({number(interval['low'])}–{number(interval['high'])})" if interval else cell
                for cell, metric in zip(cells, compared, strict=True)
                for interval in [intervals.get(metric)]
            ]
        rows.append([run.name, *cells, "" if run is runs[0] else difference_cell(run, runs[0], kind)])
    note = f"Best model of each run on the {split} split, with 95 % bootstrap intervals over the documents."
    return Table("Results", note, head, rows)


def difference_cell(run: Run, first: Run, kind: SingleLabel | MultiLabel) -> str:
    ids = [
        id_
        for id_, document in run.predictions.items()
        if id_ in first.predictions and first.predictions[id_].label == document.label
    ]
    if not ids or run.labels != first.labels:
        return "no documents in common"
    (prediction, labels), (other, _) = run.predicted(ids), first.predicted(ids)
    interval = kind.difference(labels, prediction, other)
    count = "" if len(ids) == len(run.predictions) == len(first.predictions) else f", {len(ids)} in common"
    return f"{interval['value']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f}{count})"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def cost_table(runs: Sequence[Run]) -> Table:
    """Epochs, time, memory and speed."""
    rows = []
    for run in runs:
        epochs, best = run.history["epochs"], run.history.get("best") or {}
        seconds = sum((epoch.get("seconds") or 0) + (epoch.get("eval_seconds") or 0) for epoch in epochs)
        memory = [epoch["peak_memory_gib"] for epoch in epochs if epoch.get("peak_memory_gib")]
        speeds = [epoch["documents_per_second"] for epoch in epochs if epoch.get("documents_per_second")]
        rows.append(
            [
                run.name,
                f"{epochs[-1]['epoch']:g}{' (stopped early)' if run.history.get('stopped_early') else ''}",
                f"{best['epoch']:g}" if best else "–",
                f"{seconds / 60:.1f}",
                f"{max(memory):.2f}" if memory else "–",
                f"{np.median(speeds):.2f}" if speeds else "–",
                str(run.history["config"].get("hardware", "–")),
            ]
        )
    head = ["", "epochs", "best epoch", "minutes", "peak GiB", "documents/s", "hardware"]
    return Table("Cost", "Training and validation time, excluding encoding when embeddings were cached.", head, rows)


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR", help="output_dir of a run; the first is the reference"
    )
    parser.add_argument("--split", default="validation", choices=("validation", "test"), help="split to compare on")
    parser.add_argument("--output_dir", type=Path, help="directory for comparison.md, comparison.html and curves.png")
    arguments = parser.parse_args()
    runs = [
        read_run(folder, name, arguments.split)
        for folder, name in zip(arguments.runs, names_of(arguments.runs), strict=True)
    ]
    tables = [results_table(runs, arguments.split), differences_table(runs), cost_table(runs)]
    title = f"Comparison of {len(runs)} runs" if len(runs) > 1 else runs[0].name
    text = f"# {title}\n\n" + "\n\n".join(table.markdown() for table in tables) + "\n"
    print(text)
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        curves = learning_curves_figure({run.name: run.history["epochs"] for run in runs})
        (arguments.output_dir / "curves.png").write_bytes(curves)
        page = jinja2.Environment(autoescape=True).from_string(PAGE)
        html = page.render(title=title, tables=tables, curves=base64.b64encode(curves).decode("ascii"))
        write_text(arguments.output_dir / "comparison.md", text + "\n![Curves](curves.png)\n")
        write_text(arguments.output_dir / "comparison.html", html)
        print(f"Saved to {arguments.output_dir}.")


if __name__ == "__main__":
    sys.exit(run_main(main))
