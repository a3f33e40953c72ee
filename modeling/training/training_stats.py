"""Training statistics between two evaluations, collected without synchronizing with the device."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

# Sum of the steps' losses, steps, skipped steps, documents, chunks, seconds of training, and seconds waiting for data.
STAT_KEYS = ("loss", "steps", "skipped", "documents", "chunks", "seconds", "data_seconds")


class TrainingStats(TrainerCallback, ExportableState):
    """This process's counts since the last synchronization, and `totals` over all processes, saved with checkpoints.

    Counts are Python floats, as not every device supports float64; documents are counted on the labels' device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.totals = dict.fromkeys(STAT_KEYS, 0.0)
        self._counts: dict[str, Any] = dict.fromkeys(STAT_KEYS, 0.0)
        self._before_step: dict[str, Any] = {}  # counts before the current step; empty between steps
        self._clock: float | None = None
        self._losses: list[float] = []  # of the steps completed in this training
        self._num_logged = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._losses, self._num_logged = [], 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"totals": dict(self.totals)}}

    def begin_step(self) -> None:
        """Start an optimizer step, and the clock with the first one."""
        self._before_step = dict(self._counts)
        self._clock = time.perf_counter() if self._clock is None else self._clock

    def add_batches(self, batches: list[dict[str, Any]], data_seconds: float) -> None:
        """Count the step's micro-batches and the seconds spent waiting for them."""
        self._counts["data_seconds"] += data_seconds / self.accelerator.num_processes
        self._counts["steps"] += 1 / self.accelerator.num_processes
        for batch in batches:
            is_real_B = (batch["labels"] != -100).reshape(len(batch["labels"]), -1).any(dim=1)
            self._counts["documents"] = self._counts["documents"] + is_real_B.sum()
            self._counts["chunks"] += len(batch["input_ids"] if "input_ids" in batch else batch["chunk_vectors"])

    def complete_step(self, loss: float) -> None:
        """End the current step and add its loss, over all processes."""
        self._counts["loss"] += loss / self.accelerator.num_processes
        self._losses.append(loss)
        self._before_step = {}

    def mean_loss(self) -> float | None:
        """Mean loss of the steps completed in this training; None without any."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def mean_new_loss(self) -> float | None:
        """Mean loss of the steps completed since the last call; None without any."""
        losses, self._num_logged = self._losses[self._num_logged :], len(self._losses)
        return sum(losses) / len(losses) if losses else None

    def discard_step(self, is_skipped: bool = False) -> None:
        """Undo the counts of the current step, if any, except its seconds."""
        for name in ("steps", "documents", "chunks") if self._before_step else ():
            self._counts[name] = self._before_step[name]
        self._before_step = {}
        self._counts["skipped"] += is_skipped / self.accelerator.num_processes

    def synchronize(self) -> dict[str, float]:
        """Stop the clock and add the counts of all processes to `totals`. Every process must call it."""
        now = time.perf_counter()
        self._counts["seconds"] += (now - self._clock if self._clock else 0.0) / self.accelerator.num_processes
        self._clock = None
        counts = [float(self._counts[name]) for name in STAT_KEYS]
        if self.accelerator.num_processes > 1:
            local = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
            counts = self.accelerator.reduce(local).tolist()
        for name, value in zip(STAT_KEYS, counts, strict=True):
            self.totals[name] += value
            self._counts[name] = 0.0
        return self.totals

    def reset_totals(self) -> None:
        self.totals = dict.fromkeys(STAT_KEYS, 0.0)

    def speed(self) -> dict[str, float]:
        """Documents and chunks per second over all processes, extrapolated from this one since the last sync."""
        seconds = max(time.perf_counter() - self._clock, 1e-9) if self._clock else 1e-9
        processes = self.accelerator.num_processes
        return {
            f"{name}_per_second": float(self._counts[name]) * processes / seconds if self._clock else 0.0
            for name in ("documents", "chunks")
        }
