"""The machine that a process runs on: its threads, its memory, and the settings of torch and the C library."""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import joblib
import psutil
import torch

from ..hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification


def set_num_threads(num_threads: int = 0) -> int:
    """All cores, shared among the processes of this machine, for the work on a CPU, or so many threads; how many there
    are now. (`accelerate launch` sets OMP_NUM_THREADS to 1 where nothing else is said.)"""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(1, joblib.cpu_count() // processes))
    return torch.get_num_threads()


def use_flash_attention_on_cuda() -> None:
    """Leave cuDNN out of torch's choice of an attention kernel: it builds a plan, of tens of milliseconds, for every new
    shape, and chunks of a document come in ever new ones (modelscope/FunASR#3704)."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def configure_malloc(model: HierarchicalRobertaForSequenceClassification, device: torch.device) -> None:
    """Tell the C library what to do with the memory that tensors free on a CPU (glibc; elsewhere, and on
    another device, nothing is done).

    Where live chunks are not bounded it is kept: given back to the kernel block by block, it would be faulted in anew,
    page by page, in every step, a quarter of a step's time. Where they are bounded, blocks of many sizes leave gaps, which
    would grow with the document: every encoder batch gives them back (docs/log.md has the figures). See mallopt(3) and
    malloc_trim(3).
    """
    if sys.platform != "linux" or device.type != "cpu":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return
    if model.live_chunks:

        def give_back(*_: Any) -> None:
            library.malloc_trim(0)

        model.encoder.register_forward_hook(give_back)
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # their numbers in malloc.h
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, -1)
    library.mallopt(top_pad, 64 * 2**20)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory used so far, in GiB: `peak_memory_gib`, a GPU's tensors or the process on a CPU; and on CUDA
    `peak_reserved_gib`, with what torch keeps for later, which is what meets the card's limit."""
    gib = 2**30
    if device.type == "cuda":
        peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        return {"peak_memory_gib": peaks[0] / gib, "peak_reserved_gib": peaks[1] / gib}
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would tell the peak of whatever started this process, where that was higher
        return {"peak_memory_gib": 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) / gib}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / gib}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device; on a CPU what the machine, or the container's limit, leaves."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def format_duration(seconds: float) -> str:
    """A time for people.

    >>> [readable(seconds) for seconds in (4.21, 75, 600, 9000)]
    ['4.2 s', '75 s', '10 min', '2.5 h']
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
