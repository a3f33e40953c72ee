"""Early stopping's rule, the warnings of the training monitor, the files that are written whole."""

import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from modeling.file_utils import write_json
from modeling.training.callbacks import EarlyStopping, EvaluationLogCallback, SignalCallback
from modeling.training.checkpointing import checkpoint_problem, commit_checkpoint, find_checkpoint, rotate
from modeling.training.monitor import TrainingMonitor, extreme_weights_message, frozen_model_message
from modeling.training.trackers import confusion_figure

ARGS = SimpleNamespace(
    metric_for_best_model="f1_macro", greater_is_better=True, fp16=False, output_dir="out", num_train_epochs=10
)


def stops_after(scores: list[float], **rule) -> int | None:
    """The number of the evaluation after which training stops."""
    callback, control = EarlyStopping(**rule), TrainerControl()
    for number, score in enumerate(scores, 1):
        callback.on_evaluate(ARGS, TrainerState(global_step=number), control, metrics={"eval_f1_macro": score})
        if control.should_training_stop:
            return number
    return None


def test_an_improvement_is_measured_from_the_last_counted_best():
    creeping = [0.600 + 0.004 * i for i in range(6)]  # Trainer's own callback stops at 0.612
    assert stops_after(creeping, patience=3, min_delta=0.005) is None
    assert stops_after([0.5, 0.5, 0.5005, 0.5009], patience=3, min_delta=0.001) == 4
    assert stops_after([0.5] * 20, patience=0) is None
    assert stops_after([0.5, 0.6, 0.1, 0.1], patience=2) == 4


def test_smaller_is_better_where_the_arguments_say_so():
    callback, control = EarlyStopping(patience=2, min_delta=0.0), TrainerControl()
    args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
    for loss in (1.0, 0.9, 0.95):
        callback.on_evaluate(args, TrainerState(global_step=1), control, metrics={"eval_loss": loss})
    assert callback.early_stopping_patience_counter == 1


def watch(train: list[float], evaluated: list[float]) -> TrainingMonitor:
    trainer = SimpleNamespace(last_grad_norm=None, stats=SimpleNamespace(totals={}), is_world_process_zero=lambda: True)
    health, control = TrainingMonitor(trainer, chance=math.log(3)), TrainerControl()
    for epoch, (loss, eval_loss) in enumerate(zip(train, evaluated, strict=True), 1):
        trainer.stats.totals = {"loss": loss, "steps": 1}
        health.on_evaluate(ARGS, TrainerState(epoch=epoch), control, metrics={"eval_loss": eval_loss})
    return health


@pytest.mark.parametrize(
    ("train", "evaluated", "warnings"),
    [
        ([1.1, 0.9, 0.6, 0.4, 0.3], [1.0, 0.9, 0.8, 0.7, 0.65], []),
        ([1.1, 0.9, 0.6, 0.4, 0.3], [1.0, 0.9, 1.0, 1.1, 1.2], ["overfitting"]),
        ([1.1, 1.11, 1.1, 1.12], [1.1, 1.1, 1.1, 1.1], ["not_learning"]),
        ([1.1, 1.08, 1.05, 1.04, 1.03], [1.1, 1.08, 1.07, 1.06, 1.05], ["underfitting"]),
    ],
)
def test_monitor_warns_of_unhealthy_training(train, evaluated, warnings, caplog):
    assert watch(train, evaluated).warnings == warnings
    assert len(caplog.records) == len(warnings)
    assert all(name in record.message for name, record in zip(warnings, caplog.records, strict=True))


def test_an_epoch_is_told_in_one_line_with_what_is_left(caplog):
    records = [
        {"epoch": epoch, "step": 10 * epoch, "train_loss": 0.5, "eval_loss": 0.6, "eval_f1_macro": f1, "seconds": 50.0}
        | {"eval_seconds": 10.0, "eval_recall_Mild": 0.9, "eval_recall_Severe": 0.25}
        for epoch, f1 in ((1, 0.7), (2, 0.65))
    ]
    best = {"epoch": 1, "step": 10, "eval_f1_macro": 0.7}
    history = SimpleNamespace(epochs=records, record=lambda args, state: {"best": best})
    args = SimpleNamespace(metric_for_best_model="f1_macro", num_train_epochs=10.0, max_steps=-1)
    state = TrainerState(global_step=20, max_steps=100, is_world_process_zero=True)
    with caplog.at_level("INFO"):
        EvaluationLogCallback(history, ["Mild", "Severe"]).on_evaluate(args, state, TrainerControl())
    [line] = caplog.messages
    for words in (
        "epoch 2",
        "10",
        "0.500",
        "0.600",
        "f1_macro 0.650",
        "0.700",
        "Mild 0.90",
        "Severe 0.25",
        "60 s",
        "8 min",
    ):
        assert words in line


def test_extreme_class_weights_and_a_frozen_model(roberta_model):
    assert extreme_weights_message({"General": 0.4, "Mature": 9.0}, {"General": 90, "Mature": 4}) is None
    message = extreme_weights_message({"General": 0.4, "Mature": 12.0}, {"General": 90, "Mature": 3})
    assert re.search(r"extreme_class_weights.*General.*0\.4\b.*\b90\b.*Mature.*12\.0\b.*\b3\b", message or "")
    assert frozen_model_message(roberta_model) is None
    assert "frozen_model" in (frozen_model_message(roberta_model.requires_grad_(False)) or "")


def test_monitor_state_restores_everything_it_observed():
    saved, restored = watch([1.0, 0.9], [1.0, 0.9]), watch([], [])
    saved.warnings, saved.losses = ["exploding_loss"], [4.0]
    for name, value in saved.state()["attributes"].items():
        assert hasattr(restored, name)  # what a resume sets must be what the monitor reads
        setattr(restored, name, value)
    assert vars(restored) == vars(saved) | {"trainer": restored.trainer}


def test_a_loss_that_explodes_or_is_no_number():
    health, control = watch([], []), TrainerControl()
    for step, loss in enumerate([1.0, 1.1, 1.0, 0.9, 4.0, 5.0]):
        health.on_log(ARGS, TrainerState(global_step=step), control, logs={"loss": loss})
    assert health.warnings == ["exploding_loss"]
    assert not control.should_training_stop


def make_checkpoint(folder, step: int):
    partial = folder / ".saving" / f"checkpoint-{step}"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights" * step)
    (partial / "trainer_state.json").write_text("{}")
    commit_checkpoint(partial, folder / partial.name)
    return folder / partial.name


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    assert find_checkpoint(str(tmp_path), "auto") is None
    first, second, third, fourth = (make_checkpoint(tmp_path, step) for step in (2, 10, 11, 12))
    assert find_checkpoint(str(tmp_path), "auto") == str(fourth)
    (fourth / "checkpoint_manifest.json").unlink()
    (third / "model.safetensors").write_bytes(b"Weights" * 11)
    assert find_checkpoint(str(tmp_path), "auto") == str(second)
    assert re.search(r"checkpoint-12\b.*manifest", caplog.text)
    assert re.search(r"checkpoint-11\b.*model\.safetensors", caplog.text)
    (first / "model.safetensors").unlink()
    assert "model.safetensors" in checkpoint_problem(first)
    with pytest.raises(ValueError, match=r"checkpoint-2\b.*model\.safetensors"):
        find_checkpoint(str(tmp_path), str(first))
    with pytest.raises(ValueError, match=str(tmp_path / "no")):
        find_checkpoint(str(tmp_path), str(tmp_path / "no"))


def test_json_is_whole_and_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_confusion_matrix_shows_counts_and_shares(tmp_path):
    import numpy as np

    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["$0_to_$50", "b"])  # no formula
    assert [text.get_text() for text in figure.axes[0].texts] == ["3\n75%", "1\n25%", "0\n0%", "0\n0%"]
    figure.savefig(tmp_path / "a.png")
    figure = confusion_figure(np.eye(200, dtype=int), [f"label {number}" for number in range(200)])
    assert max(figure.get_size_inches()) <= 15  # 40,000 cells told in numbers would take minutes and gigabytes
    assert not figure.axes[0].texts


def test_rotation_never_takes_the_last_whole_checkpoint_nor_the_best(tmp_path):
    best, old, last, torn = (make_checkpoint(tmp_path, step) for step in (2, 4, 6, 8))
    (torn / "checkpoint_manifest.json").unlink()
    rotate(tmp_path, 1, {best, last})
    assert best.is_dir()
    assert last.is_dir()
    assert not old.exists()


def test_a_checkpoint_replaces_the_one_of_its_name(tmp_path):
    first = make_checkpoint(tmp_path, 4)
    (first / "model.safetensors").write_bytes(b"torn")
    again = make_checkpoint(tmp_path, 4)
    assert first == again
    assert checkpoint_problem(again) is None
    assert [path.name for path in (tmp_path / ".saving").iterdir()] == []


def test_a_second_ctrl_c_stops_at_once():
    stop = SignalCallback()
    with pytest.raises(KeyboardInterrupt), stop.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert stop.sync() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_status == 130
