"""macOS and Windows, emulated: without what only Linux or Unix has. And file systems without locks or fsync of folders."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys

import psutil
import pytest
import torch

from data.prepared_dataset import load_prepared
from modeling.file_utils import write_text
from modeling.training.runtime import peak_memory
from scripts import prepare_dataset
from scripts.training.output_dir import lock_output_dir
from tests.conftest import TRAINING, options
from tests.processes import ROOT

# Run by Python when it starts, also in the spawned workers of a loader.
ELSEWHERE = """
import multiprocessing, os, signal, sys
import psutil  # whose Linux part needs the module resource
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them raises ImportError
for name in ("sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "killpg", "setsid", "getuid", "geteuid"):
    delattr(os, name)
os.process_cpu_count = os.cpu_count  # since Python 3.13; on Linux by sched_getaffinity
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "pthread_kill", "pthread_sigmask"):
    delattr(signal, name)
def symlink(*_, **__):
    raise OSError("A required privilege is not held by the client")
os.symlink = symlink
def like_windows(event, arguments):
    # Names have no colon; what is open or mapped is neither renamed nor removed, nor is a folder around it.
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(("/proc/", "/dev/", "/sys/")):
        if ":" in arguments[0] and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
            raise OSError(22, "Invalid argument", arguments[0])
    if event in ("os.rename", "os.remove", "os.rmdir"):
        paths = [os.path.abspath(path) for path in arguments[:2] if isinstance(path, (str, os.PathLike))]
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        with open("/proc/self/maps") as maps:
            opened += [line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")]
        for path in paths:
            if any(each == path or each.startswith(path + "/") for each in opened):
                raise PermissionError(13, "The process cannot access the file because it is being used", path)
sys.addaudithook(like_windows)
multiprocessing.set_start_method("spawn")
"""
HELP = """
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
    assert "--" in shown.getvalue(), (module, shown.getvalue())
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Runs Python as on a platform that lacks these."""
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "sitecustomize.py").write_text(ELSEWHERE)
    path = os.pathsep.join(map(str, (tmp_path / "platform", ROOT)))

    def run(*words, **arguments) -> subprocess.CompletedProcess:
        command = [sys.executable, *words, *options(**arguments)]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.slow
def test_every_command_shows_its_help_without_unix(elsewhere):
    commands = [f"scripts.{path.stem}" for path in sorted((ROOT / "scripts").glob("[a-z]*.py"))]
    assert "scripts.search" in commands
    elsewhere("-c", HELP, "train_hf", "scripts.benchmark", "scripts.benchmark.quality", *commands)


def test_emulated_windows_replaces_no_open_file(elsewhere, tmp_path):
    for word, action in (
        ("used", "os.replace(other, path)"),
        ("used", "os.remove(path)"),
        ("argument", "open(path + ':', 'w')"),
    ):
        code = (
            "import os, sys, pathlib; path, other = sys.argv[1:]; pathlib.Path(other).touch(); file = open(path, 'w')\n"
            f"try: {action}\nexcept OSError as error: assert '{word}' in str(error)\nelse: raise SystemExit(1)\n"
            "file.close(); os.replace(other, path)"
        )
        elsewhere("-c", code, str(tmp_path / "path"), str(tmp_path / "other"))


@pytest.mark.slow
def test_preparing_training_and_predicting_without_unix(elsewhere, csv_file, roberta_folder, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    elsewhere("-m", "scripts.prepare_dataset", source=csv_file, tokenizer=roberta_folder, output_dir=data)
    paths = {"encoder": roberta_folder, "dataset_dir": data, "output_dir": run}
    elsewhere("train_hf.py", **{**TRAINING, "num_train_epochs": 1, "dataloader_num_workers": 1, **paths})
    epochs = json.loads((run / "training_history.json").read_text())["epochs"]
    assert epochs[0]["peak_memory_gib"] > 0
    predicted = elsewhere("-m", "scripts.predict", model=run, source=csv_file).stdout
    assert all(json.loads(line)["label"] for line in predicted.splitlines())
    elsewhere(
        "-m", "scripts.prepare_dataset", "--overwrite", source=csv_file, tokenizer=roberta_folder, output_dir=data
    )
    more = {**TRAINING, "num_train_epochs": 2, "resume_from_checkpoint": "auto", "save_total_limit": 1, **paths}
    elsewhere("train_hf.py", **more)
    elsewhere("-m", "scripts.evaluate_and_explain", model=run, dataset_dir=data, output_dir=tmp_path / "report")


def test_peak_memory_on_windows_is_that_of_the_process(monkeypatch):
    class Process:
        def memory_info(self):
            return type("Memory", (), {"peak_wset": 3 * 2**30})

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", Process)
    assert peak_memory(torch.device("cpu")) == {"peak_memory_gib": 3.0}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_output_dir_without_locks_is_used_with_a_warning(number, tmp_path, monkeypatch, caplog):
    def no_locks(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for _ in range(2):
        with lock_output_dir(tmp_path / "run"):
            (tmp_path / "run" / "model").touch()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert str(tmp_path / "run") in caplog.text
    assert os.strerror(number) in caplog.text


@pytest.fixture
def no_sync_of_folders(monkeypatch, request):
    real = os.fsync
    refused = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(request.param, os.strerror(request.param))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return refused


@pytest.mark.parametrize("no_sync_of_folders", [errno.EINVAL, errno.ENOTSUP], indirect=True)
def test_data_and_files_are_written_where_folders_cannot_be_synced(
    no_sync_of_folders, csv_file, roberta_folder, tmp_path, call_command
):
    write_text(tmp_path / "note", "text")
    assert (tmp_path / "note").read_text() == "text"
    assert len(no_sync_of_folders) == 1
    call_command(prepare_dataset.main, source=csv_file, tokenizer=roberta_folder, output_dir=tmp_path / "data")
    assert load_prepared(str(tmp_path / "data"))[0]["train"].num_rows
    assert len(no_sync_of_folders) > 2


@pytest.mark.parametrize("no_sync_of_folders", [errno.EIO], indirect=True)
def test_other_errors_of_syncing_are_raised(no_sync_of_folders, tmp_path):
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "note", "text")
