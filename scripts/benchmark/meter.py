"""Measure time and peak memory. Depends only on torch: the third-party environment uses it, too."""

import re
import time
from pathlib import Path

import torch


class Meter:
    """Measures time and peak memory above what is in use on creation, i.e. when the model is loaded.

    Peak memory is resident memory (Linux) or, on CUDA, allocated memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = 0.0
        self.started: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
        self.loaded = self._memory("VmRSS")

    def start(self) -> None:
        self._synchronize()
        self.started = time.perf_counter()

    def stop(self) -> None:
        self._synchronize()
        assert self.started is not None
        self.seconds = time.perf_counter() - self.started
        self.peak = self._memory("VmHWM")

    def result(self) -> dict[str, float]:
        return {"seconds": self.seconds, "peak_mib": (self.peak - self.loaded) / 2**20}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self, field: str) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])  # type: ignore[index]
