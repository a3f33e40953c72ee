"""Several processes agree: on stopping, on failing, on who writes; and one that dies ends the others."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from modeling.training.checkpointing import find_checkpoint
from tests.conftest import train, training_command
from tests.processes import ROOT, start, start_ranks, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


PIPES = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ENDLESS = {"num_train_epochs": 500, "early_stopping_patience": 0, "save_total_limit": 2}


class Ranks:
    """Two processes of train_hf.py, started without a launcher, so that each one's own exit status can be seen."""

    def __init__(self, data, encoder, output_dir, **arguments):
        command = training_command(data, encoder, output_dir, **arguments)
        self.processes = start_ranks([command] * 2, **PIPES)

    def wait(self, timeout: float = 180) -> tuple[list[int], list[str]]:
        said = [process.communicate(timeout=timeout)[0] for process in self.processes]
        return [process.returncode for process in self.processes], said


def test_ranks_agree_on_early_stopping_and_only_the_first_writes(prepared_folder, roberta_folder, tmp_path):
    rule = {"early_stopping_patience": 1, "early_stopping_min_delta": 1, "num_train_epochs": 9}
    ranks = Ranks(prepared_folder, roberta_folder, tmp_path / "run", **rule)
    statuses, said = ranks.wait()
    assert statuses == [0, 0], said
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]
    assert history["stopped_early"]
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("epoch 2.00: evaluation") == 1
    assert len(list((tmp_path / "run" / "runs").iterdir())) == 1
    for name in ("rng_state_0.pth", "rng_state_1.pth"):
        assert len(list((tmp_path / "run").glob(f"checkpoint-*/{name}"))) == 2


def test_non_finite_loss_ends_all_ranks_with_the_same_status(prepared_folder, roberta_folder, tmp_path):
    broken = {"learning_rate": "1e30", "warmup_steps": 0, "max_grad_norm": 0, "num_train_epochs": 9}
    broken |= {"gradient_accumulation_steps": 1}
    statuses, said = Ranks(prepared_folder, roberta_folder, tmp_path / "run", **broken).wait()
    assert statuses == [1, 1], said
    assert re.search(r"\b3\b.*\bsteps?\b", said[0])
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.parametrize("which", [0, 1])
def test_signal_to_one_rank_stops_all_after_the_same_step(which, prepared_folder, roberta_folder, tmp_path):
    ranks = Ranks(prepared_folder, roberta_folder, tmp_path / "run", **ENDLESS)
    wait_for(tmp_path / "run", "checkpoint-*")
    ranks.processes[which].send_signal(signal.SIGINT)
    statuses, said = ranks.wait()
    assert statuses == [130, 130], said
    step = find_checkpoint(str(tmp_path / "run"), "auto").rpartition("checkpoint-")[2]
    assert re.search(rf"step {step}\b.*--resume_from_checkpoint auto", said[0])


# train_hf.py, and the names of the threads that are there when Python ends.
LISTING_THREADS = """
import atexit, glob, runpy
atexit.register(lambda: print("left:", *(open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm"))))
runpy.run_path("train_hf.py", run_name="__main__")
"""


def test_no_thread_of_the_process_group_is_left_when_python_ends(prepared_folder, roberta_folder, tmp_path):
    _, _, *given = training_command(prepared_folder, roberta_folder, tmp_path / "run", num_train_epochs=1)
    ranks = start_ranks([[sys.executable, "-c", LISTING_THREADS, *given]] * 2, cold=True, **PIPES)
    for rank in ranks:
        said, _ = rank.communicate(timeout=180)
        assert rank.returncode == 0, said
        assert "left:" in said
        assert "gloo" not in said.rpartition("left:")[2]


@pytest.mark.parametrize("which", [0, 1])
def test_rank_that_dies_ends_the_other_with_a_message(which, prepared_folder, roberta_folder, tmp_path):
    ranks = Ranks(prepared_folder, roberta_folder, tmp_path / "run", **ENDLESS)
    wait_for(tmp_path / "run", "checkpoint-*")
    ranks.processes[which].kill()
    statuses, said = ranks.wait(timeout=60)
    assert statuses == ([-9, 1] if which == 0 else [1, -9]), said
    assert re.search(rf"(?i)(process|rank) {1 - which}\b", said[1 - which])
    assert "--resume_from_checkpoint auto" in said[1 - which]
    assert "Traceback" not in said[1 - which]
    assert find_checkpoint(str(tmp_path / "run"), "auto")


def test_accelerate_launch_names_the_rank_that_died(prepared_folder, roberta_folder, tmp_path):
    command = training_command(prepared_folder, roberta_folder, tmp_path / "run", **ENDLESS, use_cpu=True)
    config = "scripts/recipes/accelerate/ddp.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    process = start([sys.executable, *launch, *command[1:]], cold=True, **PIPES)
    wait_for(tmp_path / "run", "checkpoint-*")
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "train_hf.py"], capture_output=True, text=True, check=True
    ).stdout.split()
    ranks = {}
    for pid in children:
        with open(f"/proc/{pid}/environ", encoding="utf-8") as file:
            ranks[dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)["RANK"]] = int(pid)
    assert set(ranks) == {"0", "1"}
    os.kill(ranks["1"], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"(pid: {ranks['1']})" in said
    assert "rank      : 1" in said


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(first, then, prepared_folder, roberta_folder, tmp_path):
    """With the same effective batch, and without dropout: random numbers belong to a process."""
    exact = {"dropout": 0.0, "attention_dropout": 0.0, "max_grad_norm": 0, "num_train_epochs": 3}

    def run(output_dir, processes: int) -> None:
        batch = {"per_device_train_batch_size": 10 // processes, "gradient_accumulation_steps": 2}
        given = {**exact, **batch, "resume_from_checkpoint": "auto"}
        done = train(prepared_folder, roberta_folder, output_dir, processes=processes, **given)
        assert done.returncode == 0, done.stderr

    run(tmp_path / "whole", 1)
    run(tmp_path / "cut", first)
    for name in ("checkpoint-6", "checkpoint-9"):
        shutil.rmtree(tmp_path / "cut" / name)
    run(tmp_path / "cut", then)
    whole, cut = (load_file(tmp_path / name / "checkpoint-9" / "model.safetensors") for name in ("whole", "cut"))
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-5, rtol=0)
    histories = [json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("whole", "cut")]
    for ours, theirs in zip(*(history["epochs"] for history in histories), strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
