"""A full disk, a folder that cannot be written to, two runs in one folder: a clear error, and nothing is lost."""

import errno
import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
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
from tests.conftest import TRAINING, assert_refused, run_command, train, training_command
from tests.processes import ROOT, start, wait_for

pytestmark = pytest.mark.slow

DISK_IS_FULL = "(?i)disk is full|disk full|no space left"

EACH_STEP = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_total_limit": 99,
    "early_stopping_patience": 0,
}

ENDLESS = {"num_train_epochs": 500, "early_stopping_patience": 0, "dataloader_num_workers": 2, "save_total_limit": 2}


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


def test_full_disk_is_named_and_the_checkpoints_before_are_resumed_from(small_disk, prepared_folder, roberta_folder):
    disk, mount = small_disk
    run = disk / "run"
    assert_refused(train(prepared_folder, roberta_folder, run, num_train_epochs=9, **EACH_STEP), DISK_IS_FULL)
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
    "sqlite": lambda path: sqlite3.connect(path).execute(f"CREATE TABLE t AS SELECT zeroblob({2**22})"),
}


def write_events(folder: Path) -> None:
    with SummaryWriter(str(folder)) as board:
        for step in range(30):
            board.add_text("long", "x" * 2**17, step)


@pytest.mark.parametrize("library", WRITERS)
def test_full_disk_is_named_whichever_library_meets_it(library, small_disk, capfd, caplog, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run_main(lambda: WRITERS[library](small_disk[0] / "file")) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capfd.readouterr().err + caplog.text
    assert "Traceback" not in said
    assert re.search(DISK_IS_FULL, said)


@pytest.fixture
def hooks_restored(monkeypatch):
    """`run_main` sets a signal's handler and a hook for threads."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def run_in_a_thread(hooks_restored):
    """Under `run_main`, in a thread of its own."""

    def run(function) -> None:
        def main() -> None:
            thread = threading.Thread(target=function)
            thread.start()
            thread.join()

        assert run_main(main) == 0

    return run


def test_run_main_reports_the_signal_behind_an_error_in_cleaning_up(hooks_restored, capsys):
    def main() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise FileNotFoundError("a lock that is gone already")

    assert run_main(main) == 130
    assert "lock" not in capsys.readouterr().err


def test_run_main_shows_errors_of_other_threads(run_in_a_thread, capfd):
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


def test_prepare_on_a_full_disk_leaves_nothing(small_disk, csv_file, roberta_folder):
    disk, _ = small_disk
    (disk / "ballast").write_bytes(bytes(int(1.95 * 2**20)))
    done = run_command("scripts.prepare_dataset", source=csv_file, tokenizer=roberta_folder, output_dir=disk / "data")
    assert_refused(done, DISK_IS_FULL)
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_search_on_a_full_disk_resumes(small_disk, prepared_folder, roberta_folder, tmp_path):
    disk, _ = small_disk
    (tmp_path / "space.yaml").write_text("max_grad_norm: {low: 0.5, high: 2.0}")
    given = {
        **TRAINING,
        "freeze_encoder": True,
        "num_train_epochs": 1,
        "space": tmp_path / "space.yaml",
        "num_trials": 1,
    }
    given |= {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": disk / "search"}
    (disk / "ballast").write_bytes(bytes(2 * 2**20 - 60_000))  # less than the empty tables of a study need
    assert_refused(run_command("scripts.search", **given), DISK_IS_FULL, "study.db")
    (disk / "ballast").unlink()
    done = run_command("scripts.search", **given)
    assert done.returncode == 0, done.stderr


def test_read_only_output_dir_is_named_before_training(small_disk, prepared_folder, roberta_folder):
    disk, mount = small_disk
    (disk / "run").mkdir()
    assert mount("remount,ro") == 0
    for folder in ("run", "new"):
        done = train(prepared_folder, roberta_folder, disk / folder)
        assert_refused(done, "Read-only file system", str(disk / folder))


def test_run_that_loses_its_permission_to_write_can_be_resumed(prepared_folder, roberta_folder, tmp_path):
    # Root may write anywhere, unless that right is taken from it.
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if subprocess.run([*bound, "touch", closed / "file"], capture_output=True, check=False).returncode == 0:
        pytest.skip("this machine does not let root lose the right to write")
    run = tmp_path / "run"
    command = [
        *bound,
        *training_command(prepared_folder, roberta_folder, run, **{**EACH_STEP, "num_train_epochs": 500}),
    ]
    with start(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
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


def test_output_dir_is_locked_until_its_run_ends_or_is_killed(prepared_folder, roberta_folder, tmp_path):
    run = tmp_path / "run"
    command = training_command(prepared_folder, roberta_folder, run, **ENDLESS)
    first = start(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(run, "checkpoint-*")
    log = (run / "training.log").read_text()
    second = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto")
    assert_refused(second, str(run), rf"\b{first.pid}\b")
    assert log in (run / "training.log").read_text()
    assert str(first.pid + 1) not in (run / ".lock_owner").read_text()
    first.kill()
    first.wait()
    step = int(list_checkpoints(str(run))[0].name.split("-")[1])
    third = train(prepared_folder, roberta_folder, run, resume_from_checkpoint="auto", max_steps=step + 1)
    assert third.returncode == 0, third.stderr


def test_resume_auto_never_deletes_a_model_without_an_intact_checkpoint(
    run_copy, prepared_folder, roberta_folder, tmp_path
):
    checkpoints = list_checkpoints(str(run_copy))
    for checkpoint in checkpoints:
        (checkpoint / "trainer_state.json").write_text("{}")  # altered
    for _ in range(2):
        done = train(prepared_folder, roberta_folder, run_copy, resume_from_checkpoint="auto")
        assert_refused(done, str(run_copy), "--overwrite_output_dir")
        assert (run_copy / "model.safetensors").is_file()
        for checkpoint in checkpoints:  # and then without them
            if checkpoint.exists():
                checkpoint.rename(tmp_path / checkpoint.name)


def test_resume_gives_a_checkpoint_its_name_back_that_a_killed_run_was_replacing(
    run_copy, prepared_folder, roberta_folder
):
    newest, *_ = list_checkpoints(str(run_copy))
    (run_copy / ".saving").mkdir(exist_ok=True)
    newest.rename(run_copy / ".saving" / f"{newest.name}-before")
    done = train(prepared_folder, roberta_folder, run_copy, resume_from_checkpoint="auto", num_train_epochs=3)
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr  # resumed from it


def test_signal_to_the_process_group_does_not_take_the_loaders_workers(prepared_folder, roberta_folder, tmp_path):
    command = training_command(prepared_folder, roberta_folder, tmp_path / "run", **ENDLESS)
    process = start(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "run", "checkpoint-*", process)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "Traceback" not in said
    newest, *_ = list_checkpoints(str(tmp_path / "run"))
    assert re.search(rf"step {newest.name.removeprefix('checkpoint-')}\b", said)
