"""GPU checks of memory: measured against planned, small cards, and long documents.

Run by scripts.benchmark.gpu; the aims are in gpu_table.py. GB means 2³⁰ bytes, as on the label of a card.
"""

import copy
import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.memory import choose_live_chunks, estimate_memory
from scripts.benchmark.gpu_runner import Report, Settings, free_memory
from scripts.benchmark.gpu_setup import (
    GIB,
    RandomDocuments,
    autocast,
    batch_of,
    build_model,
    card_of,
    context_bytes,
    documents_of,
    films,
    mix,
    now,
    peak,
    precisions,
    reset_peak,
    set_up,
    trainer_for,
    training_arguments,
)

CARDS = (8, 12, 16, 24)
Model = HierarchicalRobertaForSequenceClassification


def in_gib(num_bytes: float, device: torch.device) -> float | str:
    return num_bytes / GIB if device.type == "cuda" else "cuda only"


def optimizer_step(
    model: Model, optimizer: torch.optim.Optimizer, batch: dict[str, Any], device: torch.device, precision: str
) -> None:
    """Forward, backward and AdamW step on one batch. For fp16, scaling the loss suffices to measure memory."""
    with autocast(device, precision):
        loss = model(**batch).loss
    (loss * 1024 if precision == "fp16" else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: Model, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")


# ---- what a step takes -----------------------------------------------------------------------------------------------


def memory(settings: Settings, report: Report) -> None:
    """Decides which settings fit on which card, and whether the planned memory is accurate: RoBERTa-base, 4 documents ×
    20 chunks × 512 tokens, peak of the second step."""
    device = set_up(settings)
    model = build_model(settings).to(device).train()
    batch = batch_of(films(settings, 4), device)
    bound = 4 if settings.tiny else 16
    for precision in reversed(precisions(settings)):
        for checkpointing in (False, True):
            for live_chunks in (0, bound):
                row = f"{precision}{', gradient checkpointing' if checkpointing else ''}, live chunks {live_chunks}"
                report.measure(row, _step_memory, model, device, batch, precision, checkpointing, live_chunks)


def _step_memory(
    model: Model, device: torch.device, batch: dict[str, Any], precision: str, checkpointing: bool, live_chunks: int
) -> dict[str, Any]:
    model.zero_grad()
    model.live_chunks = live_chunks
    if checkpointing:
        model.gradient_checkpointing_enable()
    else:
        model.gradient_checkpointing_disable()
    estimate = estimate_memory(model, lambda: autocast(device, precision))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    planned = weights + estimate.peak(len(batch["input_ids"]), live_chunks)
    free_memory()
    optimizer = adamw(model, device)
    try:
        optimizer_step(model, optimizer, batch, device, precision)
        reset_peak(device)
        started = now(device)
        optimizer_step(model, optimizer, batch, device, precision)
        seconds = now(device) - started
    except torch.OutOfMemoryError:
        return dict.fromkeys(("allocated, GiB", "reserved, GiB", "planned ÷ allocated", "seconds"), "does not fit")
    allocated, reserved = peak(device)
    return {
        "allocated, GiB": in_gib(allocated, device),
        "reserved, GiB": in_gib(reserved, device),
        "planned ÷ allocated": planned / allocated if allocated else "cuda only",
        "seconds": seconds,
    }


# ---- small cards -----------------------------------------------------------------------------------------------------


class MemoryWarnings(logging.Handler):
    """Collects out-of-memory warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "memory" in record.getMessage().lower() or "OOM" in record.getMessage():
            self.messages.append(record.getMessage())

    def __enter__(self) -> "MemoryWarnings":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *args: Any) -> None:
        logging.getLogger().removeHandler(self)


def small_cards(settings: Settings, report: Report) -> None:
    """Decides whether the default settings run on cards of 8 to 24 GB, and which are best on each: live chunks `auto`,
    two token budgets, on the mix. Also forces out-of-memory on an 8 GB card: the loss must not change."""
    device = set_up(settings)
    master = build_model(settings)
    steps = 2 if settings.tiny else 12
    documents = mix(settings, 8 * steps)
    for gib in CARDS:
        results = {}
        for budget in (64, 128) if settings.tiny else (4096, 16384):
            name = f"{gib} GB, token budget {budget}"
            if result := report.measure(name, _small_card, settings, device, master, documents, gib, budget, steps):
                results[budget] = result
        if results:
            best = max(results, key=lambda budget: results[budget]["documents/s"])
            live = results[best]["live chunks, auto"]
            report.figure(f"best on {gib} GB", f"token budget {best}, live chunks {live}")
    report.measure("8 GB, forced out of memory", _forced_out_of_memory, settings, device, master)


def _small_card(
    settings: Settings,
    device: torch.device,
    master: Model,
    documents: RandomDocuments,
    gib: float,
    budget: int,
    steps: int,
) -> dict[str, Any]:
    with card_of(device, gib) as ballast, MemoryWarnings() as warnings:
        model = copy.deepcopy(master)
        trainer, clock = trainer_for(settings, model, documents, max_steps=steps, token_budget=budget)
        chosen = choose_live_chunks(model, documents.sizes(), trainer.args, trainer.accelerator.autocast)
        trainer.train()
        allocated, reserved = clock.peaks[-1]
        timed = clock.steps[len(clock.steps) // 4 :]
        card = (reserved - ballast + context_bytes(device)) / (gib * GIB)
        return {
            "live chunks, auto": chosen,
            "allocated, GiB": in_gib(allocated - ballast, device),
            "reserved, GiB": in_gib(reserved - ballast, device),
            "reserved + context ÷ card": card if settings.is_cuda else "cuda only",
            "out of memory": len(warnings.messages),
            "documents/s": 8 * len(timed) / sum(timed),
        }


def _forced_out_of_memory(settings: Settings, device: torch.device, master: Model) -> dict[str, Any]:
    """Two steps on films without a limit of live chunks, with all memory and with 8 GB. Without dropout, as smaller
    encoder batches draw other random numbers."""
    losses, messages, live_chunks = {}, [], 0
    for gib in (None, 8):
        with card_of(device, gib) if gib else nullcontext(), MemoryWarnings() as warnings:
            model = copy.deepcopy(master)
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            if gib and (settings.tiny or not settings.is_cuda):
                _run_out_of_memory_once(model)
            trainer, clock = trainer_for(
                settings, model, films(settings, 16), max_steps=2, logging_strategy="steps", logging_steps=1
            )
            trainer.train()
            losses[gib], messages, live_chunks = clock.losses, warnings.messages, model.live_chunks
            del trainer, model
        free_memory()
    differences = [abs(one - other) for one, other in zip(losses[None], losses[8], strict=True)]
    if not messages:
        raise RuntimeError("memory did not run out")
    return {"times": len(messages), "live chunks in the end": live_chunks, "loss difference": max(differences)}


def _run_out_of_memory_once(model: Model) -> None:
    """Raise one artificial out-of-memory error, for CPUs and tiny models."""
    encode_chunks = model.encode_chunks

    def once(*args: Any, **kwargs: Any) -> torch.Tensor:
        model.encode_chunks = encode_chunks  # type: ignore[method-assign]
        raise torch.OutOfMemoryError("simulated out-of-memory error")

    model.encode_chunks = once  # type: ignore[method-assign]


# ---- long documents --------------------------------------------------------------------------------------------------


def length(settings: Settings, report: Report) -> None:
    """Decides whether an 8 GB card can train on documents of any length: 20, 200 and 2,000 chunks, with live chunks
    `auto` for the longest. Memory must be constant and time linear."""
    device = set_up(settings)
    counts = (4, 8, 40) if settings.tiny else (20, 200, 2000)
    model = build_model(settings, max_chunks=counts[-1]).to(device).train()
    budget = 64 if settings.tiny else None
    args = training_arguments(settings, per_device_train_batch_size=1, token_budget=budget)
    longest = documents_of(settings, [float(counts[-1])])
    results = {}
    with card_of(device, 8) as ballast:
        model.live_chunks = choose_live_chunks(model, longest.sizes(), args, lambda: autocast(device, "bf16"))
        report.figure("live chunks, auto", model.live_chunks)
        if settings.tiny:
            model.live_chunks = 2
        optimizer = adamw(model, device)
        for count in (counts[0], *counts):  # the first runs twice, for warm-up
            documents = documents_of(settings, [float(count)])
            results[count] = report.measure(
                f"{count} chunks", _long_document, model, optimizer, documents, device, ballast
            )
    if all(results.values()):
        seconds = [results[count]["seconds"] / count for count in counts]
        allocated = [results[count]["allocated, GiB"] for count in counts]
        ratio = allocated[-1] / allocated[0] if settings.is_cuda else "cuda only"
        report.figure("memory, most chunks ÷ fewest", ratio)
        report.figure("time of a chunk, most chunks ÷ second most", seconds[-1] / seconds[-2])
        power = np.polyfit(np.log(counts), np.log([results[count]["seconds"] for count in counts]), 1)[0]
        report.figure("time grows with chunks to the power", float(power))


def _long_document(
    model: Model, optimizer: torch.optim.Optimizer, documents: RandomDocuments, device: torch.device, ballast: int
) -> dict[str, Any]:
    batch = batch_of(documents, device)
    reset_peak(device)
    started = now(device)
    optimizer_step(model, optimizer, batch, device, "bf16")
    seconds = now(device) - started
    allocated, reserved = peak(device)
    return {
        "seconds": seconds,
        "allocated, GiB": in_gib(allocated - ballast, device),
        "reserved, GiB": in_gib(reserved - ballast, device),
    }
