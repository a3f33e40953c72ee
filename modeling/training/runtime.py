"""Process runtime: threads, memory, and settings of torch and the C library."""

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
    """Set the number of CPU threads (0: the cores divided by the local processes) and return it.

    (`accelerate launch` sets OMP_NUM_THREADS to 1 by default.)
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(1, joblib.cpu_count() // processes))
    return torch.get_num_threads()


def use_flash_attention_on_cuda() -> None:
    """Disable cuDNN attention, which spends tens of milliseconds planning each new shape.

    Encoder batches rarely repeat a shape (see modelscope/FunASR#3704).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def configure_malloc(model: HierarchicalRobertaForSequenceClassification, device: torch.device) -> None:
    """Configure how glibc handles freed memory on a CPU; a no-op on other platforms and devices.

    Without a limit on live chunks freed memory is retained: returning it to the kernel causes page faults that cost a
    quarter of each step. With a limit, blocks of many sizes fragment the heap, which would grow with the document, so
    memory is trimmed after every encoder batch (figures in docs/log.md). See mallopt(3) and malloc_trim(3).
    """
    if sys.platform != "linux" or device.type != "cpu":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        return
    if model.live_chunks:

        def trim(*_: Any) -> None:
            library.malloc_trim(0)

        model.encoder.register_forward_hook(trim)
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # constants of malloc.h
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, -1)
    library.mallopt(top_pad, 64 * 2**20)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far, in GiB.

    `peak_memory_gib` counts tensors on a GPU, the process on a CPU. CUDA adds `peak_reserved_gib`, which includes
    torch's cache and is what counts against the GPU's limit.
    """
    gib = 2**30
    if device.type == "cuda":
        peaks = (torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
        return {"peak_memory_gib": peaks[0] / gib, "peak_reserved_gib": peaks[1] / gib}
    if sys.platform == "win32":
        return {"peak_memory_gib": psutil.Process().memory_info().peak_wset / gib}
    status = Path("/proc/self/status")
    if status.exists():  # getrusage may report the peak of the parent process
        return {"peak_memory_gib": 1024 * int(status.read_text().split("VmHWM:")[1].split()[0]) / gib}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / gib}


def free_memory(device: torch.device) -> int:
    """Free bytes on the device; on a CPU, of the machine or within the container's limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def format_duration(seconds: float) -> str:
    """Format a duration.

    >>> [format_duration(seconds) for seconds in (4.21, 75, 600, 9000)]
    ['4.2 s', '75 s', '10 min', '2.5 h']
    """
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
