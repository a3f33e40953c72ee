"""Every field of TrainingArguments, and every value of `optim` and `lr_scheduler_type`: it works, or is refused.

A field is in one of four tables: WORKS (with the check that shows it), REFUSED (of training_args.py), ELSEWHERE (the
test that shows it) and NOT_HERE (why one process on a CPU cannot). A field that a new version of transformers adds is in
none, and fails the first test.
"""

import copy
import importlib.util
import json
import logging
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    DebertaV2Config,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging as transformers_logging

import train_hf
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training import optimizer
from modeling.training.training_args import REFUSED, REFUSED_OF_ACCELERATOR, HierarchicalTrainingArguments
from scripts.common.recipe import RENAMED, parse_with_recipe
from scripts.training.arguments import DataArguments, ModelArguments
from scripts.training.run import terminal_level
from scripts.training.setup import checkpoint_activations
from tests.conftest import ROOT, training_command
from tests.tiny_training import SplitLengths, trainer_for

KINDS = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
FIELDS = {field.name: field for field in fields(TrainingArguments)}
# transformers 5.23 renames gradient_checkpointing to activation_checkpointing.
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
STEPS = 4  # of an epoch: 16 documents, 4 at a time
BASE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
}


class Documents(SplitLengths):
    """Documents that record the order in which they are read."""

    def __init__(self) -> None:
        super().__init__(4 * STEPS)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict:
        self.read.append(index)
        return super().__getitem__(index)


class Events(TrainerCallback):
    """The steps at which something happened."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.num_predictions = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.num_predictions += 1


class Trainings:
    """Trainings of one epoch, each run once for all tests that ask for it."""

    def __init__(self, model: HierarchicalRobertaForSequenceClassification, folder: Path):
        self.model, self.folder, self.done = model, folder, {}

    def trainer(self, **options: Any) -> Any:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        folder.mkdir()
        return trainer_for(copy.deepcopy(self.model), options.pop("output_dir", folder), Documents(), **BASE | options)

    def __call__(self, **options: Any) -> types.SimpleNamespace:
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self.done:
            trainer, events, calls = self.trainer(**options), Events(), [0, 0]
            for index, layer in enumerate(trainer.model.encoder_layers()):
                layer.attention.register_forward_hook(
                    lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
                )
            trainer.add_callback(events)
            trainer.train_dataset.read.clear()
            metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
            log = trainer.state.log_history
            self.done[key] = types.SimpleNamespace(
                trainer=trainer,
                metrics=metrics,
                calls=calls,
                steps=trainer.state.global_step,
                order=trainer.train_dataset.read,
                weights={name: value.clone() for name, value in trainer.model.state_dict().items()},
                losses=[record["loss"] for record in log if "loss" in record],
                rates=[record["learning_rate"] for record in log if "loss" in record],
                evaluated=events.evaluated,
                num_predictions=events.num_predictions,
                eval_losses=[record["eval_loss"] for record in log if "eval_loss" in record],
                checkpoints=sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")),
            )
        return self.done[key]


@pytest.fixture(scope="module")
def run(_models, tmp_path_factory) -> Trainings:
    return Trainings(_models["roberta"], tmp_path_factory.mktemp("options"))


@pytest.fixture(autouse=True)
def _verbosity():
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def differ(one: Any, other: Any) -> bool:
    return any(not torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def arguments(tmp_path: Path, **options: Any) -> HierarchicalTrainingArguments:
    return HierarchicalTrainingArguments(output_dir=str(tmp_path), **options)


# ---- what works, and how it shows ----


def changes_training(**options: Any) -> Callable:
    """A check that the options change the trained weights, against the same ones without the first."""

    def check(run: Trainings) -> None:
        others = dict(list(options.items())[1:])
        assert differ(run(**options), run(**others))

    return check


def group_setting(name: str, key: str, value: float, expected: Any) -> Callable:
    def check(run: Trainings) -> None:
        created = run.trainer(**{name: value}).create_optimizer()
        assert all(group[key] == expected for group in created.param_groups)
        changes_training(**{name: value})(run)

    return check


def loader_setting(name: str, value: Any, attribute: str, expected: Any, **others: Any) -> Callable:
    def check(run: Trainings) -> None:
        trainer = run.trainer(**{name: value, **others})
        for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
            assert str(expected) in str(getattr(loader, attribute))

    return check


def output_dir(run: Trainings) -> None:
    folder = run.folder / "named"
    assert run(output_dir=folder, save_strategy="epoch").checkpoints == [f"checkpoint-{STEPS}"]
    assert (folder / f"checkpoint-{STEPS}").is_dir()


def train_batch_size(run: Trainings) -> None:
    assert run(per_device_train_batch_size=2).steps == 2 * STEPS


def eval_batch_size(run: Trainings) -> None:
    by_eight, by_four = (run(eval_strategy="epoch", per_device_eval_batch_size=size) for size in (8, 4))
    assert (by_eight.num_predictions, by_four.num_predictions) == (2, 4)
    assert by_eight.eval_losses == pytest.approx(by_four.eval_losses, abs=1e-6)


def accumulation(run: Trainings) -> None:
    assert run(gradient_accumulation_steps=2).steps == STEPS // 2


def epochs(run: Trainings) -> None:
    assert run(num_train_epochs=2).steps == 2 * STEPS


def max_steps(run: Trainings) -> None:
    assert run(max_steps=3).steps == 3


def learning_rate(run: Trainings) -> None:
    assert run(learning_rate=2e-3, lr_scheduler_type="constant").rates == [2e-3] * STEPS


def scheduler(run: Trainings) -> None:
    assert run(lr_scheduler_type="linear").rates != run().rates


def scheduler_kwargs(run: Trainings) -> None:
    restarts = {"lr_scheduler_type": "cosine_with_restarts"}
    assert run(**restarts, lr_scheduler_kwargs='{"num_cycles": 2}').rates != run(**restarts).rates


def warmup(run: Trainings) -> None:
    for steps in (2, 0.5):
        rates = run(warmup_steps=steps, lr_scheduler_type="constant_with_warmup").rates
        assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def label_smoothing(run: Trainings) -> None:
    assert run(label_smoothing_factor=0.5).losses[0] != run().losses[0]


def half_precision(run: Trainings) -> None:
    lower = run(bf16=True)
    assert lower.losses != run().losses
    assert lower.losses == pytest.approx(run().losses, rel=0.05)
    assert {value.dtype for value in lower.weights.values() if value.is_floating_point()} == {torch.float32}


def tf32(run: Trainings) -> None:
    with pytest.raises(ValueError, match="tf32"):
        run(tf32=True)


def recomputes(name: str) -> Callable:
    def check(run: Trainings) -> None:
        plain, recomputing = run(), run(**{name: True})
        assert recomputing.calls == [2 * count for count in plain.calls]
        assert not differ(recomputing, plain)

    return check


def checkpointing_settings(name: str) -> Callable:
    def check(run: Trainings) -> None:
        plain, given = run(), {name: True, f"{name}_kwargs": '{"determinism_check": "none"}'}
        assert run(**given).calls == [2 * count for count in plain.calls]
        if name == "activation_checkpointing":
            every_second = run(**given | {f"{name}_kwargs": '{"every_n_layers": 2}'})
            assert every_second.calls == [2 * plain.calls[0], plain.calls[1]]
            assert not differ(every_second, plain)

    return check


def neftune(run: Trainings) -> None:
    plain = {"learning_rate": 0, "eval_strategy": "epoch"}
    noisy = run(neftune_noise_alpha=5, **plain)
    assert noisy.losses != run(**plain).losses
    assert noisy.eval_losses == run(**plain).eval_losses
    assert not noisy.trainer.model.get_input_embeddings()._forward_hooks
    assert not differ(noisy, run(**plain))
    for frozen in ({"freeze_encoder": True}, {"freeze_layers": 1}):
        with pytest.raises(ValueError, match="neftune_noise_alpha"):
            run.trainer(neftune_noise_alpha=5, **frozen)


def logging_strategy(run: Trainings) -> None:
    assert len(run(logging_strategy="epoch").losses) == 1


def logging_steps(run: Trainings) -> None:
    assert len(run(logging_steps=2).losses) == STEPS // 2


def logging_first_step(run: Trainings) -> None:
    assert len(run(logging_steps=100, logging_first_step=True).losses) == 1


def input_tokens(run: Trainings) -> None:
    documents = SplitLengths(4 * STEPS)
    tokens = sum(len(chunk) for document in documents for chunk in document["input_ids"])
    counted = {way: run(include_num_input_tokens_seen=way) for way in ("non_padding", "all")}
    assert counted["non_padding"].trainer.state.num_input_tokens_seen == tokens
    assert counted["all"].trainer.state.num_input_tokens_seen > tokens
    with pytest.raises(ValueError, match="include_num_input_tokens_seen"):
        run.trainer(include_num_input_tokens_seen="all", freeze_encoder=True)


def log_level(run: Trainings) -> None:
    assert terminal_level(run.trainer(log_level="error").args) == logging.ERROR
    assert transformers_logging.get_verbosity() == logging.ERROR


def eval_strategy(run: Trainings) -> None:
    assert run(eval_strategy="epoch", num_train_epochs=2).evaluated == [STEPS, 2 * STEPS]


def eval_steps(run: Trainings) -> None:
    assert run(eval_strategy="steps", eval_steps=2).evaluated == [2, 4]


def eval_delay(run: Trainings) -> None:
    assert run(eval_strategy="steps", eval_steps=2, eval_delay=3).evaluated == [4]


def eval_on_start(run: Trainings) -> None:
    assert run(eval_strategy="epoch", eval_on_start=True).evaluated == [0, STEPS]


def eval_accumulation(run: Trainings) -> None:
    given = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    assert run(**given, eval_accumulation_steps=1).eval_losses == run(**given).eval_losses


def save_strategy(run: Trainings) -> None:
    assert run(save_strategy="epoch").checkpoints == [f"checkpoint-{STEPS}"]


def save_steps(run: Trainings) -> None:
    assert run(save_strategy="steps", save_steps=2, save_total_limit=9).checkpoints == ["checkpoint-2", "checkpoint-4"]


def save_total_limit(run: Trainings) -> None:
    given = {"save_strategy": "steps", "save_steps": 1}
    assert len(run(**given, save_total_limit=2).checkpoints) == 2


SELECTED = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 3e-3}


def best_model(run: Trainings) -> None:
    last = run(**SELECTED, metric_for_best_model="f1_macro", greater_is_better=False)
    best = run(**SELECTED, metric_for_best_model="f1_macro", greater_is_better=False, load_best_model_at_end=True)
    assert best.trainer.state.best_global_step < best.steps
    assert differ(best, last)


def metric_for_best_model(run: Trainings) -> None:
    for metric in ("loss", "f1_macro"):
        state = run(**SELECTED, metric_for_best_model=metric).trainer.state
        values = [record[f"eval_{metric}"] for record in state.log_history if f"eval_{metric}" in record]
        assert state.best_metric == (min if metric == "loss" else max)(values)


def greater_is_better(run: Trainings) -> None:
    state = run(**SELECTED, metric_for_best_model="loss", greater_is_better=True).trainer.state
    assert state.best_metric == max(record["eval_loss"] for record in state.log_history if "eval_loss" in record)


def ignore_data_skip(run: Trainings) -> None:
    whole = run(save_strategy="steps", save_steps=2, save_total_limit=9)
    middle = str(Path(whole.trainer.args.output_dir) / "checkpoint-2")
    exact, ignoring = (run(resume_from_checkpoint=middle, ignore_data_skip=given) for given in (False, True))
    assert not differ(exact, whole)
    assert ignoring.steps == STEPS
    assert ignoring.order[:4] == whole.order[:4] != exact.order[:4]


def resume_from_checkpoint(run: Trainings) -> None:
    ignore_data_skip(run)


def full_determinism(run: Trainings) -> None:
    try:
        run.trainer(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def seed(run: Trainings) -> None:
    assert run(seed=1).order != run(seed=42).order
    assert run(seed=42).order == run().order


def data_seed(run: Trainings) -> None:
    assert run(data_seed=1).order == run(seed=1).order


def use_cpu(run: Trainings) -> None:
    assert run.trainer(use_cpu=True).args.device.type == "cpu"


def accelerator_config(run: Trainings) -> None:
    given = {"accelerator_config": {"non_blocking": True}}
    assert run.trainer(**given).accelerator.non_blocking
    assert not run.trainer().accelerator.non_blocking


def sampling_strategy(run: Trainings) -> None:
    everything = list(range(4 * STEPS))
    given = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "train_sampling_strategy": "sequential"}
    whole = run(**given)
    assert whole.order == everything
    resumed = run(**given, resume_from_checkpoint=str(Path(whole.trainer.args.output_dir) / "checkpoint-2"))
    assert not differ(resumed, whole)
    assert run(train_sampling_strategy="batch_rebalance").order == run().order != everything
    assert sorted(run().order) == everything


def drop_last(run: Trainings) -> None:
    assert run(dataloader_drop_last=True, per_device_train_batch_size=5).steps == 3


def trackers(run: Trainings) -> None:
    for chosen in ("none", "tensorboard"):
        callbacks = run.trainer(report_to=chosen).callback_handler.callbacks
        assert any(isinstance(callback, TensorBoardCallback) for callback in callbacks) == (chosen == "tensorboard")


def memory_metrics(run: Trainings) -> None:
    assert "train_mem_cpu_alloc_delta" in run(skip_memory_metrics=False).metrics
    assert "train_mem_cpu_alloc_delta" not in run().metrics


WORKS: dict[str, Callable[[Trainings], None]] = {
    "output_dir": output_dir,
    "per_device_train_batch_size": train_batch_size,
    "per_device_eval_batch_size": eval_batch_size,
    "gradient_accumulation_steps": accumulation,
    "num_train_epochs": epochs,
    "max_steps": max_steps,
    "learning_rate": learning_rate,
    "lr_scheduler_type": scheduler,
    "lr_scheduler_kwargs": scheduler_kwargs,
    "warmup_steps": warmup,
    "optim": changes_training(optim="sgd"),
    "optim_args": changes_training(optim_args="momentum=0.9", optim="sgd"),
    "weight_decay": changes_training(weight_decay=0.5),
    "adam_beta1": group_setting("adam_beta1", "betas", 0.5, (0.5, 0.999)),
    "adam_beta2": group_setting("adam_beta2", "betas", 0.5, (0.9, 0.5)),
    "adam_epsilon": group_setting("adam_epsilon", "eps", 1e-2, 1e-2),
    "max_grad_norm": changes_training(max_grad_norm=1e-3, optim="sgd"),
    "label_smoothing_factor": label_smoothing,
    "bf16": half_precision,
    "tf32": tf32,
    "activation_checkpointing": recomputes("activation_checkpointing"),
    "activation_checkpointing_kwargs": checkpointing_settings("activation_checkpointing"),
    "gradient_checkpointing": recomputes("gradient_checkpointing"),
    "gradient_checkpointing_kwargs": checkpointing_settings("gradient_checkpointing"),
    "neftune_noise_alpha": neftune,
    "logging_strategy": logging_strategy,
    "logging_steps": logging_steps,
    "logging_first_step": logging_first_step,
    "include_num_input_tokens_seen": input_tokens,
    "log_level": log_level,
    "eval_strategy": eval_strategy,
    "eval_steps": eval_steps,
    "eval_delay": eval_delay,
    "eval_on_start": eval_on_start,
    "eval_accumulation_steps": eval_accumulation,
    "save_strategy": save_strategy,
    "save_steps": save_steps,
    "save_total_limit": save_total_limit,
    "load_best_model_at_end": best_model,
    "metric_for_best_model": metric_for_best_model,
    "greater_is_better": greater_is_better,
    "ignore_data_skip": ignore_data_skip,
    "resume_from_checkpoint": resume_from_checkpoint,
    "full_determinism": full_determinism,
    "seed": seed,
    "data_seed": data_seed,
    "use_cpu": use_cpu,
    "accelerator_config": accelerator_config,
    "train_sampling_strategy": sampling_strategy,
    "dataloader_drop_last": drop_last,
    "dataloader_num_workers": loader_setting("dataloader_num_workers", 1, "num_workers", 1),
    "dataloader_pin_memory": loader_setting("dataloader_pin_memory", True, "pin_memory", False),  # a CPU pins nothing
    "dataloader_prefetch_factor": loader_setting(
        "dataloader_prefetch_factor", 3, "prefetch_factor", 3, dataloader_num_workers=1
    ),
    "dataloader_multiprocessing_context": loader_setting(
        "dataloader_multiprocessing_context", "spawn", "multiprocessing_context", "Spawn", dataloader_num_workers=1
    ),
    "report_to": trackers,
    "skip_memory_metrics": memory_metrics,
}

# File and function of the test.
ELSEWHERE = {
    "fp16": "test_devices.py::test_the_first_steps_that_the_fp16_scaler_skips_are_no_warning",
    "push_to_hub": "test_hub.py::test_hub_holds_the_best_model_and_the_last_checkpoint",
    "hub_token": "test_train_hf.py::test_hub_token_is_not_written_down",
    "hub_model_id": "test_hub.py::test_hub_holds_the_best_model_and_the_last_checkpoint",
    "hub_strategy": "test_hub.py::test_hub_strategy",
    "hub_private_repo": "test_hub.py::test_public_repo_and_branch_are_pushed_to_when_that_is_meant",
    "hub_revision": "test_hub.py::test_public_repo_and_branch_are_pushed_to_when_that_is_meant",
    "ddp_backend": "test_ranks.py::test_rank_that_dies_ends_the_other_with_a_message",
    "ddp_timeout": "test_ranks.py::test_rank_that_dies_ends_the_other_with_a_message",
    "ddp_broadcast_buffers": "test_distributed.py::test_weights_do_not_depend_on_batching_and_number_of_processes",
}

# What one process on a CPU cannot show, and what is done with it.
NOT_HERE = {
    "torch_empty_cache_steps": "frees the cache of a GPU; Trainer reads it",
    "eval_use_gather_object": "gathers Python objects from several processes; Trainer reads it",
    "logging_nan_inf_filter": "steps with such losses are skipped, and no loss is a mean that includes them",
    "log_on_each_node": "which of several machines logs; Trainer reads it",
    "log_level_replica": "the level of the other processes",
    "disable_tqdm": "progress bars are shown on terminals",
    "run_name": "the run's name in a tracker",
    "project": "Trackio's project",
    "trackio_space_id": "Trackio's space",
    "trackio_bucket_id": "Trackio's storage",
    "trackio_static_space_id": "Trackio's static space",
    "do_train": "train_hf.py always trains",
    "do_eval": "train_hf.py always evaluates",
    "do_predict": "train_hf.py always predicts",
    "ddp_find_unused_parameters": "gradients are averaged once a step, whichever there are",
    "deepspeed": "needs GPUs",
    "local_rank": "launchers set LOCAL_RANK",
}


def test_every_field_is_in_one_table():
    # Of the sampling strategies one is refused, the others work. The old names were fields before transformers 5.16.
    tables = (WORKS, REFUSED.keys() - {"train_sampling_strategy"}, ELSEWHERE, NOT_HERE, RENAMED)
    assert {name: sum(name in table for table in tables) for name in FIELDS} == dict.fromkeys(FIELDS, 1)


@pytest.mark.parametrize("field", [name for name in WORKS if name in FIELDS])
def test_field_works(field, run):
    WORKS[field](run)


@pytest.mark.parametrize("field", ELSEWHERE)
def test_field_is_tested_elsewhere(field):
    file, name = ELSEWHERE[field].split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M)


OTHER_VALUES = {
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "tokens",
    "optim_target_modules": "all-linear",
    "liger_kernel_config": {"rope": True},
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "include_for_metrics": ["inputs"],
    "label_names": ["other"],
    "debug": "underflow_overflow",
    "ddp_bucket_cap_mb": 25,
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "parallelism_config": object(),
}


@pytest.mark.parametrize("field", [name for name in REFUSED if name in FIELDS])
def test_field_is_refused(field, tmp_path):
    accepted, _ = REFUSED[field]
    value = OTHER_VALUES.get(field, not accepted[0])
    with pytest.raises(ValueError, match=f"`{field}`"):
        arguments(tmp_path, **{field: value})
    for value in accepted:
        arguments(tmp_path, **{field: value})


@pytest.mark.parametrize("setting", REFUSED_OF_ACCELERATOR)
def test_setting_of_the_accelerator_is_refused(setting, tmp_path):
    value = {"num_steps": 2} if setting == "gradient_accumulation_kwargs" else setting != "even_batches"
    with pytest.raises(ValueError, match=rf"`{setting}`.*`accelerator_config`"):
        arguments(tmp_path, accelerator_config={setting: value})


def test_defaults_are_those_of_the_table(tmp_path):
    """The table at the top of training_args.py names every default that differs, and no other."""
    text = (ROOT / "modeling" / "training" / "training_args.py").read_text(encoding="utf-8").split('"""')[1]
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| ")][1:]
    named = {name.strip() for row in rows for name in row.split(",")}
    ours = {field.name: field for field in fields(HierarchicalTrainingArguments)}

    def default(field: Any) -> Any:
        return field.default if field.default is not MISSING else field.default_factory()

    differing = {name for name, field in FIELDS.items() if default(field) != default(ours[name])}
    # None in both, and means another thing here.
    assert named == differing - {"output_dir"} | {"accelerator_config", "hub_private_repo"}


# ---- optimizers and schedules ----

PACKAGES = {
    "bitsandbytes": r"8bit|32bit|bnb|ademamix|lion",
    "torchao": "adamw_torch_[48]bit",
    "optimi": "stable",
    "torch_xla": "xla",
    "torch_npu": "npu",
    "torchdistx": "anyprecision",
    "apex": "apex",
}


def package_of(optim: str) -> str:
    """The package that an optimizer needs besides torch and transformers."""
    matching = [package for package, pattern in PACKAGES.items() if re.search(pattern, optim)]
    return matching[-1] if matching else "torch"


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_optimizer_trains_and_resumes_exactly_or_is_refused(optim, run):
    given = {"optim": optim, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    if any(part in optim for part in optimizer.REFUSED):
        with pytest.raises(ValueError, match=f"`optim` {optim} .*use adamw_torch_fused"):
            run.trainer(**given).create_optimizer()
        return
    if importlib.util.find_spec(package_of(optim)) is None:
        with pytest.raises(ValueError, match=f"`optim` {optim} cannot be used"):
            run.trainer(**given).create_optimizer()
        return
    whole = run(**given)
    assert differ(whole, types.SimpleNamespace(weights=run.model.state_dict()))
    assert {group["name"] for group in whole.trainer.optimizer.param_groups} >= {"encoder", "head_no_decay"}
    resumed = run(**given, resume_from_checkpoint=str(Path(whole.trainer.args.output_dir) / "checkpoint-2"))
    assert not differ(resumed, whole)


@pytest.mark.parametrize(
    ("optim", "optim_args"), [("adamw_torch", "momentum=0.9"), ("sgd", "momentum"), ("sgd", "weight_decay=1")]
)
def test_optim_args_that_are_of_no_use_are_refused(optim, optim_args, run):
    with pytest.raises(ValueError, match=rf"`optim_args`.*{optim_args}"):
        run.trainer(optim=optim, optim_args=optim_args).create_optimizer()


def test_an_optimizer_of_a_missing_package_is_named_before_the_data_are_read(tmp_path, call_command, monkeypatch):
    monkeypatch.setattr("transformers.trainer.Trainer.get_optimizer_cls_and_kwargs", _missing)
    words = training_command(tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "run", optim="adamw_8bit")[2:]
    with pytest.raises(ValueError, match="`optim` adamw_8bit cannot be used: no such package"):
        call_command(train_hf.command, *words)


def _missing(*_: Any) -> None:
    raise ImportError("no such package")


SCHEDULER_SETTINGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_trains_and_resumes_exactly(kind, run):
    given = {"lr_scheduler_type": kind, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}
    given |= {"eval_strategy": "steps", "eval_steps": 2} if kind in ("reduce_lr_on_plateau", "greedy") else {}
    given |= {"lr_scheduler_kwargs": json.dumps(SCHEDULER_SETTINGS[kind])} if kind in SCHEDULER_SETTINGS else {}
    whole = run(**given)
    assert len(whole.rates) == STEPS
    assert min(whole.rates) >= 0
    resumed = run(**given, resume_from_checkpoint=str(Path(whole.trainer.args.output_dir) / "checkpoint-2"))
    assert not differ(resumed, whole)


@pytest.mark.parametrize(
    ("kind", "settings"), [("cosine", {"speed": 1}), ("warmup_stable_decay", None), ("constant", {"num_cycles": 1})]
)
def test_settings_that_a_schedule_lacks_or_does_not_take_are_refused(kind, settings, tmp_path):
    with pytest.raises(ValueError, match=rf"lr_scheduler_kwargs.*{kind}|{kind}.*lr_scheduler_kwargs"):
        arguments(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=settings)


# ---- activation checkpointing ----


SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
ENCODERS = {
    "roberta": RobertaConfig(**SIZES, max_position_embeddings=66),
    "electra": ElectraConfig(**SIZES, embedding_size=16),  # the embeddings are projected to the width of the layers
    "deberta": DebertaV2Config(
        **SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm"
    ),
    "modernbert": ModernBertConfig(**SIZES, pad_token_id=1),  # a norm follows the layers
}


def tensor_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("live_chunks", [0, 4])
def test_backward_pass_ends_at_the_first_trained_layer(kind, live_chunks, run):
    config = HierarchicalRobertaConfig(encoder_config=ENCODERS[kind].to_dict(), num_labels=3, chunk_length=16)
    model = HierarchicalRobertaForSequenceClassification(config)
    model.freeze_layers(1)
    model.live_chunks = live_chunks
    batch = next(iter(run.trainer().get_train_dataloader()))
    gradients = {}
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model, {})
        reached = set()
        first, second = model.encoder_layers()
        for part in (model.encoder.embeddings, first):
            part.register_forward_hook(lambda *call, reached=reached: reached.add(tensor_of(call[2]).requires_grad))
        model.train().zero_grad()
        torch.manual_seed(0)
        model(**batch).loss.backward()
        assert reached == {False}
        gradients[checkpointed] = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert all(value.grad is not None for value in second.parameters())
    torch.testing.assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize(
    "settings",
    [{"use_reentrant": True}, {"preserve_rng_state": False}, {"every_n_layers": 0}, {"offload": True}, {"every": 2}],
)
def test_checkpointing_settings_that_would_fail_or_change_gradients_are_refused(settings, tmp_path):
    given = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": settings}
    with pytest.raises(ValueError, match=f"`{CHECKPOINTING}_kwargs`.*{next(iter(settings))}"):
        arguments(tmp_path, **given, use_cpu=True)


# ---- old names ----


@pytest.mark.parametrize("name", ["report_to", "save_total_limit", "metric_for_best_model"])
def test_option_that_a_recipe_leaves_empty_is_named(name, tmp_path):
    """Its default would be used, and TensorBoard be written where nothing was wanted."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}:\nbf16:\ninclude_for_metrics: []\nencoder: roberta\n")
    with pytest.raises(ValueError, match=rf"recipe\.yaml: {name} is empty"):
        parse_with_recipe(KINDS, ["--config", str(recipe)])


@pytest.mark.parametrize("name", RENAMED)
def test_old_name_is_answered_with_the_new_one(name, tmp_path):
    for word in (f"--{name}", f"--{name.replace('_', '-')}"):
        with pytest.raises(ValueError, match=f"{word} is no longer an option: {re.escape(RENAMED[name])}"):
            parse_with_recipe(KINDS, [word, "1"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({name: 1}))
    with pytest.raises(ValueError, match=rf"recipe\.yaml: .*{name} is no longer an option"):
        parse_with_recipe(KINDS, ["--config", str(recipe)])


def test_what_replaces_an_old_name_exists():
    known = {f"--{field.name}" for kind in KINDS for field in fields(kind)} | {"--config_file"}
    for name, replacement in RENAMED.items():
        assert set(re.findall(r"--\w+", replacement)) <= known, name
        assert not set(re.findall(r"--\w+", replacement)) & {f"--{old}" for old in RENAMED}
