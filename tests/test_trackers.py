"""`report_to`: what each tracker gets, and what is said where one is missing."""

import json
import re
import socket

import matplotlib.figure
import numpy as np
import pytest
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

import modeling.training.trackers
from modeling.hierarchical_roberta.decision import MULTI_LABEL
from modeling.training.tensorboard import TensorBoard
from modeling.training.trackers import FigureCallback, check_trackers, label_metrics_figure
from tests.conftest import assert_refused, train, training_command
from tests.processes import ROOT, run
from tests.tiny_training import SplitLengths, trainer_for


class Recorder(TrainerCallback):
    """A tracker that takes numbers and figures."""

    def __init__(self):
        self.logs, self.figures = [], []

    def on_log(self, args, state, control, logs, **_):
        self.logs.append((state.global_step, dict(logs)))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Trains for two epochs, and returns what a tracker got."""

    def train_recorded(model, documents) -> Recorder:
        trainer = trainer_for(
            model, tmp_path, documents, logging_steps=1, eval_strategy="epoch", num_train_epochs=2, learning_rate=1e-2
        )
        recorder = Recorder()
        monkeypatch.setitem(
            modeling.training.trackers.SENDERS,
            Recorder,
            lambda tracker, name, figure, step: tracker.figures.append((step, name, figure)),
        )
        trainer.add_callback(recorder)
        trainer.add_callback(FigureCallback(trainer, ["a", "b", "c"]))
        trainer.train()
        return recorder

    return train_recorded


def test_every_tracker_gets_metrics_rates_throughput_and_the_confusion_matrix(recorded, roberta_model):
    recorder = recorded(roberta_model, SplitLengths())
    step, first = recorder.logs[0]
    assert step == 1
    rates = [
        f"learning_rate_{part}{suffix}"
        for part in ("encoder", "chunk_attention", "head")
        for suffix in ("", "_no_decay")
    ]
    assert {"loss", "grad_norm", "learning_rate", "documents_per_second", "chunks_per_second"} <= first.keys()
    assert {"padding_share", "peak_memory_gib", *rates} <= first.keys()
    assert first["learning_rate_head"] == pytest.approx(2 * first["learning_rate_encoder"])
    [evaluated, again] = [logs for _, logs in recorder.logs if "eval_loss" in logs]
    assert {"eval_f1_macro", "eval_recall_a", "eval_precision_b", "eval_f1_c"} <= evaluated.keys() == again.keys()
    # MLflow's file store makes a file of each name, and a folder of what stands before a slash.
    names = {name for _, logs in recorder.logs for name in logs}
    assert not [name for name in names if "/" in name]
    assert all(isinstance(value, int | float) for _, logs in recorder.logs for value in logs.values())
    [(at, name, figure), _] = recorder.figures
    assert (at, name) == (4, "confusion_matrix")
    assert isinstance(figure, matplotlib.figure.Figure)
    counts = [int(text.get_text().split()[0]) for text in figure.axes[0].texts]
    assert np.sum(counts) == 50


def test_several_labels_have_a_figure_of_the_metrics_that_are_logged(recorded, roberta_model):
    documents = SplitLengths()
    for item in documents.items:
        of = item["labels"]
        item["labels"] = np.array([of < 2, of == 1, len(item["input_ids"]) > 1], dtype=np.float32)
    roberta_model.config.problem_type = MULTI_LABEL
    recorder = recorded(roberta_model, documents)
    evaluations = [logs for _, logs in recorder.logs if "eval_loss" in logs]
    for (step, name, figure), logs, wanted in zip(recorder.figures, evaluations, (4, 8), strict=True):
        assert (step, name) == (wanted, "label_metrics")
        support = {label: int(logs[f"eval_support_{label}"]) for label in "abc"}
        labels = sorted(support, key=lambda label: -support[label])
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == [f"{each} ({support[each]})" for each in labels]
        found = [[bar.get_width() for bar in axes.patches], *(line.get_xdata() for line in axes.lines)]
        for kind, values in zip(("f1", "precision", "recall"), found, strict=True):
            assert list(values) == pytest.approx([logs[f"eval_{kind}_{each}"] for each in labels])
    assert any(0 < width < 1 for width in found[0])


def test_the_figure_has_the_most_frequent_of_many_labels_with_short_names():
    rng = np.random.default_rng(0)
    shares = rng.permutation(np.linspace(0.05, 0.95, 50))
    labels = (rng.random((400, 50)) < shares).astype(np.float32)
    names = [f"The ${k} and ${k} of a name that is by far too long to be shown on a line or on two" for k in range(50)]
    figure = label_metrics_figure(rng.normal(size=labels.shape), labels, names)
    modeling.training.trackers._pixels(figure)
    assert "20 most frequent of 50 labels" in figure.get_suptitle()
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    support = labels.sum(axis=0).astype(int)
    assert [int(re.search(r"\((\d+)\)$", name)[1]) for name in shown] == sorted(support, reverse=True)[:20]
    for name in shown:
        k = int(re.search(r"\$(\d+) ", name)[1])
        assert name.endswith(f"… ({support[k]})")
        assert max(map(len, name.split("\n"))) < 40


def test_missing_tracker_is_named():
    with pytest.raises(ValueError, match=r"report_to.*swanlab.*pip install swanlab"):
        check_trackers(["tensorboard", "swanlab"])
    with pytest.raises(ValueError, match="nonesuch"):
        check_trackers(["nonesuch"])
    check_trackers([])


@pytest.mark.slow
def test_missing_tracker_is_named_before_the_data_are_read(roberta_folder, tmp_path):
    done = train(tmp_path / "no_data", roberta_folder, tmp_path / "run", report_to="tensorboard,swanlab")
    assert_refused(done, "swanlab")


@pytest.mark.slow
@pytest.mark.parametrize(("report_to", "writers"), [("tensorboard", 1), ("none", 0), ("all", 1)])
def test_tensorboard_has_one_writer_or_none(report_to, writers, prepared_folder, roberta_folder, tmp_path):
    done = train(prepared_folder, roberta_folder, tmp_path, num_train_epochs=1, report_to=report_to)
    assert done.returncode == 0, done.stderr
    folders = list((tmp_path / "runs").glob("*"))
    assert len(folders) == writers
    assert not [folder for folder in folders if socket.gethostname() in folder.name]


def test_tensorboard_is_transformers_own_callback():
    assert issubclass(TensorBoard, TensorBoardCallback)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["mlflow", "trackio", "wandb"])
def test_tracker_that_is_installed_runs_for_real(tracker, prepared_folder, roberta_folder, tmp_path, monkeypatch):
    """Without a network: a file store, a local database, an offline run."""
    pytest.importorskip(tracker)
    where = {
        "MLFLOW_TRACKING_URI": f"file://{tmp_path / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    given = {"num_train_epochs": 2, "report_to": tracker, "logging_steps": 1}
    # Cold, as trackers read their environment and make temporary folders when they are imported.
    done = run(training_command(prepared_folder, roberta_folder, tmp_path / "run", **given), cwd=ROOT, cold=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"\bERROR\b", done.stderr)
    assert len(json.loads((tmp_path / "run" / "training_history.json").read_text())["epochs"]) == 2
    images = [path for path in tmp_path.rglob("*.png") if path.stat().st_size]
    assert len(images) == 2
