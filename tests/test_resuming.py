"""Runs that are interrupted anywhere and resumed; skipped steps."""

import copy
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.training.callbacks import EarlyStopping, HistoryCallback, SignalCallback
from modeling.training.checkpointing import commit_checkpoint, find_checkpoint
from modeling.training.monitor import TrainingMonitor
from modeling.training.sampling import EpochSampler
from modeling.training.trainer import WeightedTrainer
from scripts.training.output_dir import resolve_output_dir
from scripts.training.setup import check_checkpoint
from tests.tiny_training import SplitLengths, trainer_for


class SignalAt(TrainerCallback):
    """Sends this process SIGTERM when a step begins, or in the evaluation after it."""

    def __init__(self, step: int, event: str):
        self.step, self.event = step, event

    def on_step_begin(self, args, state, control, **_):
        if self.event == "step" and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args, state, control, **_):
        if self.event == "evaluation" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            self.event = "sent"


def stoppable(encoder, folder, signal_at: SignalAt | None = None, resume=None, grace_seconds=30.0, **arguments):
    """A run with dropout that is stopped by a signal and leaves a history."""
    torch.manual_seed(5)
    model = Model.from_encoder(str(encoder), num_labels=3, chunk_length=16, dropout=0.2, attention_dropout=0.1)
    trainer = trainer_for(
        model,
        folder,
        **{
            "num_train_epochs": 2,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_total_limit": 9,
            **arguments,
        },
    )
    stop, early = SignalCallback(grace_seconds), EarlyStopping(5, 0.0)
    trainer.stop = stop
    history = HistoryCallback(trainer, early, {})
    for callback in (early, *([signal_at] if signal_at else []), stop, history):
        trainer.add_callback(callback)
    with stop.listening():
        trainer.train(resume_from_checkpoint=find_checkpoint(str(resume), "auto") if resume else None)
    return stop, trainer


def ends_alike(whole, cut, last: str) -> None:
    """Weights, optimizer and history of two runs are the same."""
    ours, theirs = (load_file(folder / last / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (torch.load(folder / last / "rng_state.pth", weights_only=False)["cpu"] for folder in (whole, cut))
    assert torch.equal(ours, theirs)
    ours, theirs = (json.loads((folder / "training_history.json").read_text()) for folder in (whole, cut))
    for name in ("step", "epoch", "eval_loss", "train_loss"):
        assert [epoch[name] for epoch in ours["epochs"]] == [epoch[name] for epoch in theirs["epochs"]], name
    assert ours["best"] == theirs["best"]


def test_resume_names_callback_states_that_it_cannot_restore(roberta_folder, tmp_path, caplog):
    run = tmp_path / "run"
    stoppable(roberta_folder, run, SignalAt(3, "step"))
    checkpoint = Path(find_checkpoint(str(run), "auto"))
    state = checkpoint / "trainer_state.json"
    state.write_text(state.read_text().replace('"HistoryCallback"', '"FormerHistory"'))
    commit_checkpoint(checkpoint.rename(tmp_path / "edited"), checkpoint)
    stoppable(roberta_folder, run, resume=run)
    [warning] = [record.getMessage() for record in caplog.records if "FormerHistory" in record.getMessage()]
    assert "TrainerControl" not in warning
    assert "EarlyStopping" not in warning


# In mid-epoch, in an epoch's last step, in an epoch's first step, in the last step of all.
@pytest.mark.parametrize("grace_seconds", [30.0, 0.0])
@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_resume_after_a_signal_in_any_step_changes_nothing(step, grace_seconds, roberta_folder, tmp_path):
    assert stoppable(roberta_folder, tmp_path / "whole")[0].exit_status is None
    cut = tmp_path / "cut"
    stop, trainer = stoppable(roberta_folder, cut, SignalAt(step, "step"), grace_seconds=grace_seconds)
    assert stop.exit_status == 143
    done = step if grace_seconds else step - 1  # without time the step is given up
    assert trainer.state.global_step == done
    assert find_checkpoint(str(cut), "auto") == str(cut / f"checkpoint-{done}")
    stoppable(roberta_folder, cut, resume=cut)
    ends_alike(tmp_path / "whole", cut, "checkpoint-8")


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
@pytest.mark.parametrize("step", [4, 8])
def test_resume_repeats_an_interrupted_evaluation(step, strategy, roberta_folder, tmp_path):
    given = {"eval_strategy": strategy, "save_strategy": strategy, "eval_steps": 2, "save_steps": 2}
    stoppable(roberta_folder, tmp_path / "whole", **given)
    cut = tmp_path / "cut"
    stop, _ = stoppable(roberta_folder, cut, SignalAt(step, "evaluation"), grace_seconds=0.0, **given)
    assert stop.exit_status == 143
    assert find_checkpoint(str(cut), "auto") == str(cut / f"checkpoint-{step}")
    stoppable(roberta_folder, cut, resume=cut, **given)
    ends_alike(tmp_path / "whole", cut, "checkpoint-8")


def test_rotation_keeps_the_last_checkpoint_beside_the_best(roberta_model, tmp_path):
    given = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}
    given |= {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer_for(roberta_model, tmp_path, **given).train()  # the loss falls: the first is the "best"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4"]


def test_resume_of_a_moved_finished_run_ends_with_its_best_model(roberta_folder, tmp_path):
    _, first = stoppable(roberta_folder, tmp_path / "there", greater_is_better=True)  # the loss falls
    assert first.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-4")
    (tmp_path / "there").rename(tmp_path / "here")
    _, second = stoppable(roberta_folder, tmp_path / "here", resume=tmp_path / "here", greater_is_better=True)
    best = load_file(tmp_path / "here" / "checkpoint-4" / "model.safetensors")
    for trainer in (first, second):
        assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_best_model_is_kept_though_its_step_was_not_one_to_save(roberta_folder, tmp_path):
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 8}
    _, trainer = stoppable(roberta_folder, tmp_path, greater_is_better=True, **given)  # the loss falls: step 1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_resume_in_another_folder_finds_the_best_beside_the_checkpoint(roberta_folder, tmp_path):
    stoppable(roberta_folder, tmp_path / "whole", greater_is_better=True)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    _, trainer = stoppable(
        roberta_folder, tmp_path / "new", resume=moved, greater_is_better=True, num_train_epochs=3, save_total_limit=1
    )
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-4")
    best = load_file(moved / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())


def test_check_checkpoint_names_a_missing_best_checkpoint(roberta_folder, tmp_path):
    stoppable(roberta_folder, tmp_path / "whole", greater_is_better=True)
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "cut" / "checkpoint-8")
    shutil.rmtree(tmp_path / "whole")
    config = HierarchicalRobertaConfig.from_pretrained(tmp_path / "cut" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"\bcheckpoint-4\b"):
        check_checkpoint(tmp_path / "cut" / "checkpoint-8", config, "", needs_best=True)
    check_checkpoint(tmp_path / "cut" / "checkpoint-8", config, "", needs_best=False)


def test_save_strategy_best_keeps_the_interrupted_step(roberta_folder, tmp_path):
    given = {"save_strategy": "best", "greater_is_better": True, "num_train_epochs": 3}  # only the first is the best
    stoppable(roberta_folder, tmp_path / "whole", **given)
    cut = tmp_path / "cut"
    stop, _ = stoppable(roberta_folder, cut, SignalAt(8, "step"), **given)
    assert stop.exit_status == 143
    assert find_checkpoint(str(cut), "auto") == str(cut / "checkpoint-8")
    stoppable(roberta_folder, cut, resume=cut, **given)
    ours, theirs = (json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("whole", "cut"))
    assert [epoch["eval_loss"] for epoch in ours["epochs"]] == [epoch["eval_loss"] for epoch in theirs["epochs"]]


def test_resume_applies_new_learning_rate_and_weight_decay(roberta_folder, tmp_path):
    stoppable(roberta_folder, tmp_path / "cut", SignalAt(3, "step"), weight_decay=0.01)
    rates, decays = {}, {}
    for rate in (1e-3, 1e-4):
        folder = shutil.copytree(tmp_path / "cut", tmp_path / str(rate))
        given = {"learning_rate": rate, "weight_decay": 10 * rate}

        class Watch(TrainerCallback):
            def on_train_begin(self, args, state, control, lr_scheduler, optimizer, **_):
                assert lr_scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]

            def on_step_end(self, args, state, control, optimizer, **_):
                rates.setdefault(args.learning_rate, []).append([group["lr"] for group in optimizer.param_groups])
                decays[args.learning_rate] = {group["weight_decay"] for group in optimizer.param_groups}

        stoppable(roberta_folder, folder, Watch(), resume=folder, **given)
    assert len(rates[1e-3]) == 5
    assert torch.tensor(rates[1e-4]).flatten().tolist() == pytest.approx(
        (torch.tensor(rates[1e-3]) / 10).flatten().tolist(), rel=1e-5
    )
    assert decays == {1e-3: {0.0, 0.01}, 1e-4: {0.0, 0.001}}


@pytest.mark.parametrize("event", ["none", "step", "evaluation"])
def test_run_that_ends_within_an_epoch_is_resumed_exactly(event, roberta_folder, tmp_path):
    given = {"num_train_epochs": 1.5}  # 6 steps of 4 an epoch
    stoppable(roberta_folder, tmp_path / "whole", **given)
    cut = tmp_path / "cut"
    stop, _ = stoppable(
        roberta_folder, cut, SignalAt(6, event), grace_seconds=0.0 if event == "evaluation" else 30, **given
    )
    assert stop.exit_status == (None if event == "none" else 143)
    _, trainer = stoppable(roberta_folder, cut, resume=cut, **given)
    assert trainer.state.global_step == 6
    ends_alike(tmp_path / "whole", cut, "checkpoint-6")


def test_loader_worker_killed_in_an_evaluation_leaves_it_pending(roberta_folder, tmp_path, monkeypatch):
    stoppable(roberta_folder, tmp_path / "whole")
    cut, signal_at = tmp_path / "cut", SignalAt(4, "evaluation")
    predict = WeightedTrainer.prediction_step

    def killed(self, *args, **kwargs):
        if self.stop.received:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(WeightedTrainer, "prediction_step", killed)
    stop, _ = stoppable(roberta_folder, cut, signal_at)
    assert stop.exit_status == 143
    monkeypatch.undo()
    stoppable(roberta_folder, cut, resume=cut)
    ends_alike(tmp_path / "whole", cut, "checkpoint-8")


def test_interrupted_run_is_saved_before_other_callbacks_end(roberta_folder, tmp_path):
    seen = []

    class Order(SignalAt):
        def on_save(self, args, state, control, **_):
            seen.append(("save", state.global_step))

        def on_train_end(self, args, state, control, **_):
            seen.append(("end", state.global_step))

    stoppable(roberta_folder, tmp_path, Order(3, "step"), grace_seconds=0.0)
    assert seen == [("save", 2), ("end", 2)]


def test_run_resumed_from_another_folder_saves_where_it_was_interrupted(roberta_folder, tmp_path):
    stoppable(roberta_folder, tmp_path / "there", SignalAt(3, "step"))
    stoppable(roberta_folder, tmp_path / "here", SignalAt(4, "step"), resume=tmp_path / "there", grace_seconds=0.0)
    assert find_checkpoint(str(tmp_path / "here"), "auto") == str(tmp_path / "here" / "checkpoint-3")


@pytest.mark.parametrize("strategy", ["no", "best"])
def test_signal_in_the_last_evaluation_leaves_a_checkpoint(strategy, roberta_folder, tmp_path):
    given = {"save_strategy": strategy, "load_best_model_at_end": strategy == "best", "greater_is_better": True}
    stop, _ = stoppable(roberta_folder, tmp_path, SignalAt(8, "evaluation"), **given)
    assert stop.exit_status == 143
    assert find_checkpoint(str(tmp_path), "auto") == str(tmp_path / "checkpoint-8")


def test_diverged_model_is_not_saved_by_a_signal_either(roberta_model, tmp_path):
    poison(roberta_model)
    given = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(roberta_model, tmp_path, Poisoned(set(range(50))), **given)
    trainer.stop = stop = SignalCallback()
    for callback in (SignalAt(3, "step"), stop, TrainingMonitor(trainer)):
        trainer.add_callback(callback)
    with stop.listening():
        trainer.train()
    assert trainer.has_failed
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_resume_applies_new_intervals(roberta_folder, tmp_path):
    given = {"save_strategy": "steps", "eval_strategy": "no", "load_best_model_at_end": False}
    stoppable(roberta_folder, tmp_path, SignalAt(3, "step"), save_steps=4, **given)
    stoppable(roberta_folder, tmp_path, resume=tmp_path, save_steps=1, **given)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")) == [3, 4, 5, 6, 7, 8]


def test_interrupted_step_is_not_counted(roberta_model, tmp_path):
    class Late:
        """Interrupts the second step in its second micro-batch."""

        received = agreed = None
        calls = 0

        def deadline_reached(self) -> bool:
            self.calls += 1
            self.agreed = signal.SIGTERM if self.calls == 6 else None
            return self.agreed is not None

        def sync(self) -> int | None:
            return self.agreed

    given = {"include_num_input_tokens_seen": "non_padding", "save_strategy": "steps", "save_steps": 9}
    whole = trainer_for(copy.deepcopy(roberta_model), tmp_path / "whole", max_steps=1, **given)
    whole.train()
    cut = trainer_for(roberta_model, tmp_path / "cut", **given)
    cut.stop = Late()
    cut.train()
    saved = json.loads((tmp_path / "cut" / "checkpoint-1" / "trainer_state.json").read_text())
    assert saved["num_input_tokens_seen"] == whole.state.num_input_tokens_seen > 0
    assert cut.stats.synchronize()["documents"] == 16


def test_trainer_can_train_twice(roberta_folder, tmp_path):
    """Nothing of the first training is left in the second."""
    _, trainer = stoppable(roberta_folder, tmp_path, num_train_epochs=1, max_loss_spike=1.5)
    [early] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
    early.early_stopping_patience_counter = 5  # as after an early stop
    trainer.resume_state.losses = [1e-9] * 20
    trainer.resume_state.seen = (0, 30)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.stats.synchronize()["skipped"] == 0
    assert len(trainer.resume_state.losses) == 4
    assert json.loads((tmp_path / "training_history.json").read_text())["epochs"][0]["documents_per_second"] > 0


def test_resume_from_the_last_checkpoint_or_with_another_optimizer_object(roberta_folder, tmp_path):
    stoppable(roberta_folder, tmp_path)
    torch.manual_seed(5)
    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16)
    trainer = trainer_for(model, tmp_path, save_strategy="epoch", num_train_epochs=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    trainer = trainer_for(model, tmp_path / "passed", save_strategy="epoch")
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer.train()
    trainer = trainer_for(model, tmp_path / "passed", save_strategy="epoch", num_train_epochs=2)
    trainer.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "passed" / "checkpoint-4"))
    assert trainer.state.global_step == 8
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer_for(model, tmp_path / "empty").train(resume_from_checkpoint=True)


def test_eval_on_start_is_a_baseline_and_runs_once(roberta_folder, tmp_path):
    given = {"eval_on_start": True, "learning_rate": 1e-9, "num_train_epochs": 3}
    stoppable(roberta_folder, tmp_path, SignalAt(6, "step"), greater_is_better=True, **given)
    _, trainer = stoppable(roberta_folder, tmp_path, resume=tmp_path, greater_is_better=True, **given)
    history = json.loads((tmp_path / "training_history.json").read_text())
    assert [epoch["step"] for epoch in history["epochs"]] == [0, 4, 8, 12]
    assert history["epochs"][0]["train_loss"] is None
    assert history["best"]["step"] in (4, 8, 12)
    assert trainer.state.best_global_step == history["best"]["step"]
    [early] = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
    assert early.early_stopping_patience_counter <= 2


def test_resolve_output_dir_does_not_mix_two_runs(roberta_folder, tmp_path):
    for name in ("mine", "other"):
        stoppable(roberta_folder, tmp_path / name)
    mine, others = str(tmp_path / "mine"), str(tmp_path / "other" / "checkpoint-8")
    with pytest.raises(ValueError, match=r"mine\b.*checkpoint-8, checkpoint-4"):
        resolve_output_dir(mine, others, overwrite=False)
    assert resolve_output_dir(mine, others, overwrite=True) == others
    assert resolve_output_dir(str(tmp_path / "new"), others, overwrite=False) == others
    with pytest.raises(ValueError, match="checkpoint-8"):
        resolve_output_dir(mine, str(tmp_path / "mine" / "checkpoint-4"), overwrite=False)
    # A folder that was moved to another disk is still this run's.
    (tmp_path / "mine" / "checkpoint-8").rename(tmp_path / "disk")
    (tmp_path / "mine" / "checkpoint-8").symlink_to(tmp_path / "disk")
    assert resolve_output_dir(mine, "auto", overwrite=False) == str(tmp_path / "mine" / "checkpoint-8")
    # As it is named on the hub.
    named = shutil.copytree(others, tmp_path / "by_hand" / "last-checkpoint")
    assert resolve_output_dir(str(tmp_path / "by_hand"), str(named), overwrite=False) == str(named)


def test_check_checkpoint_refuses_another_model(roberta_folder, tmp_path, caplog):
    _, trainer = stoppable(roberta_folder, tmp_path)
    folder, config = tmp_path / "checkpoint-8", trainer.model.config
    (tmp_path / "training_history.json").write_text('{"config": {"data_fingerprint": "this"}}')
    saved = json.loads((folder / "config.json").read_text())
    del (
        saved["lexical_features"],
        saved["token_pooling"],
        saved["chunk_prefix"],
    )  # as one was saved before there were any
    (folder / "config.json").write_text(json.dumps(saved))
    check_checkpoint(folder, config, "this", needs_best=True)
    assert not caplog.records
    check_checkpoint(folder, config, "that", needs_best=True)
    assert "data" in caplog.text
    for name, value in (
        ("pooling_size", 16),
        ("token_pooling", "cls"),
        ("chunk_prefix", "passage: "),
        ("chunk_transformer_layers", 1),
        ("id2label", {0: "b", 1: "a", 2: "c"}),
    ):
        other = copy.deepcopy(config)
        setattr(other, name, value)
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            check_checkpoint(folder, other, "this", needs_best=True)
    other = copy.deepcopy(config)
    other.encoder_config.hidden_size = 64
    with pytest.raises(ValueError, match=r"hidden_size.*\b64\b"):
        check_checkpoint(folder, other, "this", needs_best=True)


class Poisoned(SplitLengths):
    """Some documents hold a word for which the model below has no number."""

    def __init__(self, poisoned: set[int], count: int = 50):
        super().__init__(count)
        for index, item in enumerate(self.items):
            item["id"] = f"d{index}"
            if index in poisoned:
                item["input_ids"][0][1] = 399


def poison(model) -> None:
    def forward(module, args, kwargs, output):
        if (kwargs["input_ids"] == 399).any() and module.training:
            output.logits = output.logits * float("nan")
        return output

    model.register_forward_hook(forward, with_kwargs=True)


def test_non_finite_step_is_skipped_and_its_documents_are_named(roberta_model, tmp_path, caplog):
    poison(roberta_model)
    second_step = list(EpochSampler(50, 42))[16:32]
    trainer = trainer_for(roberta_model, tmp_path, Poisoned({second_step[5]}), logging_steps=1)
    trainer.add_callback(TrainingMonitor(trainer))
    before = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            before[state.global_step] = copy.deepcopy(roberta_model.state_dict())

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.global_step == 4
    assert all(torch.equal(before[1][name], before[2][name]) for name in before[1])
    assert not all(torch.equal(before[2][name], before[3][name]) for name in before[2])
    # Of the micro-batch in which it stands, and no other.
    assert re.search(r"(?i)step 2\b.*\bnan\b", caplog.text)
    assert ", ".join(f"d{index}" for index in second_step[4:8]) in caplog.text
    assert f"d{second_step[0]}," not in caplog.text
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    [total] = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    assert len(losses) == 3
    assert total == pytest.approx(sum(losses) / 3)
    assert trainer.stats.synchronize()["skipped"] == 1
    assert trainer.stats.totals["documents"] == 34


def test_three_non_finite_steps_in_a_row_end_the_run(roberta_model, tmp_path):
    poison(roberta_model)
    trainer = trainer_for(
        roberta_model, tmp_path, Poisoned(set(range(50))), num_train_epochs=2, save_strategy="steps", save_steps=1
    )
    health = TrainingMonitor(trainer)
    trainer.add_callback(health)
    trainer.train()
    assert trainer.state.global_step == 3
    assert re.search(r"\b3\b.*\bstep 3\b", health.failure)
    assert "d0" in health.failure
    assert "--learning_rate" in health.failure
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_max_loss_spike_skips_a_step_whose_loss_leaps(roberta_model, tmp_path, caplog):
    spiked = iter([1.0] * 26 + [40.0] * 4 + [1.0] * 100)  # 13 micro-batches an epoch of four steps

    def forward(module, args, kwargs, output):
        output.logits = output.logits * next(spiked)
        return output

    roberta_model.register_forward_hook(forward, with_kwargs=True)
    trainer = trainer_for(roberta_model, tmp_path, num_train_epochs=3, max_loss_spike=2.0)
    trainer.train()
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(r"(?i)step 9\b.*loss", warning)
