"""GPU checks of kernels: attention backends, synchronizations, compiled layers.

Run by scripts.benchmark.gpu; the aims are in gpu_table.py.
"""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from scripts.benchmark.gpu_checks_speed import Model, ours, share_of_peak, trained_pass
from scripts.benchmark.gpu_runner import Report, Settings, free_memory
from scripts.benchmark.gpu_setup import (
    RandomDocuments,
    build_model,
    films,
    matmul_peak,
    mix,
    now,
    seconds_of,
    set_up,
    trainer_for,
)

# ---- attention -------------------------------------------------------------------------------------------------------


def attention(settings: Settings, report: Report) -> None:
    """Decides whether cuDNN attention must be disabled, since it may build a plan for every new shape and encoder
    batches keep changing shape; and what a mask costs, which rules out flash attention."""
    device = set_up(settings)
    report.measure("priority of backends (0 math, 1 flash, 2 efficient, 3 cuDNN)", _priority, device)
    rng = np.random.default_rng(0)
    top = 32 if settings.tiny else 512
    every = [(n, length) for n in range(4, 60) for length in range(max(8, top // 4), top + 1)]
    shapes = [every[i] for i in rng.permutation(len(every))[:80]]
    full_batch: dict[str, dict[str, Any] | None] = {}
    for number, (cudnn, masked) in enumerate(((True, False), (True, True), (False, False), (False, True))):
        name = f"cuDNN {'on' if cudnn else 'off'}, {'mask' if masked else 'no mask'}"
        own = shapes[20 * number : 20 * number + 20]
        report.measure(name, _new_shapes, settings, device, own, cudnn, masked)
        full_batch[name] = report.measure(f"{name}, full batch", _full_batch, settings, device, cudnn, masked)
    for switch in ("on", "off"):
        if (with_mask := full_batch[f"cuDNN {switch}, mask"]) and (plain := full_batch[f"cuDNN {switch}, no mask"]):
            report.figure(f"mask ÷ no mask, cuDNN {switch}", with_mask["ms"] / plain["ms"])


def _priority(device: torch.device) -> str:
    _call(device, 2, 16, masked=False)[0]()  # the order may be set on the first call
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return " ".join(map(str, order())) if order else "not available in this torch"


def _call(
    device: torch.device, rows: int, length: int, masked: bool, heads: int = 12, width: int = 64
) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """A function that runs attention forward and backward as in an encoder layer, and its inputs."""
    shape = (rows, heads, length, width)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = None
    if masked:
        lengths = torch.randint(length // 2, length + 1, (rows, 1, 1, 1), device=device)
        mask = (torch.arange(length, device=device) < lengths).expand(rows, 1, length, length)
    ones = torch.ones(shape, device=device, dtype=torch.bfloat16)

    def call() -> None:
        scaled_dot_product_attention(query, key, value, attn_mask=mask).backward(ones)

    return call, (query, key, value, mask)


def _new_shapes(
    settings: Settings, device: torch.device, shapes: list[tuple[int, int]], cudnn: bool, masked: bool
) -> dict[str, Any]:
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    heads, width = (2, 8) if settings.tiny else (12, 64)
    warm, _ = _call(device, 3, 7, masked, heads, width)
    warm()
    first, second = [], []
    for rows, length in shapes:
        call, _ = _call(device, rows, length, masked, heads, width)
        first.append(1000 * seconds_of(device, call))
        second.append(1000 * seconds_of(device, call))
    return {"first call, ms": statistics.median(first), "second call, ms": statistics.median(second)}


def _full_batch(settings: Settings, device: torch.device, cudnn: bool, masked: bool) -> dict[str, Any]:
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    rows, length, heads, width = (4, 32, 2, 8) if settings.tiny else (32, 512, 12, 64)
    call, tensors = _call(device, rows, length, masked, heads, width)
    call()
    milliseconds = 1000 * seconds_of(device, call, 5)
    choice = getattr(torch, "_fused_sdp_choice", None)
    return {"ms": milliseconds, "backend": int(choice(*tensors)) if choice else "not available in this torch"}


# ---- synchronizations ------------------------------------------------------------------------------------------------


class _InStep(TrainerCallback):
    """Calls `begin` after step 2 and `end` after `steps` more steps."""

    def __init__(self, begin: Callable[[], Any], end: Callable[[], Any], steps: int):
        self.begin, self.end, self.steps = begin, end, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.begin()
        elif state.global_step == 2 + self.steps:
            self.end()


def synchronizations(settings: Settings, report: Report) -> None:
    """Shows where in a step the CPU waits for the GPU, by source line, and whether kernels or launches dominate."""
    device = set_up(settings)
    report.measure("one step", _synchronizations, settings, report)
    report.measure("two steps under the profiler", _profiled, settings, report, device)


def _synchronizations(settings: Settings, report: Report) -> None:
    def begin() -> None:
        if settings.is_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        else:
            warnings.warn("simulated synchronizing operation", stacklevel=1)

    def end() -> None:
        if settings.is_cuda:
            torch.cuda.set_sync_debug_mode("default")

    trainer, _ = trainer_for(settings, ours(settings), mix(settings, 32), max_steps=4)
    trainer.add_callback(_InStep(begin, end, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    lines = Counter(
        f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"
        for each in caught
        if "synchronizing" in str(each.message)
    )
    report.figure("synchronizations in a step", sum(lines.values()))
    for line, count in lines.most_common(25):
        report.figure(f"{line}: times", count)


def _profiled(settings: Settings, report: Report, device: torch.device) -> None:
    profiler = profile(activities=[ProfilerActivity.CUDA if settings.is_cuda else ProfilerActivity.CPU])
    clock = {}

    def begin() -> None:
        now(device)
        profiler.start()
        clock["begin"] = now(device)

    def end() -> None:
        clock["end"] = now(device)
        profiler.stop()

    trainer, _ = trainer_for(settings, ours(settings), mix(settings, 40), max_steps=5)
    trainer.add_callback(_InStep(begin, end, 2))
    trainer.train()
    kind = torch.autograd.DeviceType.CUDA if settings.is_cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    wall = clock["end"] - clock["begin"]
    report.figure("GPU busy, share of the time", busy_seconds(events) / wall if settings.is_cuda else "cuda only")
    report.figure("kernels and copies in a step", len(events) // 2)
    report.figure("milliseconds of a step under the profiler", 500 * wall)
    times: Counter[str] = Counter()
    for event in events:
        times[f"`{event.name[:60]}`".replace(": ", " ")] += event.time_range.elapsed_us()
    for name, microseconds in times.most_common(12):
        report.figure(f"{name}: ms in two steps", microseconds / 1000)


def busy_seconds(events: list[Any]) -> float:
    """Seconds during which at least one event ran."""
    total = end = 0.0
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in events):
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total / 1e6


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_layers(settings: Settings, report: Report) -> None:
    """Decides whether --compile_layers is worth a minute of compilation: tokens/s after warm-up against eager, the
    number of graphs, and whether it works with recomputation (which must use the same graph as the forward pass)."""
    from torch._dynamo.utils import counters

    device = set_up(settings)
    peak_tflops = matmul_peak(settings, device, torch.bfloat16)
    bound = 4 if settings.tiny else 16
    for scenario, documents, live_chunks in (("films", films(settings, 16), 0), ("mix", mix(settings, 48), bound)):
        geometry = (settings, live_chunks)
        eager = report.measure(f"{scenario}, eager", trained_pass, settings, ours(*geometry), documents)
        compiled = report.measure(f"{scenario}, compiled", _compiled_pass, settings, ours(*geometry), documents)
        report.figure(f"{scenario}: graphs", int(counters["stats"]["unique_graphs"]))
        torch._dynamo.reset()
        counters.clear()
        free_memory()
        for kind, result in (("eager", eager), ("compiled", compiled)):
            if result:
                share = share_of_peak(build_model(settings), documents, result["real tokens/s"], peak_tflops)
                report.figure(f"{scenario}: share of the matmul peak, {kind}", share)
        if eager and compiled:
            report.figure(f"{scenario}: compiled ÷ eager", compiled["real tokens/s"] / eager["real tokens/s"])


def _compiled_pass(settings: Settings, model: Model, documents: RandomDocuments) -> dict[str, Any]:
    # Tiny models are only traced: code generation takes minutes on a CPU.
    model.compile_layers("aot_eager" if settings.tiny else "inductor")
    return trained_pass(settings, model, documents)
