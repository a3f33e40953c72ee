"""Record of a run for its history, card and TensorBoard: arguments, code, libraries, data."""

import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch

from data.labels import MULTI, SINGLE, is_multi_label, label_array, label_counts, label_names
from modeling.training.training_args import HierarchicalTrainingArguments, arguments_record


def run_record(
    arguments: tuple[Any, ...],
    args: HierarchicalTrainingArguments,
    manifest: dict[str, Any],
    splits: datasets.DatasetDict,
    class_weights: torch.Tensor | None,
) -> dict[str, Any]:
    """All arguments, derived values and the environment."""
    labels = label_names(splits["train"])
    packages = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tensorboard")
    weights = [1.0] * len(labels) if class_weights is None else class_weights.tolist()
    counts = {
        split: dict(zip(labels, label_counts(label_array(part), len(labels)).tolist(), strict=True))
        for split, part in splits.items()
    }
    options = arguments_record(*arguments)
    return {
        **options,
        "run_name": Path(args.output_dir).name,
        "effective_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "num_processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "hardware": torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})",
        "precision": args.precision,
        "precision_reason": args.precision_reason,
        "labels": labels,
        "problem_type": MULTI if is_multi_label(splits["train"]) else SINGLE,
        "num_documents": {split: len(part) for split, part in splits.items()},
        "label_counts": counts,
        "class_weight_values": dict(zip(labels, weights, strict=True)),
        "data_fingerprint": manifest["data_fingerprint"],
        "data_sources": manifest["sources"],
        "encoder_is_on_hub": not Path(options["encoder"]).exists(),
        "git_commit": git_commit(),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_without_tokens(sys.argv),
    }


def command_without_tokens(argv: list[str]) -> str:
    """The command line, with the values of options such as --hub_token masked."""
    words, hides = [], False
    for word in argv:
        option, _, value = word.partition("=")
        is_token = option.startswith("--") and option.endswith("token")
        words.append("***" if hides else f"{option}=***" if is_token and value else word)
        hides = is_token and not value
    return " ".join(words)


def git_commit() -> str | None:
    """Git commit of the running code, with "+changes" if modified; None outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
