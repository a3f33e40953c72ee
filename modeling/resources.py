"""What a training step needs: memory from what autograd keeps, time from one encoder batch; how many chunks may live."""

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import psutil
import torch

from .modeling_hierarchical_roberta import BATCHES_PER_CAST, HierarchicalRobertaForSequenceClassification

# Shares of the free memory that activations may take. The CPU's is shared with everything else that runs there.
USABLE = {"cuda": 0.85, "cpu": 0.5}
# Allocators leave gaps: measured peaks were 0.9 to 1.3 times what autograd keeps (docs/log.md).
GAPS = 1.05


@dataclass
class Footprint:
    """Bytes that training takes over the loaded model.

    Attributes:
        state: gradients and the optimizer's two moments, of the parameters that are trained.
        per_chunk: what the backward pass needs of one full chunk, attention mask included.
        once: what it needs whatever the number of chunks, such as the weights' low-precision copies.
        working: the largest temporary tensors of an encoder batch.
        chunks_at_once: full chunks in an encoder batch.
    """

    state: int
    per_chunk: int
    once: int
    working: int
    chunks_at_once: int

    def peak(self, num_chunks: float, live_chunks: int = 0) -> float:
        """Bytes at the most, for a batch of so many full chunks under a bound on the live ones (0: none)."""
        alive = min(num_chunks, live_chunks) if live_chunks else num_chunks
        # The weights' copies are made anew every few encoder batches, and once more while one is recomputed.
        copies = max(1, -(-alive // (BATCHES_PER_CAST * self.chunks_at_once))) + (alive < num_chunks)
        return self.state + copies * self.once + self.working + GAPS * alive * self.per_chunk

    def live_chunks_within(self, num_bytes: float, num_chunks: int) -> int:
        """The bound on live chunks under which a batch of `num_chunks` stays within so many bytes; 0 where none is
        needed. In steps of an eighth or less, so that a little less memory seldom changes it: a bound below an encoder
        batch's chunks changes its make-up, and with it which random numbers dropout draws for whom."""
        if self.per_chunk == 0 or self.peak(num_chunks) <= num_bytes:
            return 0
        steps = {mantissa << exponent for exponent in range(num_chunks.bit_length()) for mantissa in range(1, 16)}
        fitting = [bound for bound in steps if bound < num_chunks and self.peak(num_chunks, bound) <= num_bytes]
        return max(fitting, default=1)


def split_documents(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """A batch as up to `num_parts` smaller ones, each with its own documents' chunks."""
    num_chunks_B = batch["num_chunks"]
    if num_parts == 1:
        return [batch]
    counts = [int(part.sum()) for part in num_chunks_B.chunk(num_parts)]
    size = -(-len(num_chunks_B) // num_parts)
    starts = range(0, len(num_chunks_B), size)
    of_documents = {
        name: [value[start : start + size] for start in starts]
        for name, value in batch.items()
        if len(value) == len(num_chunks_B)
    }
    of_chunks = {name: value.split(counts) for name, value in batch.items() if name not in of_documents}
    return [{name: parts[i] for name, parts in (of_documents | of_chunks).items()} for i in range(len(counts))]


def use_all_cores(num_threads: int = 0) -> int:
    """All cores, shared among the processes of this machine, for the work on a CPU, or so many threads; how many there
    are now. (`accelerate launch` sets OMP_NUM_THREADS to 1 where nothing else is said.)"""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(1, joblib.cpu_count() // processes))
    return torch.get_num_threads()


def use_flash_attention_on_cuda() -> None:
    """Leave cuDNN out of torch's choice of an attention kernel: it builds a plan, of tens of milliseconds, for every new
    shape, and chunks of a document come in ever new ones (modelscope/FunASR#3704)."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def settle_freed_memory(model: HierarchicalRobertaForSequenceClassification, device: torch.device) -> None:
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


def footprint(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Footprint:
    """Measure what a step of this model keeps, by encoding two chunks and then four, and counting the tensors that
    autograd saves. Model, random state and gradients are as before.

    The last chunk is one token short, so that an attention mask is kept, as in most encoder batches."""
    kept_2, kept_4 = (_kept_bytes(model, num_chunks, autocast) for num_chunks in (2, 4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    encoder_trained = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    chunks_at_once = max(1, model.encoder_batch_size()[0] // model.config.chunk_length)
    encoder = model.config.encoder_config
    widest = max(getattr(encoder, "intermediate_size", 0), model.config.hidden_size)
    # Gradients of the widest activation, in and out, in fp32; and of the largest table, before it is added up.
    working = 2 * 4 * chunks_at_once * model.config.chunk_length * widest if encoder_trained else 0
    working += 4 * max((parameter.numel() for parameter in trained), default=0)
    return Footprint(
        state=3 * 4 * sum(parameter.numel() for parameter in trained),
        per_chunk=(kept_4 - kept_2) // 2,
        once=max(2 * kept_2 - kept_4, 0),
        working=working,
        chunks_at_once=chunks_at_once,
    )


def warm_up(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """A chunk forward and backward: the libraries of a GPU take their workspaces and load their kernels, which then no
    longer count as free memory. (Gradients are left empty.)"""
    vectors = _encode(model, 2, autocast)
    if vectors.requires_grad:
        vectors.float().mean().backward()
    model.zero_grad()


def seconds_per_chunk(
    model: HierarchicalRobertaForSequenceClassification,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[float, float]:
    """Seconds for a full chunk, forward and backward: the best of three encoder batches. (Gradients are left empty.)"""
    rows = max(1, model.encoder_batch_size()[0] // model.config.chunk_length)
    best = (float("inf"), float("inf"))
    for _ in range(3):
        started = _now(model.device)
        vectors = _encode(model, rows, autocast)
        forward = _now(model.device)
        if vectors.requires_grad:
            vectors.float().mean().backward()
        backward = _now(model.device)
        best = min(best, ((forward - started) / rows, (backward - forward) / rows), key=sum)
        model.zero_grad()
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _encode(
    model: HierarchicalRobertaForSequenceClassification, rows: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> torch.Tensor:
    """Full chunks, the last but for a token, through the encoder in training mode, with nothing left behind."""
    training, live_chunks, counted = model.training, model.live_chunks, list(model.encoded_tokens)
    model.train()
    model.live_chunks = 0
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            words = torch.randint(5, 50, (rows, model.config.chunk_length), device=model.device)
            mask = torch.ones_like(words)
            mask[-1, -1] = 0
            with autocast():
                return model.encode_chunks(words, mask)
    finally:
        model.train(training)
        model.live_chunks, model.encoded_tokens = live_chunks, counted


def _kept_bytes(
    model: HierarchicalRobertaForSequenceClassification, rows: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> int:
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        vectors = _encode(model, rows, autocast)
    del vectors
    return sum(kept.values())
