"""GPU checks of speed: compared with the padded loop, ModernBERT and the bare encoder, and by token budget.

Run by scripts.benchmark.gpu; the aims are in gpu_table.py. A pass is a training epoch with WeightedTrainer, after a
warm-up epoch with another document order, so that its encoder batches have new shapes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from scripts.benchmark.gpu_runner import Report, Settings
from scripts.benchmark.gpu_setup import (
    GIB,
    RandomDocuments,
    autocast,
    build_model,
    chunk_length,
    encoder_flops,
    films,
    matmul_peak,
    mix,
    peak,
    reset_peak,
    seconds_of,
    set_up,
    trainer_for,
)
from scripts.benchmark.padded_loop import PaddedCollator, PaddedLoop

Model = HierarchicalRobertaForSequenceClassification


def scenarios(settings: Settings, documents: int = 64) -> dict[str, RandomDocuments]:
    return {"mix": mix(settings, documents), "films": films(settings, documents // 4)}


def trained_pass(
    settings: Settings, model: Model, documents: RandomDocuments, precision: str = "bf16", **overrides: Any
) -> dict[str, Any]:
    """Throughput of the second of two epochs, and its peak memory above the loaded model."""
    if isinstance(model, PaddedLoop):
        overrides["collator"] = PaddedCollator(1, model.config.max_chunks, model.config.chunk_length)
    trainer, clock = trainer_for(settings, model, documents, precision, num_train_epochs=2, **overrides)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trainer.train()
    seconds, allocated = clock.epochs[-1], clock.peaks[-1][0]
    return {
        "documents/s": len(documents) / seconds,
        "real tokens/s": sum(documents.lengths()) / seconds,
        "GiB over the model": (allocated - weights) / GIB if settings.is_cuda else "cuda only",
    }


def share_of_peak(model: Model, documents: RandomDocuments, tokens_per_second: float, peak_tflops: float) -> float:
    """Floating-point operations of the encoder per second (see `encoder_flops`) ÷ the measured matmul peak."""
    lengths = documents.lengths()
    return encoder_flops(model, lengths) / sum(lengths) * tokens_per_second / peak_tflops / 1e12


def ours(settings: Settings, live_chunks: int = 0) -> Model:
    """The model with the default encoder batches."""
    model = build_model(settings)
    model.live_chunks = live_chunks
    return model


# ---- comparison ------------------------------------------------------------------------------------------------------


def speed(settings: Settings, report: Report) -> None:
    """Decides whether the design pays off on a GPU: documents/s against the padded loop and ModernBERT, time per step
    against the bare encoder on the same number of tokens, and the share of the matmul peak."""
    device = set_up(settings)
    peak_tflops = matmul_peak(settings, device, torch.bfloat16)
    report.figure("matmul peak bf16, TFLOP/s", peak_tflops)
    report.figure("token budget of ours", ours(settings).encoder_batch_size(device)[0])
    bare = report.measure("bare encoder, dense, real tokens/s", _bare_encoder, settings, device)
    fp16 = "fp16" if settings.is_cuda else "fp32"
    most = 4 if settings.tiny else 20
    shipped: dict[str, Any] = {"attention_dropout": 0.1, "max_chunks": most}
    for scenario, documents in scenarios(settings).items():
        results = {}
        for name, build, precision, options in (
            ("ours", lambda: ours(settings), "bf16", {}),
            ("ours, 16 live chunks", lambda: ours(settings, live_chunks=4 if settings.tiny else 16), "bf16", {}),
            ("padded as shipped", lambda: build_model(settings, PaddedLoop, **shipped), fp16,
             {"gradient_checkpointing": True}),
            ("padded without checkpointing", lambda: build_model(settings, PaddedLoop, **shipped), fp16, {}),
            ("padded, our precision and dropout", lambda: build_model(settings, PaddedLoop, max_chunks=most), "bf16", {}),
        ):  # fmt: skip
            row = f"{scenario}, {name}"
            results[name] = report.measure(row, _built_and_trained, settings, build, documents, precision, options)
        results["ModernBERT"] = report.measure(f"{scenario}, ModernBERT", _modernbert, settings, device, documents)
        _ratios(report, scenario, results)
        if own := results["ours"]:
            share = share_of_peak(build_model(settings), documents, own["real tokens/s"], peak_tflops)
            report.figure(f"{scenario}, ours: share of the matmul peak", share)
            if bare:
                report.figure(f"{scenario}, ours: step ÷ bare encoder", bare / own["real tokens/s"])


def _built_and_trained(
    settings: Settings, build: Callable[[], Model], documents: RandomDocuments, precision: str, options: dict[str, Any]
) -> dict[str, Any]:
    return trained_pass(settings, build(), documents, precision, **options)


def _ratios(report: Report, scenario: str, results: dict[str, Any]) -> None:
    own = results["ours"]
    for name, other in results.items():
        if own and other and not name.startswith("ours"):
            ratio = own["documents/s"] / other["documents/s"]
            report.figure(f"{scenario}, documents/s: ours ÷ {name}", ratio)
    other = results["padded without checkpointing"]
    for name, one in (("ours", own), ("ours, 16 live chunks", results["ours, 16 live chunks"])):
        if one and other:
            sizes = one["GiB over the model"], other["GiB over the model"]
            ratio = "cuda only" if isinstance(sizes[0], str) else sizes[0] / sizes[1]
            report.figure(f"{scenario}, memory: {name} ÷ padded without checkpointing", ratio)


def _bare_encoder(settings: Settings, device: torch.device) -> float:
    """Tokens per second of the encoder alone, forward and backward in bf16, in full batches of 64 × 512."""
    encoder = build_model(settings).encoder.to(device).train()
    rows, length = (8 if settings.tiny else 64), chunk_length(settings)
    step = _dense_step(encoder, rows, length, device)
    step()
    step()
    return rows * length / seconds_of(device, step, 2 if settings.tiny else 8)


def _dense_step(encoder: torch.nn.Module, rows: int, length: int, device: torch.device) -> Callable[[], None]:
    ids_nl = torch.randint(5, 99, (rows, length), device=device)

    def step() -> None:
        with autocast(device, "bf16"):
            mean = encoder(input_ids=ids_nl).last_hidden_state.float().mean()
        mean.backward()

    return step


def _modernbert(settings: Settings, device: torch.device, documents: RandomDocuments) -> dict[str, Any]:
    """A pass of ModernBERT-base, randomly initialized, over each document's first 8,192 tokens, batch size 4."""
    longest = 64 if settings.tiny else 8192
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    sizes |= {"cls_token_id": 0, "sep_token_id": 2}
    config = ModernBertConfig(num_labels=3, attn_implementation="sdpa", **(sizes if settings.tiny else {}))
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(config).to(device).train()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    rows = [torch.from_numpy(np.concatenate(item["input_ids"])[:longest]) for item in documents.items]

    def one_pass() -> None:
        for number, start in enumerate(range(0, len(rows), 4)):
            part = rows[start : start + 4]
            ids_bl = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=config.pad_token_id)
            lengths = torch.tensor([len(row) for row in part])
            mask_bl = (torch.arange(ids_bl.shape[1]) < lengths[:, None]).long()
            labels = torch.zeros(len(part), dtype=torch.long)
            with autocast(device, "bf16"):
                loss = model(
                    input_ids=ids_bl.to(device), attention_mask=mask_bl.to(device), labels=labels.to(device)
                ).loss
            (loss / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()

    one_pass()
    reset_peak(device)
    seconds = seconds_of(device, one_pass)
    return {
        "documents/s": len(rows) / seconds,
        "real tokens/s": sum(map(len, rows)) / seconds,
        "GiB over the model": (peak(device)[0] - weights) / GIB if settings.is_cuda else "cuda only",
    }


# ---- token budgets ---------------------------------------------------------------------------------------------------


def budgets(settings: Settings, report: Report) -> None:
    """Decides the token budget on a GPU and `batch_cost`, the fixed cost of an encoder batch in tokens, weighed against
    padding: a/b in ms = a + b × tokens."""
    device = set_up(settings)
    report.measure("encoder batch", _fixed_cost, settings, device)
    for scenario, documents in scenarios(settings).items():
        for budget, cost in ((4096, 64), (4096, 2048), (16384, 64), (16384, 2048), (32768, 2048)):
            model = ours(settings)
            model.token_budget, model.batch_cost = budget // 64 if settings.tiny else budget, cost
            row = f"{scenario}, token budget {budget}, batch cost {cost}"
            report.measure(row, trained_pass, settings, model, documents)


def _fixed_cost(settings: Settings, device: torch.device) -> dict[str, float]:
    encoder = build_model(settings).encoder.to(device).train()
    length, figures = chunk_length(settings), {}
    rows = (2, 4, 8, 16) if settings.tiny else (8, 16, 32, 64)
    for count in rows:
        step = _dense_step(encoder, count, length, device)
        step()
        step()
        figures[f"{count} × {length}, ms"] = 1000 * seconds_of(device, step, 5)
    slope, fixed = np.polyfit([count * length for count in rows], list(figures.values()), 1)
    return figures | {"a, ms": float(fixed), "b, ms a token": float(slope), "fixed cost, tokens": float(fixed / slope)}
