"""A full disk, a folder that cannot be written to, two runs in one folder: a clear error, and nothing is lost."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.tensorboard import SummaryWriter

from modeling.file_utils import disk_error, is_disk_full
from modeling.training.checkpointing import checkpoint_problem, list_checkpoints
from scripts.common.cli import run_main
from tests.conftest import ROOT, TRAINING, options, run_command, train

pytestmark = pytest.mark.slow

DISK_IS_FULL = re.compile(r"(?i)disk is full|disk full|no space left")

EACH_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_total_limit": 99,
    "early_stopping_patience": 0,
}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB, and a way to mount it anew."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode

    if mount("size=2m") != 0:
        pytest.skip("this machine does not permit mounting a tmpfs")
    yield disk, mount
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_said_and_the_checkpoints_before_are_gone_on_from(small_disk, prepared_folder, roberta_folder):
    disk, mount = small_disk
    run = disk / "run"
    done = train(prepared_folder, roberta_folder, run, num_train_epochs=9, **EACH_STEP)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert DISK_IS_FULL.search(done.stderr), done.stderr
    whole = list_checkpoints(str(run))
    assert whole
    assert [checkpoint_problem(folder) for folder in whole] == [None] * len(whole)
    assert mount("remount,size=200m") == 0
    done = train(prepared_folder, roberta_folder, run, num_train_epochs=9, resume_from_checkpoint="auto", **EACH_STEP)
    assert done.returncode == 0, done.stderr
    assert str(whole[0]) in done.stderr  # resumed from it
    epochs = json.loads((run / "training_history.json").read_text())["epochs"]
    assert [epoch["step"] for epoch in epochs] == list(range(1, 28))


WRITERS = {
    "tokenizers": lambda path: Tokenizer(WordLevel({str(word): word for word in range(200_000)}, "0")).save(str(path)),
    "safetensors": lambda path: save_file({"weights": torch.ones(2**20)}, path),
    "torch": lambda path: torch.save({"weights": torch.ones(2**20)}, path),
    "tensorboard": lambda path: write_events(path),
    "python": lambda path: path.write_bytes(bytes(2**22)),
}


def write_events(folder: Path) -> None:
    with SummaryWriter(str(folder)) as board:
        for step in range(30):
            board.add_text("long", "x" * 2**17, step)


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_said_whichever_library_meets_it(library, small_disk, capfd, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_main(lambda: WRITERS[library](small_disk[0] / "file")) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capfd.readouterr().err + caplog.text
    assert "Traceback" not in said
    assert DISK_IS_FULL.search(said)


@pytest.fixture
def run_in_a_thread(monkeypatch):
    """Under `run_main`, in a thread of its own."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    before = signal.getsignal(signal.SIGTERM)

    def run(function) -> None:
        def main() -> None:
            thread = threading.Thread(target=function)
            thread.start()
            thread.join()

        assert run_main(main) == 0

    yield run
    signal.signal(signal.SIGTERM, before)


def test_what_another_thread_meets_is_never_silent(run_in_a_thread, capfd):
    run_in_a_thread(lambda: Path("/proc/none").write_text(""))
    assert "FileNotFoundError" in capfd.readouterr().err


def test_only_a_full_disk_is_called_full(tmp_path):
    (tmp_path / "closed").mkdir()
    with pytest.raises(RuntimeError) as met:
        torch.save({"weights": torch.ones(4)}, tmp_path / "closed")  # a folder
    assert not is_disk_full(met.value)
    assert disk_error(met.value).errno == errno.EISDIR
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise AssertionError("Should not reach.") from error
    except AssertionError as error:
        assert is_disk_full(error)


def test_a_data_set_that_does_not_fit_leaves_nothing_and_is_said(small_disk, csv_file, roberta_folder):
    disk, _ = small_disk
    (disk / "ballast").write_bytes(bytes(int(1.95 * 2**20)))
    done = run_command("scripts.prepare_dataset", source=csv_file, tokenizer=roberta_folder, output_dir=disk / "data")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert DISK_IS_FULL.search(done.stderr), done.stderr
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_a_folder_that_cannot_be_written_to_is_said_before_training(small_disk, prepared_folder, roberta_folder):
    disk, mount = small_disk
    (disk / "run").mkdir()
    assert mount("remount,ro") == 0
    for folder in ("run", "new"):
        done = train(prepared_folder, roberta_folder, disk / folder)
        assert done.returncode == 1
        assert "Read-only file system" in done.stderr
        assert str(disk / folder) in done.stderr
        assert "Traceback" not in done.stderr


def test_permission_that_is_lost_in_mid_run_is_said_and_given_back_it_goes_on(
    prepared_folder, roberta_folder, tmp_path
):
    # Root may write anywhere, unless that right is taken from it.
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if subprocess.run([*bound, "touch", closed / "file"], capture_output=True, check=False).returncode == 0:
        pytest.skip("this machine does not let root lose the right to write")
    run = tmp_path / "run"
    given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": run, **TRAINING, **EACH_STEP}
    command = [*bound, sys.executable, "train_hf.py", *options(**{**given, "num_train_epochs": 500})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        wait_for(run, "checkpoint-*")
        run.chmod(0o500)
        try:
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
            run.chmod(0o700)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "Permission denied" in said, said
    whole = list_checkpoints(str(run))
    assert [checkpoint_problem(folder) for folder in whole] == [None] * len(whole)
    step = int(whole[0].name.split("-")[1])
    done = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto", max_steps=step + 2, **EACH_STEP)
    assert done.returncode == 0, done.stderr
    assert str(whole[0]) in done.stderr  # resumed from it


def test_two_runs_in_one_folder_and_a_lock_that_a_kill_does_not_leave_behind(prepared_folder, roberta_folder, tmp_path):
    run = tmp_path / "run"
    given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": run, **TRAINING}
    given |= {"num_train_epochs": 500, "early_stopping_patience": 0, "dataloader_num_workers": 2, "save_total_limit": 2}
    first = subprocess.Popen(
        [sys.executable, "train_hf.py", *options(**given)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(run, "checkpoint-*")
    log = (run / "training.log").read_text()
    second = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto")
    assert second.returncode == 1
    assert str(run) in second.stderr
    assert re.search(rf"\b{first.pid}\b", second.stderr)
    assert log in (run / "training.log").read_text()
    assert str(first.pid + 1) not in (run / ".lock").read_text()
    first.kill()
    first.wait()
    step = int(list_checkpoints(str(run))[0].name.split("-")[1])
    third = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto", max_steps=step + 1)
    assert third.returncode == 0, third.stderr


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_auto_never_deletes_a_model_that_has_no_checkpoint_to_go_on_from(prepared_folder, roberta_folder, tmp_path):
    run = tmp_path / "run"
    assert train(prepared_folder, roberta_folder, run, num_train_epochs=1).returncode == 0
    [checkpoint] = list_checkpoints(str(run))
    (checkpoint / "trainer_state.json").write_text("{}")  # altered
    for _ in range(2):
        done = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto")
        assert done.returncode == 1
        assert str(run) in done.stderr
        assert "--overwrite_output_dir" in done.stderr
        assert "Traceback" not in done.stderr
        assert (run / "model.safetensors").is_file()
        if checkpoint.exists():  # and then without it
            checkpoint.rename(tmp_path / "elsewhere")


def test_what_a_killed_run_was_replacing_gets_its_name_back(prepared_folder, roberta_folder, tmp_path):
    run = tmp_path / "run"
    assert train(prepared_folder, roberta_folder, run, num_train_epochs=1).returncode == 0
    [checkpoint] = list_checkpoints(str(run))
    (run / ".saving").mkdir(exist_ok=True)
    checkpoint.rename(run / ".saving" / f"{checkpoint.name}-before")
    done = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto", num_train_epochs=1)
    assert done.returncode == 0, done.stderr
    assert str(checkpoint) in done.stderr  # resumed from it


def test_a_signal_to_the_whole_group_does_not_take_the_loaders_workers(prepared_folder, roberta_folder, tmp_path):
    given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": tmp_path / "run", **TRAINING}
    given |= {"num_train_epochs": 500, "early_stopping_patience": 0, "dataloader_num_workers": 2, "save_total_limit": 2}
    process = subprocess.Popen(
        [sys.executable, "train_hf.py", *options(**given)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    wait_for(tmp_path / "run", "checkpoint-*")
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    [newest, *_] = list_checkpoints(str(tmp_path / "run"))
    assert re.search(rf"step {newest.name.removeprefix('checkpoint-')}\b", said)
