"""Start the project's own commands, each in a process of its own."""

import subprocess
import sys
from collections.abc import Sequence


def launch_training(recipe: str, *extra: str, **options: object) -> None:
    """`accelerate launch train_hf.py` with a recipe and options. Raises ValueError where it fails."""
    command = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", "accelerate_config.yaml", "train_hf.py"]
    _run("Training", [*command, "--config", recipe, *_words(options), *extra])


def launch_evaluation(**options: object) -> None:
    """`scripts.evaluate_and_explain` with options. Raises ValueError where it fails."""
    _run("The evaluation", ["-m", "scripts.evaluate_and_explain", *_words(options)])


def _words(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def _run(what: str, command: Sequence[str]) -> None:
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        raise ValueError(f"{what} ended with exit status {status}; see its message above.")
