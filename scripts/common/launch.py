"""Start the project's own commands, each in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from scripts.common.cli import interruption


def launch_training(recipe: str, *extra: str, **options: object) -> None:
    """Run train_hf.py with a recipe and options, on one GPU where there are several. Raises ValueError where it fails."""
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}
    _run("Training", ["train_hf.py", "--config", recipe, *_to_argv(options), *extra], env=environment)


def launch_evaluation(**options: object) -> None:
    """Run `scripts.evaluate_and_explain` with options. Raises ValueError where it fails."""
    _run("The evaluation", ["-m", "scripts.evaluate_and_explain", *_to_argv(options)])


def run_to_end(command: Sequence[str], **options: Any) -> int:
    """Run a command, pass SIGINT and SIGTERM on to it, and wait for its end. Returns its exit status."""
    # In a session of its own: a Ctrl-C reaches it once, from here.
    process = subprocess.Popen(command, start_new_session=True, **options)
    received: BaseException | None = None
    while True:
        try:
            status = process.wait()
            break
        except BaseException as error:
            received = error
            if os.name == "nt" and interruption(error) == signal.SIGINT:
                continue  # Windows sends Ctrl-C to every process of a console, and cannot send it to one
            process.send_signal(interruption(error) or signal.SIGTERM)
    if received is not None:
        raise received
    return status


def _to_argv(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _run(name: str, command: Sequence[str], **options: Any) -> None:
    if status := run_to_end([sys.executable, *command], **options):
        raise ValueError(f"{name} ended with exit status {status}; see its message above.")
