"""Runs checks, each in a process of its own with a time limit, and keeps what they measured up to then.

A fork server imports the libraries once, before CUDA is used; a check is a fork of it, and initializes CUDA itself.
Nothing heavy is imported here, so that the fork server's imports and the command's own go side by side.
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
    "train_hf",
    "scripts.predict",
    "scripts.evaluate_and_explain",
    "scripts.prepare_dataset",
]
ENOUGH_TO_BEGIN = 5.0  # seconds


@dataclass(frozen=True)
class Check:
    """A check: its name, `module:function` (a module of this package, or a full name), and its limit in seconds."""

    name: str
    target: str
    seconds: float

    def function(self) -> Callable[["Settings", "Report"], None]:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module if "." in module else f"scripts.benchmark.{module}"), name)


@dataclass(frozen=True)
class Settings:
    """What a check is told.

    Attributes:
        device: "cuda", or "cpu" to test the checks.
        tiny: tiny models and few steps.
        output_dir: where logs go; a check's other files go into a temporary folder.
        encoder: folder of a real encoder with its tokenizer, or None.
        start: how processes are started, "forkserver", or "spawn" where importing alone has initialized CUDA.
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
    """What a check has to say; each figure is sent at once, so that a check that is killed loses none."""

    def __init__(self, send: Callable[[tuple[str, str, Any]], None]):
        self._send = send

    def figure(self, name: str, value: Any) -> None:
        """A number, a text, a bool or a short list. `row: column` makes a table."""
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        print(f"{name} = {value}", flush=True)
        self._send(("figure", name, value))

    def measure(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A part of a check: what `function` returns becomes figures (a dict: `name: key` each). An error is kept and
        does not end the check, for which the result is then None; what the part had on the device is freed."""
        started = time.monotonic()
        result = None
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            traceback.print_exc()
            self._send(("failed", name, in_words(error)))
            traceback.clear_frames(error.__traceback__)
        free_memory()
        print(f"({name}: {time.monotonic() - started:.1f} s)", flush=True)
        if isinstance(result, dict):
            for key, value in result.items():
                self.figure(f"{name}: {key}", value)
        elif result is not None:
            self.figure(name, result)
        return result


def in_words(error: BaseException) -> str:
    """An error as a paragraph, without this machine's folders."""
    text = " ".join(str(error).split())
    for folder in (os.getcwd(), sys.prefix):
        text = text.replace(f"{folder}/", "")
    return f"{type(error).__name__}: {text[:600]}"


def free_memory() -> None:
    """Gives back what no tensor holds any more, so that the next measurement begins as this one did."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # after a CUDA error nothing works, and the next part will say so
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class Runner:
    """Runs checks one after the other within so many seconds in all, from now on; `after_each` is called when a check's
    line is written."""

    def __init__(self, settings: Settings, seconds: float, after_each: Callable[[], Any] = lambda: None):
        self.settings, self.after_each = settings, after_each
        self.deadline = time.monotonic() + seconds
        self.path = settings.output_dir / "checks.jsonl"
        self.path.unlink(missing_ok=True)
        # Asking whether there is a GPU must not initialize CUDA: a fork of a process that has cannot use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if settings.is_cuda:
            os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # WeightedTrainer drives one
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        from multiprocessing.forkserver import ensure_running

        ensure_running()

    def run(self, checks: Sequence[Check]) -> None:
        """A line of checks.jsonl for each, as it ends; those whose turn does not come are `not run`.

        Where importing the libraries has initialized CUDA, a fork cannot use it: then checks are started afresh."""
        left = list(checks)
        try:
            self._wait_for_imports()
            while left and self.deadline - time.monotonic() >= ENOUGH_TO_BEGIN:
                check = left.pop(0)
                print(f"{check.name} …", flush=True)
                if self._run_one(check).get("bad_fork"):
                    self.settings = replace(self.settings, start="spawn")
                    self._run_one(check)
        finally:
            for check in left:
                self._write({"check": check.name, "ok": False, "seconds": 0, "figures": {}, "error": "not run"})

    def _wait_for_imports(self) -> None:
        """On a machine that has just started they take long, and are no part of the first check. Where the fork server
        does not survive them, every check imports for itself."""
        started = time.monotonic()
        process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
        try:
            process.start()
            process.join(max(self.deadline - started, 0))
            works = process.exitcode == 0
        except (OSError, EOFError):
            works = False
        if not works:
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
        given = (check, self.settings, sender, scratch)
        process = context.Process(target=run_in_child, args=given)  # type: ignore[attr-defined]
        try:
            process.start()
            sender.close()
            while not {"end", "error", "bad_fork"} & line.keys():
                message = _receive(receiver, process, started + limit - time.monotonic())
                if message is None:
                    message = "error", "", f"stopped after {limit:.0f} s, its limit"
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
    """The next message of a check; None when its time is up."""
    ready = wait([receiver, process.sentinel], timeout=max(seconds, 0))
    if not ready:
        return None
    with suppress(EOFError, OSError):
        if receiver in ready or receiver.poll():
            return receiver.recv()
    process.join(5)
    return "error", "", f"the process ended with exit status {process.exitcode} before the check did"


def kill_with_children(process: Any) -> None:
    """End a check with everything that it started."""
    if process.pid is None:
        return
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session; only those that began one of their own are left
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.kill()
    process.join(10)


def run_in_child(check: Check, settings: Settings, sender: Connection, scratch: str) -> None:
    """A check's process: a session of its own, its output in DIR/NAME.log, its files in a folder that goes with it."""
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
        sender.send(("error", "", in_words(error)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sender.send(("end", "", None))


def in_fresh_process(settings: Settings, function: Callable[..., Any], *args: Any, **environment: str) -> Any:
    """What `function(*args)` returns in a process of its own, in which CUDA is not initialized yet, with these
    environment variables. This process must not have used CUDA either."""
    return finish(begin(settings, function, *args, **environment))


def begin(settings: Settings, function: Callable[..., Any], *args: Any, **environment: str) -> tuple[Any, Connection]:
    """As `in_fresh_process`, without waiting: give what this returns to `finish`."""
    context = multiprocessing.get_context("fork" if settings.start == "forkserver" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sender, function, args, environment))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    return process, receiver


def finish(begun: tuple[Any, Connection], seconds: float = 40.0) -> Any:
    """The result of what `begin` began, for which it has so many seconds from now on.

    Raises:
        RuntimeError: it failed; the message says how.
    """
    process, receiver = begun
    error, result = f"no result after {seconds:.0f} s", None
    if receiver.poll(seconds):
        try:
            error, result = receiver.recv()
        except EOFError:
            process.join(5)
            error = f"the process ended with exit status {process.exitcode}"
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
        sender.send((in_words(error), None))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no interpreter shutdown: threads of gloo and nccl can hang there
