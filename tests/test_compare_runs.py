"""Runs side by side: what differs, what they reached, what it cost."""

import csv
import json
import re

import datasets
import numpy as np
import pytest

from scripts.common.cli import USER_ERRORS
from scripts.common.predictions_io import label_codes, read_predictions, write_predictions
from scripts.compare_runs import main as compare_main
from tests.conftest import LABELS, run_command


def make_run(folder, right: float, ids=range(60), **config):
    """A run's folder whose predictions are right for that share of the documents."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    rows = []
    for i in ids:
        label = LABELS[i % 3]
        rows.append((f"d{i}", label, label if rng.random() < right else LABELS[(i + 1) % 3]))
    with open(folder / "predictions_validation.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *LABELS])
        writer.writerows([*row, 0.2, 0.3, 0.5] for row in rows)
    f1 = {"f1_macro": right, "accuracy": right, "severity_f1": right, "quadratic_kappa": right, "recall_Mature": right}
    (folder / "metrics.json").write_text(json.dumps({"validation": f1}))
    epoch = {"epoch": 1, "step": 3, "train_loss": 1.0, "eval_loss": 0.9, "eval_f1_macro": right, "seconds": 90.0}
    epoch |= {"eval_seconds": 30.0, "documents_per_second": 2.5, "peak_memory_gib": 1.25}
    history = {
        "config": {"labels": LABELS, "seed": 42, "learning_rate": 1e-4, "hardware": "a | b", **config},
        "epochs": [epoch, {**epoch, "epoch": 2, "step": 6}],
        "best": {"epoch": 2, "step": 6, "eval_f1_macro": right},
        "stopped_early": True,
    }
    (folder / "training_history.json").write_text(json.dumps(history))
    return folder


@pytest.fixture
def runs(tmp_path):
    return make_run(tmp_path / "plain", 0.5, pooling="mean"), make_run(tmp_path / "better", 0.95, pooling="attention")


def test_comparison_has_differences_metrics_and_cost(runs, tmp_path):
    done = run_command("scripts.compare_runs", *map(str, runs), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "| pooling | mean | attention |" in text
    assert "| seed |" not in text  # the same in both
    [better] = [line for line in text.splitlines() if line.startswith("| better | 0.950 (")]
    assert "| +0." in better  # the paired difference to the first run
    assert "| better | 2 (stopped early) | 2 | 4.0 | 1.25 | 2.50 | a \\| b |" in text
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<table>") == 3
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_comparison_is_of_documents_in_common(tmp_path, runs):
    other = make_run(tmp_path / "half", 0.95, ids=range(30, 90))
    done = run_command("scripts.compare_runs", str(runs[0]), str(other))
    assert re.search(r"\b30 in common", done.stdout)
    apart = make_run(tmp_path / "apart", 0.95, ids=range(100, 130))
    assert re.search(r"\b(no|0)\b.* in common", run_command("scripts.compare_runs", str(runs[0]), str(apart)).stdout)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"config": {"labels": []}, "epochs": []}'])
def test_folder_without_a_run_is_named(tmp_path, runs, content, call_command):
    folder = tmp_path / "no"
    folder.mkdir()
    if content is not None:
        (folder / "training_history.json").write_text(content)
    with pytest.raises(USER_ERRORS, match=r"training_history\.json"):
        call_command(compare_main, *map(str, runs), folder)


def test_prediction_files_are_read_back_whatever_the_labels_are_called(tmp_path):
    names = ["id", "predicted", "two words"]
    kept = ['{"two words": "kept"}', '{"two words": null}']
    documents = datasets.Dataset.from_dict({"id": ["a", "b"], "label": [[0, 2], []], "metadata": kept})
    scores, predicted = np.array([[0.9, 0.2, 0.7], [0.1, 0.6, 0.3]]), np.array([[1, 0, 1], [0, 1, 0]], dtype=bool)
    write_predictions(tmp_path / "predictions.csv", documents, names, scores, predicted)
    read = read_predictions(tmp_path / "predictions.csv", names)
    assert list(read) == ["a", "b"]
    assert label_codes([row.label for row in read.values()], names, True).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert label_codes([row.predicted for row in read.values()], names, True).tolist() == predicted.tolist()
    assert np.array([row.scores_K for row in read.values()]).tolist() == scores.tolist()
    with pytest.raises(ValueError, match="not of a model with these labels"):
        read_predictions(tmp_path / "predictions.csv", ["id", "two words"])
    whole = (tmp_path / "predictions.csv").read_text()
    for text, said in (("", "not of a model"), (whole[: whole.rindex(",")], "is cut")):
        (tmp_path / "predictions.csv").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_predictions(tmp_path / "predictions.csv", names)
