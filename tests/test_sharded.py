"""Weights sharded over processes (FSDP2), and the accelerate configs of scripts/recipes/accelerate."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from modeling.checkpoints import checkpoints_of, what_is_wrong
from tests.conftest import ROOT, TRAINING, options, train

CONFIGS = sorted((ROOT / "scripts/recipes/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_accelerate_config_is_one(path):
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert config.num_processes == 2
    assert config.mixed_precision == "no"  # train_hf.py chooses it for the device
    head = path.read_text(encoding="utf-8").partition("compute_environment")[0]
    assert "un by us" in head or "un here" in head, "it must say whether it was run"
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"] in head + "MULTI_GPU FSDP DEEPSPEED"


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_training_ends_as_one_process_does_and_exports_a_plain_file(prepared_folder, roberta_folder, tmp_path):
    exact = {"dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 2, "gradient_accumulation_steps": 2}

    def sharded(output_dir, **more) -> None:
        given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": output_dir, **TRAINING}
        given |= {**exact, "per_device_train_batch_size": 5, "use_cpu": True, **more}
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "scripts/recipes/accelerate/fsdp.yaml",
             "--main_process_port", "0", "tests/sharded_on_cpu.py", *options(**given)],
            cwd=ROOT, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    sharded(tmp_path / "sharded")
    one = train(prepared_folder, roberta_folder, tmp_path / "one", per_device_train_batch_size=10, **exact)
    assert one.returncode == 0, one.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "sharded"))
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "sharded", trust_remote_code=True)

    last, _ = checkpoints_of(str(tmp_path / "sharded"))
    assert what_is_wrong(last) is None
    assert {"optimizer.bin", "pytorch_model_fsdp.bin"} <= {path.name for path in last.iterdir()}  # it was sharded
    assert not list(tmp_path.glob("sharded/**/_fsdp*.py"))  # the code that travels is this project's
    expected = load_file(last / "model.safetensors")
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    last.rmdir()
    sharded(tmp_path / "sharded", resume_from_checkpoint="auto")
    found = load_file(last / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
