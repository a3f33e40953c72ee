"""Weights sharded over processes (FSDP2), and the accelerate configs of scripts/recipes/accelerate."""

import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from modeling.training.checkpointing import checkpoint_problem, list_checkpoints
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.training.setup import plan_memory
from tests.conftest import train, training_command
from tests.processes import ROOT, run, start
from tests.tiny_training import SplitLengths, trainer_for
from tests.uneven_ranks import steps, tiny_model

CONFIGS = sorted((ROOT / "scripts/recipes/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_accelerate_config_is_one(path):
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.num_processes == 2
    assert config.mixed_precision == "no"  # train_hf.py chooses it for the device
    head = path.read_text(encoding="utf-8").partition("compute_environment")[0]
    assert re.search(r"(?i)\b(run|tested|verified)\b", head), "it must say whether it was run"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"] in head + "MULTI_GPU FSDP DEEPSPEED"


def largest_difference(ours, theirs):
    return max(float((value - theirs[name]).abs().max()) for name, value in ours.items())


# Without dropout, two processes and one compute the same.
EXACT = {"dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 2, "gradient_accumulation_steps": 2}


def train_sharded(dataset_dir, encoder, output_dir, **more):
    """Run train_hf.py in two processes that shard the weights, on a CPU."""
    given = {**EXACT, "per_device_train_batch_size": 5, "use_cpu": True, "ddp_timeout": 60, **more}
    command = training_command(dataset_dir, encoder, output_dir, **given)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "scripts/recipes/accelerate/fsdp.yaml"]
    launch += ["--main_process_port", "0", "tests/sharded_on_cpu.py"]
    return run([sys.executable, *launch, *command[2:]], cwd=ROOT, timeout=240, cold=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_training_ends_as_one_process_does_and_exports_a_plain_file(prepared_folder, roberta_folder, tmp_path):
    sharded = partial(train_sharded, prepared_folder, roberta_folder, tmp_path / "sharded")
    # Two chunks an encoder batch: the ranks have more and fewer, and recompute some of them.
    uneven = {"token_budget": 32, "live_chunks": 4}
    done = sharded(**uneven)
    assert done.returncode == 0, done.stderr
    one = train(prepared_folder, roberta_folder, tmp_path / "one", per_device_train_batch_size=10, **EXACT, **uneven)
    assert one.returncode == 0, one.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "sharded"))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded", trust_remote_code=True)

    last, _ = list_checkpoints(str(tmp_path / "sharded"))
    assert checkpoint_problem(last) is None
    assert {"optimizer.bin", "pytorch_model_fsdp.bin"} <= {path.name for path in last.iterdir()}  # it was sharded
    assert not list(tmp_path.glob("sharded/**/_fsdp*.py"))  # the code that travels is this project's
    expected = load_file(last / "model.safetensors")
    shutil.rmtree(last)
    done = sharded(resume_from_checkpoint="auto", **uneven)
    assert done.returncode == 0, done.stderr
    found = load_file(last / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


@pytest.mark.distributed
def test_ranks_with_uneven_documents_train_as_one_process_does(tmp_path):
    ranks = [
        start(
            [sys.executable, "-m", "tests.uneven_ranks", rank, tmp_path],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=90)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = steps(model, (0, 1))
    ours = dict(model.named_parameters())
    theirs = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([rank["logits"] for rank in theirs]), logits, atol=1e-5, rtol=0)
    for name, value in theirs[0]["weights"].items():
        torch.testing.assert_close(value, ours[name].detach(), atol=1e-5, rtol=0)
        assert not torch.equal(value, before[name]) or name.endswith("key.bias"), name  # to which attention is blind
    assert sum(sum(rank["encoded"]) for rank in theirs) == sum(model.token_counts)


def test_a_model_that_will_be_sharded_is_not_loaded_whole(roberta_model, tmp_path, caplog, monkeypatch):
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, autocast=nullcontext)
    monkeypatch.setattr(type(roberta_model), "to", lambda *_, **__: pytest.fail("the whole model was moved"))
    monkeypatch.setattr(roberta_model, "encode_chunks", lambda *_: pytest.fail("the whole encoder was run"))
    caplog.set_level("INFO", "train_hf")
    plan = partial(plan_memory, roberta_model, {})
    plan(HierarchicalTrainingArguments(output_dir=str(tmp_path)), accelerator)
    assert roberta_model.live_chunks == 0
    assert "--live_chunks" in caplog.text
    caplog.clear()
    plan(HierarchicalTrainingArguments(output_dir=str(tmp_path), live_chunks="8"), accelerator)
    assert roberta_model.live_chunks == 8
    assert not caplog.text
    for option in ("dry_run", "freeze_encoder", "lora_rank"):
        with pytest.raises(ValueError, match=f"--{option}.*shard"):
            plan(HierarchicalTrainingArguments(output_dir=str(tmp_path), **{option: True}), accelerator)


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_bf16_is_autocast_over_fp32_weights(prepared_folder, roberta_folder, tmp_path):
    """As two processes that do not shard: their encoder batches are the same, and gradients are added up in fp32, in another
    order at most. (Measured: 2e-7 apart, and 5e-4 from arithmetic in fp32.)"""
    given = {"bf16": True, "token_budget": 32, "num_train_epochs": 1}
    done = train_sharded(prepared_folder, roberta_folder, tmp_path / "sharded", **given)
    assert done.returncode == 0, done.stderr
    assert "--live_chunks" in done.stderr + done.stdout
    whole = {"processes": 2, "per_device_train_batch_size": 5}
    for name, more in (("whole", whole), ("fp32", {"per_device_train_batch_size": 10, "bf16": False})):
        done = train(prepared_folder, roberta_folder, tmp_path / name, **EXACT | given | more)
        assert done.returncode == 0, done.stderr
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("sharded", "whole", "fp32")}
    apart = {name: largest_difference(weights["sharded"], weights[name]) for name in ("whole", "fp32")}
    assert apart["whole"] < 1e-5 < 1e-4 < apart["fp32"]


def test_sharded_weights_train_and_evaluate_under_autocast_and_predict_in_fp32(roberta_model, tmp_path, monkeypatch):
    trainer = trainer_for(roberta_model, tmp_path, SplitLengths(8), bf16=True, use_cpu=True)
    monkeypatch.setattr("modeling.training.trainer.shards_weights", lambda _: True)
    trainer.accelerator._models.append(roberta_model)  # as prepared, and nothing wraps its forward
    seen = set()
    roberta_model.encoder.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    batch = next(iter(trainer.get_eval_dataloader()))
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(roberta_model.train(), batch)
    assert seen == {True}
    trainer.evaluate()
    assert seen == {True}
    seen.clear()
    trainer.predict(trainer.eval_dataset)
    assert seen == {False}


def test_out_of_memory_ends_a_sharded_run(roberta_model, tmp_path, monkeypatch):
    """What one rank does anew, alone, the others would wait for for ever."""
    trainer = trainer_for(roberta_model, tmp_path, SplitLengths(8), use_cpu=True)
    monkeypatch.setattr("modeling.training.trainer.shards_weights", lambda _: True)

    def encode_batch(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(roberta_model, "encode_batch", encode_batch)
    with pytest.raises(ValueError, match=r"--token_budget.*--per_device_eval_batch_size"):
        trainer.evaluate()
    with pytest.raises(ValueError, match=r"--live_chunks.*--per_device_train_batch_size"):
        trainer.train()
