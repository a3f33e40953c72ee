"""What goes through between two evaluations, counted without waiting for the device."""

import time
from typing import Any

import torch
from accelerate import Accelerator

# Summed loss of the steps, steps, skipped steps, documents, chunks, and seconds: of training in all, and waiting for
# data.
STAT_KEYS = ("loss", "steps", "skipped", "documents", "chunks", "seconds", "data_seconds")


class TrainingStats:
    """Counts of this process since they were last added up, and `totals` of all processes.

    They are Python's numbers, since not every device has float64; documents are counted where their labels are.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.totals = dict.fromkeys(STAT_KEYS, 0.0)
        self._counts: dict[str, Any] = dict.fromkeys(STAT_KEYS, 0.0)
        self._before_step = self._counts
        self._clock: float | None = None

    def begin_step(self) -> None:
        """An optimizer step begins, and with the first one the clock."""
        self._before_step = dict(self._counts)
        self._clock = time.perf_counter() if self._clock is None else self._clock

    def add_batches(self, batches: list[dict[str, Any]], data_seconds: float) -> None:
        """The step's micro-batches have come, after so many seconds."""
        self._counts["data_seconds"] += data_seconds / self.accelerator.num_processes
        self._counts["steps"] += 1 / self.accelerator.num_processes
        for batch in batches:
            self._counts["documents"] = self._counts["documents"] + (batch["labels"] != -100).sum()
            self._counts["chunks"] += len(batch["input_ids"] if "input_ids" in batch else batch["chunk_vectors"])

    def add_loss(self, loss: float) -> None:
        """The loss of a step that is taken, of all processes."""
        self._counts["loss"] += loss / self.accelerator.num_processes

    def discard_step(self, is_skipped: bool = False) -> None:
        """As if nothing of the present step had gone through; the seconds were spent all the same."""
        for name in ("steps", "documents", "chunks"):
            self._counts[name] = self._before_step[name]
        self._counts["skipped"] += is_skipped / self.accelerator.num_processes

    def synchronize(self) -> dict[str, float]:
        """Stop the clock and add the counts of all processes to `totals`. Every process must call it."""
        now = time.perf_counter()
        self._counts["seconds"] += (now - self._clock if self._clock else 0.0) / self.accelerator.num_processes
        self._clock = None
        counts = [float(self._counts[name]) for name in STAT_KEYS]
        if self.accelerator.num_processes > 1:
            of_all = torch.tensor(counts, dtype=torch.float64, device=self.accelerator.device)
            counts = self.accelerator.reduce(of_all).tolist()
        for name, value in zip(STAT_KEYS, counts, strict=True):
            self.totals[name] += value
            self._counts[name] = 0.0
        return self.totals

    def reset_totals(self) -> None:
        self.totals = dict.fromkeys(STAT_KEYS, 0.0)

    def speed(self) -> dict[str, float]:
        """Documents and chunks a second on this process since its counts were last added up, times the processes."""
        seconds = max(time.perf_counter() - self._clock, 1e-9) if self._clock else 1e-9
        processes = self.accelerator.num_processes
        return {
            f"{name}_per_second": float(self._counts[name]) * processes / seconds if self._clock else 0.0
            for name in ("documents", "chunks")
        }
