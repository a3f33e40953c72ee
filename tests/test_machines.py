"""Two machines: two network namespaces, made and removed here, with a link between them that is cut in mid-run."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from modeling.training.checkpointing import find_checkpoint
from tests.conftest import train, training_command
from tests.processes import ROOT, start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

CONFIG = "scripts/recipes/accelerate/two_machines.yaml"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two namespaces, 10.77.0.1 and 10.77.0.2, each with its end of the link `wire`."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2")
    names = [f"hr{os.getpid()}-{rank}" for rank in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not permit network namespaces: {error.stderr.strip()}")
    try:
        ip("link", "add", "wire", "netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start_on(machines, data, encoder, output_dir, **arguments) -> list[subprocess.Popen]:
    given = {"use_cpu": True, "ddp_timeout": 15, "dropout": 0.0, "attention_dropout": 0.0, "max_grad_norm": 0}
    given |= {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, **arguments}
    command = training_command(data, encoder, output_dir, **given)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "TP_SOCKET_IFNAME": "wire"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        start(
            [
                "ip",
                "netns",
                "exec",
                name,
                *launch,
                "--main_process_ip",
                "10.77.0.1",
                "--machine_rank",
                rank,
                *command[1:],
            ],
            cwd=ROOT,
            env=environment,
            **pipes,
        )
        for rank, name in enumerate(machines)
    ]


def test_link_that_is_cut_ends_both_machines_and_the_run_can_be_resumed(
    machines, prepared_folder, roberta_folder, tmp_path
):
    run = tmp_path / "run"
    sides = start_on(machines, prepared_folder, roberta_folder, run, num_train_epochs=400, early_stopping_patience=0)
    wait_for(run, "checkpoint-*")
    ip("-n", machines[1], "link", "set", "wire", "down")
    said = [side.communicate(timeout=90)[0] for side in sides]
    assert [side.returncode for side in sides] == [1, 1], said
    for rank, text in enumerate(said):
        assert re.search(rf"(?i)(process|rank) {rank}\b.*--resume_from_checkpoint auto", " ".join(text.split()))
    last = find_checkpoint(str(run), "auto")
    step = int(re.findall(r"checkpoint-(\d+)$", last)[0])

    ip("-n", machines[1], "link", "set", "wire", "up")
    more = {"max_steps": step + 3, "resume_from_checkpoint": "auto"}
    sides = start_on(machines, prepared_folder, roberta_folder, run, **more)
    said = [side.communicate(timeout=120)[0] for side in sides]
    assert [side.returncode for side in sides] == [0, 0], said
    assert last in said[0]  # resumed from it


def test_two_machines_compute_what_one_does(machines, prepared_folder, roberta_folder, tmp_path):
    sides = start_on(machines, prepared_folder, roberta_folder, tmp_path / "two")
    said = [side.communicate(timeout=120)[0] for side in sides]
    assert [side.returncode for side in sides] == [0, 0], said
    given = {"dropout": 0.0, "attention_dropout": 0.0, "max_grad_norm": 0, "per_device_train_batch_size": 20}
    one = train(prepared_folder, roberta_folder, tmp_path / "one", gradient_accumulation_steps=1, **given)
    assert one.returncode == 0, one.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=0)
