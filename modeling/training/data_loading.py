"""Data loaders whose workers survive a signal and which leave the global random state alone."""

import signal
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments


def ignore_signals(worker: int) -> None:
    """`worker_init_fn` that ignores SIGTERM and SIGINT: a signal to the process group must not kill the workers while the
    run is saving."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def data_loader(
    documents: Dataset, batch_size: int, collate_fn: Callable[..., Any], args: TrainingArguments, **options: Any
) -> DataLoader:
    """A loader with the options `--dataloader_*`, all of which `DataLoader` knows by the same names.

    It has a generator of its own, so that starting it (also for an evaluation) draws nothing from the global one: random
    states before and after an evaluation are the same. Its workers end with each pass: those that outlive it, and ignore
    signals, would keep the process from ending.

    Args:
        options: override those of `args`.
    """
    prefix = "dataloader_"
    given = {
        name.removeprefix(prefix): getattr(args, name)
        for name in (field.name for field in fields(args))
        if name.startswith(prefix)
    }
    given |= {"persistent_workers": False} | options
    if not given["num_workers"]:
        given |= {"prefetch_factor": None, "multiprocessing_context": None}
    generator = torch.Generator().manual_seed(args.seed)
    return DataLoader(
        documents,
        batch_size,
        collate_fn=collate_fn,
        generator=generator,
        worker_init_fn=ignore_signals,
        **given,
    )
