"""Runs checks in separate processes with time limits, and keeps the figures of checks that fail or time out.

A fork server imports the libraries once, without initializing CUDA; each check is a fork of it and initializes CUDA
itself. This module has no heavy imports, so that the fork server and the command import in parallel.
"""

import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

PRELOADED = [
    "scripts.benchmark.gpu_checks",
    "scripts.benchmark.gpu_checks_memory",
    "scripts.benchmark.gpu_checks_kernels",
    "scripts.benchmark.gpu_checks_runs",
    "scripts.training.setup",
    "scripts.training.run",
    "scripts.training.export",
    "scripts.common.prediction",
    "scripts.evaluation.evaluate",
    "data.preparation",
]
MIN_SECONDS = 5.0  # no check is started with less time left


@dataclass(frozen=True)
class Check:
    """A check: name, target `module:function` (module in this package or fully qualified), time limit in seconds."""

    name: str
    target: str
    seconds: float

    def function(self) -> Callable[["Settings", "Report"], None]:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module if "." in module else f"scripts.benchmark.{module}"), name)


@dataclass(frozen=True)
class Settings:
    """Settings of a check.

    Attributes:
        device: "cuda", or "cpu" to test the checks.
        tiny: use tiny models and few steps.
        output_dir: directory for logs; other files of a check are temporary.
        encoder: directory of a pretrained encoder with its tokenizer, or None.
        start: start method of processes, "forkserver", or "spawn" if importing the libraries initializes CUDA.
    """

    device: str
    tiny: bool
    output_dir: Path
    encoder: Path | None = None
    start: str = "forkserver"

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


class Report:
    """Collects the figures of a check. Each is sent immediately, so that none is lost when the check is killed."""

    def __init__(self, send: Callable[[tuple[str, str, Any]], None]):
        self._send = send

    def figure(self, name: str, value: Any) -> None:
        """Report a number, string, bool or short list. Names of the form `row: column` are rendered as a table."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        print(f"{name} = {value}", flush=True)
        self._send(("figure", name, value))

    def measure(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a part of a check and report its result, a dict as `name: key` figures. An error is reported and does not
        end the check; the result is None then. Device memory is freed afterwards."""
        started = time.monotonic()
        result = None
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            self._send(("failed", name, format_error(error)))
            traceback.clear_frames(error.__traceback__)
        free_memory()
        print(f"({name}: {time.monotonic() - started:.1f} s)", flush=True)
        if isinstance(result, dict):
            for key, value in result.items():
                self.figure(f"{name}: {key}", value)
        elif result is not None:
            self.figure(name, result)
        return result


def format_error(error: BaseException) -> str:
    """Type and message of an error on one line, without local paths."""
    text = " ".join(str(error).split())
    for folder in (os.getcwd(), sys.prefix):
        text = text.replace(f"{folder}/", "")
    return f"{type(error).__name__}: {text[:600]}"


def free_memory() -> None:
    """Free unused memory and reset peaks, so that every measurement starts from the same state."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error every call fails; the next part reports it
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Runner:
    """Runs checks one after another within `seconds` from now. Calls `after_each` after writing the line of a check."""

    def __init__(self, settings: Settings, seconds: float, after_each: Callable[[], Any] = lambda: None):
        self.settings, self.after_each = settings, after_each
        self.deadline = time.monotonic() + seconds
        self.path = settings.output_dir / "checks.jsonl"
        self.path.unlink(missing_ok=True)
        # torch.cuda.is_available() must not initialize CUDA: forks could not use it then.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if settings.is_cuda:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # WeightedTrainer uses one GPU per process
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        from multiprocessing.forkserver import ensure_running

        ensure_running()

    def run(self, checks: Sequence[Check]) -> None:
        """Write a line to checks.jsonl as each check ends; checks that do not start in time are `not run`.

        If importing the libraries initialized CUDA, forks cannot use it: switch to spawned processes.
        """
        remaining = list(checks)
        try:
            self._wait_for_imports()
            while remaining and self.deadline - time.monotonic() >= MIN_SECONDS:
                check = remaining.pop(0)
                print(f"{check.name} …", flush=True)
                if self._run_one(check).get("bad_fork"):
                    self.settings = replace(self.settings, start="spawn")
                    self._run_one(check)
        finally:
            for check in remaining:
                self._write({"check": check.name, "ok": False, "seconds": 0, "figures": {}, "error": "not run"})

    def _wait_for_imports(self) -> None:
        """Wait for the fork server's imports, which can be slow and must not count towards the first check. If the fork
        server dies, switch to spawned processes."""
        started = time.monotonic()
        process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        try:
            process.start()
            process.join(max(self.deadline - started, 0))
            succeeded = process.exitcode == 0
        except (OSError, EOFError):
            succeeded = False
        if not succeeded:
            self.settings = replace(self.settings, start="spawn")
        print(f"Imports: {time.monotonic() - started:.0f} s ({self.settings.start})", flush=True)

    def _write(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        failed = line.get("error") or "; ".join(line.get("failed", {}).values())
        self.after_each()
        print(f"  {'ok' if line['ok'] else failed} ({line['seconds']:.0f} s)", flush=True)

    def _run_one(self, check: Check) -> dict[str, Any]:
        started = time.monotonic()
        limit = min(check.seconds, self.deadline - started)
        line: dict[str, Any] = {"check": check.name, "ok": False, "seconds": 0.0, "figures": {}, "failed": {}}
        context = multiprocessing.get_context(self.settings.start)
        receiver, sender = context.Pipe(duplex=False)
        scratch = tempfile.mkdtemp()
        args = (check, self.settings, sender, scratch)
        process = context.Process(target=run_in_child, args=args)  # type: ignore[attr-defined]
        try:
            process.start()
            sender.close()
            while not {"end", "error", "bad_fork"} & line.keys():
                message = _receive(receiver, process, started + limit - time.monotonic())
                if message is None:
                    message = "error", "", f"stopped after {limit:.0f} s (time limit)"
                kind, name, value = message
                if kind in ("figure", "failed"):
                    line["figures" if kind == "figure" else "failed"][name] = value
                else:
                    line[kind] = value
        except BaseException:
            line["error"] = "interrupted"
            raise
        finally:
            kill_with_children(process)
            receiver.close()
            shutil.rmtree(scratch, ignore_errors=True)
            line.pop("end", None)
            line["seconds"] = round(time.monotonic() - started, 1)
            line["ok"] = "error" not in line and not line["failed"]
            if not line["failed"]:
                del line["failed"]
            if "bad_fork" not in line:
                self._write(line)
        return line


def _receive(receiver: Connection, process: Any, seconds: float) -> tuple[str, str, Any] | None:
    """The next message of a check, or None on timeout."""
    ready = wait([receiver, process.sentinel], timeout=max(seconds, 0))
    if not ready:
        return None
    with suppress(EOFError, OSError):
        if receiver in ready or receiver.poll():
            return receiver.recv()
    process.join(5)
    return "error", "", f"the process exited with status {process.exitcode} before the check finished"


def kill_with_children(process: Any) -> None:
    """Kill a check and all its child processes."""
    if process.pid is None:
        return
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session; children with sessions of their own are killed below
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.join(10)


def run_in_child(check: Check, settings: Settings, sender: Connection, scratch: str) -> None:
    """Entry point of a check's process: a new session, output to NAME.log, temporary files in `scratch`."""
    os.setsid()
    tempfile.tempdir = os.environ["TMPDIR"] = scratch
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(settings.output_dir / f"{check.name}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        function = check.function()
        if settings.is_cuda and settings.start == "forkserver" and sys.modules["torch"].cuda._is_in_bad_fork():
            sender.send(("bad_fork", "", True))
            return
        function(settings, Report(sender.send))
    except BaseException as error:
        traceback.print_exc()
        sender.send(("error", "", format_error(error)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sender.send(("end", "", None))


def in_fresh_process(settings: Settings, function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """Run `function(*args)` in a new process with additional environment variables and without CUDA initialized. The
    calling process must not have used CUDA either."""
    return finish(begin(settings, function, *args, **environment))


def begin(settings: Settings, function: Callable[..., Any], *args: Any, **environment: str) -> tuple[Any, Connection]:
    """As `in_fresh_process`, without waiting; pass the result to `finish`."""
    context = multiprocessing.get_context("fork" if settings.start == "forkserver" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args, environment))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    return process, receiver


def finish(begun: tuple[Any, Connection], seconds: float = 40.0) -> Any:
    """Wait up to `seconds` for the result of a process started by `begin`.

    Raises:
        RuntimeError: the function failed or timed out.
    """
    process, receiver = begun
    error, result = f"no result after {seconds:.0f} s", None
    if receiver.poll(seconds):
        try:
            error, result = receiver.recv()
        except EOFError:
            process.join(5)
            error = f"the process exited with status {process.exitcode}"
    kill_with_children(process)
    if error:
        raise RuntimeError(error)
    return result


def _call(sender: Connection, function: Callable[..., Any], args: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        sender.send((None, function(*args)))
    except BaseException as error:
        traceback.print_exc()
        sender.send((format_error(error), None))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skip interpreter shutdown, where gloo and nccl threads can hang
