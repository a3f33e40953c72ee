"""Resuming with another effective batch, or with more documents: by documents seen, and killed at any moment."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.training import step_conversion
from modeling.training.callbacks import EarlyStopping, HistoryCallback, SignalCallback
from modeling.training.checkpointing import checkpoint_problem, commit_checkpoint, find_checkpoint
from modeling.training.step_conversion import convert_run, saved_epoch_size
from modeling.training.trainer import WeightedTrainer
from scripts.training.output_dir import clear_unfinished
from scripts.training.setup import check_checkpoint
from tests.test_resuming import SignalAt
from tests.tiny_training import SplitLengths, trainer_for


class Numbered(SplitLengths):
    """Documents that begin with a token of their own."""

    def __init__(self, count: int = 50):
        super().__init__(count)
        for index, item in enumerate(self.items):
            item["input_ids"][0][0] = 100 + index


class Watch(TrainerCallback):
    """Learning rate before each step, by epoch."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer, **_):
        self.rates.append((int(state.epoch), optimizer.param_groups[0]["lr"]))


def numbered_run(encoder, folder, resume=None, signal_at=None, count=50, **arguments):
    """A run on numbered documents: the trainer, and the documents of each epoch in the order in which they were trained on."""
    epochs: dict[int, list[int]] = {}

    class Recording(WeightedTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            firsts = inputs["input_ids"][inputs["num_chunks"].cumsum(0) - inputs["num_chunks"], 0]
            firsts = firsts[inputs["labels"] != -100].tolist()
            epochs.setdefault(int(self.state.epoch or 0), []).extend(first - 100 for first in firsts)
            return super().compute_loss(model, inputs, *args, **kwargs)

    given = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 9}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "warmup_steps": 0}
    given["lr_scheduler_type"] = "linear"
    torch.manual_seed(5)
    model = Model.from_encoder(str(encoder), num_labels=3, chunk_length=16)
    trainer = trainer_for(model, folder, Numbered(count), kind=Recording, **{**given, **arguments})
    stop, early, watch = SignalCallback(), EarlyStopping(0), Watch()
    trainer.stop = stop
    for callback in (early, *([signal_at] if signal_at else []), stop, watch, HistoryCallback(trainer, early, {})):
        trainer.add_callback(callback)
    with stop.listening():
        trainer.train(resume_from_checkpoint=find_checkpoint(str(resume), "auto") if resume else None)
    return trainer, epochs, watch.rates


@pytest.mark.parametrize(("batch", "accumulation", "steps"), [(16, 4, 1), (1, 1, 50), (5, 2, 5)])
def test_resume_with_another_effective_batch_trains_each_epoch_once(
    batch, accumulation, steps, roberta_folder, tmp_path
):
    numbered_run(roberta_folder, tmp_path)  # steps of 16: 4 an epoch
    other = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "num_train_epochs": 4}
    trainer, epochs, rates = numbered_run(roberta_folder, tmp_path, resume=tmp_path, **other)
    assert set(epochs) == {2, 3}
    assert all(sorted(order) == list(range(50)) for order in epochs.values())
    assert trainer.state.global_step == 4 * steps
    # Half of the linear schedule is left.
    assert rates[0][1] == pytest.approx(0.5e-3)
    history = json.loads((tmp_path / "training_history.json").read_text())
    assert [(epoch["epoch"], epoch["step"]) for epoch in history["epochs"]] == [(n, n * steps) for n in (1, 2, 3, 4)]
    folders = [int(folder.name.split("-")[1]) for folder in tmp_path.glob("checkpoint-*")]
    assert sorted(folders) == [steps * epoch for epoch in (2, 3, 4)]  # the second epoch is the best of the first two
    assert find_checkpoint(str(tmp_path), "auto") == str(tmp_path / f"checkpoint-{4 * steps}")


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_resume_within_an_epoch_continues_with_the_documents_not_seen(batch, roberta_folder, tmp_path):
    _, first, _ = numbered_run(roberta_folder, tmp_path, signal_at=SignalAt(7, "step"))  # 3 steps into the second epoch
    other = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    _, then, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path, **other)
    assert len(first[1]) == 48
    assert sorted(first[1] + then[1]) == list(range(50))
    assert sorted(then[2]) == list(range(50))


def test_converted_checkpoint_is_resumed_where_the_original_stood(roberta_folder, tmp_path):
    _, first, _ = numbered_run(roberta_folder, tmp_path, signal_at=SignalAt(7, "step"))
    other = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    trainer, _, _ = numbered_run(roberta_folder, tmp_path / "empty", num_train_epochs=1, **other)
    new = trainer.epoch_size()
    original = tmp_path / "checkpoint-7"
    converted = convert_run(original, tmp_path, saved_epoch_size(original), new, trainer.accelerator)
    assert checkpoint_problem(converted) is None
    assert not original.exists()
    _, then, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path, **other)
    assert sorted(first[1] + then[1]) == list(range(50))


def test_finished_run_is_given_more_epochs_and_names_the_new_schedule(roberta_folder, tmp_path, caplog):
    numbered_run(roberta_folder, tmp_path)
    with caplog.at_level("INFO"):
        _, epochs, rates = numbered_run(roberta_folder, tmp_path, resume=tmp_path, num_train_epochs=4)
    assert set(epochs) == {2, 3}
    assert re.search(r"\b4 epochs\b.*\b2\b.*learning rate", caplog.text)
    assert rates[0][1] == pytest.approx(0.5e-3)


class Killed(BaseException):
    """Raised in place of a kill."""


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_conversion_killed_at_any_moment_loses_nothing(batch, moment, roberta_folder, tmp_path, monkeypatch):
    """The best checkpoint is the first of three, and takes the name of another with 7 documents a step (without care)."""
    # The loss falls, so that checkpoint-4 is the best of 4, 8 and 12.
    numbered_run(roberta_folder, tmp_path, greater_is_better=True, num_train_epochs=3)
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    count = 0

    def killing(function):
        def wrapped(*args):
            nonlocal count
            count += 1
            if count == moment:
                raise Killed
            return function(*args)

        return wrapped

    for name in ("_stage", "commit_checkpoint", "discard"):
        monkeypatch.setattr(step_conversion, name, killing(getattr(step_conversion, name)))
    other = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "num_train_epochs": 4}
    other["greater_is_better"] = True
    with pytest.raises(Killed):
        numbered_run(roberta_folder, tmp_path, resume=tmp_path, **other)
    monkeypatch.undo()
    clear_unfinished(tmp_path)
    newest = Path(find_checkpoint(str(tmp_path), "auto"))
    check_checkpoint(newest, HierarchicalRobertaConfig.from_pretrained(newest), "", needs_best=True)
    trainer, epochs, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path, **other)
    assert sorted(epochs) == [3]
    ended = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(ended[name], value) for name, value in best.items())
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_checkpoint_converted_twice_trains_no_document_twice(roberta_folder, tmp_path):
    _, first, _ = numbered_run(roberta_folder, tmp_path, signal_at=SignalAt(7, "step"))
    large = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    trainer, _, _ = numbered_run(roberta_folder, tmp_path / "empty", num_train_epochs=1, **large)
    original = tmp_path / "checkpoint-7"
    convert_run(original, tmp_path, saved_epoch_size(original), trainer.epoch_size(), trainer.accelerator)
    _, then, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path)
    assert sorted(first[1] + then[1]) == list(range(50))


def test_schedule_that_lags_behind_the_steps_is_converted_too(roberta_folder, tmp_path):
    """fp16's gradient scaler skips steps of the schedule, too."""
    numbered_run(roberta_folder, tmp_path, signal_at=SignalAt(7, "step"))
    folder = tmp_path / "checkpoint-7"
    scheduler = torch.load(folder / "scheduler.pt", weights_only=True)
    torch.save(scheduler | {"last_epoch": 6, "_step_count": 7}, folder / "scheduler.pt")
    commit_checkpoint(folder.rename(tmp_path / "edited"), folder)
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    _, _, rates = numbered_run(roberta_folder, tmp_path, resume=tmp_path, **small)
    assert rates[0][1] == pytest.approx(1e-3 * (1 - 84 / 100))  # 6 of 7 steps, of the 98 of 100


def test_run_is_resumed_with_more_documents(roberta_folder, tmp_path):
    numbered_run(roberta_folder, tmp_path)
    trainer, epochs, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path, count=80, num_train_epochs=3)
    assert sorted(epochs) == [2]
    assert sorted(epochs[2]) == list(range(80))
    assert trainer.state.global_step == 15


def test_epoch_starts_again_if_documents_were_added_within_it(roberta_folder, tmp_path):
    numbered_run(roberta_folder, tmp_path, signal_at=SignalAt(7, "step"))
    _, epochs, _ = numbered_run(roberta_folder, tmp_path, resume=tmp_path, count=80)
    assert sorted(epochs) == [1]
    assert sorted(epochs[1]) == list(range(80))


def test_checkpoint_behind_a_symbolic_link_is_converted(roberta_folder, tmp_path):
    numbered_run(roberta_folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8").rename(tmp_path / "disk")
    (tmp_path / "run" / "checkpoint-8").symlink_to(tmp_path / "disk")
    other = {"per_device_train_batch_size": 16, "num_train_epochs": 3}
    _, epochs, _ = numbered_run(roberta_folder, tmp_path / "run", resume=tmp_path / "run", **other)
    assert sorted(epochs) == [2]


def test_stream_is_not_resumed_with_another_batch(roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path, save_strategy="epoch")
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ResumeState"]["attributes"]["epoch_size"] == [16, 4, 50]
    old, new = step_conversion.EpochSize(16, 0), step_conversion.EpochSize(8, 0)
    with pytest.raises(ValueError, match=r"\b8 documents.*\b16\b"):
        convert_run(tmp_path / "checkpoint-4", tmp_path, old, new, trainer.accelerator)
