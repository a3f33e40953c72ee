"""GPU checks of correctness: the environment, exactness, precisions, gradients in half precision.

Run by scripts.benchmark.gpu; the aims are in gpu_table.py.
"""

import copy
import math
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from scripts.benchmark.gpu_runner import Report, Settings, begin, finish
from scripts.benchmark.gpu_setup import (
    GIB,
    autocast,
    batch_of,
    build_model,
    chunk_length,
    documents_of,
    gradients_of,
    largest_difference,
    matmul_peak,
    precisions,
    relative_error,
    set_up,
    trainer_for,
    weights_of,
)

LIBRARIES = ("transformers", "accelerate", "datasets", "tokenizers", "captum", "scikit-learn")
STEPS, SAVED_AT = 8, 4
LOSS_SCALE = 1024.0


def environment(settings: Settings, report: Report) -> None:
    """What all figures depend on: versions, the device, and the matmul peak that utilization is relative to."""
    device = set_up(settings)
    report.figure("device type", device.type)
    report.figure("Python", platform.python_version())
    report.figure("torch", torch.__version__)
    for name in LIBRARIES:
        report.figure(name, _version(name))
    if settings.is_cuda:
        report.measure("device", torch.cuda.get_device_name, device)
        report.measure("capability", lambda: ".".join(map(str, torch.cuda.get_device_capability(device))))
        report.measure("memory, GiB", lambda: torch.cuda.mem_get_info(device)[1] / GIB)
        report.figure("CUDA", str(torch.version.cuda))
        report.measure("cuDNN", torch.backends.cudnn.version)
        report.figure("driver", _driver())
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        report.measure(f"matmul peak {name}, TFLOP/s", matmul_peak, settings, device, dtype)
    report.measure("matmul peak TF32, TFLOP/s", _tf32_peak, settings, device)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown (nvidia-smi failed)"


def _tf32_peak(settings: Settings, device: torch.device) -> float | str:
    if not settings.is_cuda:
        return "cuda only"
    torch.set_float32_matmul_precision("high")
    try:
        return matmul_peak(settings, device, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- exactness -------------------------------------------------------------------------------------------------------


def exactness(settings: Settings, report: Report) -> None:
    """Decides whether the other checks can be trusted: results match the CPU and do not depend on batching or on the
    limit of live chunks. In fp32 without TF32, torch's default."""
    device = set_up(settings)
    length = min(128, chunk_length(settings))
    exact = build_model(settings, dropout=0.0, length=length)
    report.measure("CPU and device", _cpu_and_device, settings, report, device, exact)
    report.measure("batching", _batching, settings, report, exact, length)
    report.measure("live chunks", _live_chunks, settings, report, device, exact, length, "dropout 0")
    dropping = build_model(settings, dropout=0.1, attention_dropout=0.1, length=length)
    report.measure("live chunks, dropout", _live_chunks, settings, report, device, dropping, length, "dropout 0.1")


def _cpu_and_device(
    settings: Settings, report: Report, device: torch.device, model: HierarchicalRobertaForSequenceClassification
) -> None:
    documents = documents_of(settings, [3, 1.6], model.config.chunk_length)
    logits, gradients = [], []
    for each_device in (torch.device("cpu"), device):
        one = copy.deepcopy(model).to(each_device).train()
        output = one(**batch_of(documents, each_device))
        output.loss.backward()
        logits.append(output.logits.detach().cpu().double())
        gradients.append(gradients_of(one))
    report.figure("logits, CPU ↔ device", float((logits[1] - logits[0]).abs().max() / logits[0].abs().max()))
    report.figure("gradients, CPU ↔ device", largest_difference(gradients[1], gradients[0]))


def _batching(
    settings: Settings, report: Report, model: HierarchicalRobertaForSequenceClassification, length: int
) -> None:
    """Compare the weights after three steps of 16 documents. AdamW's ε is RoBERTa's 1e-6: with 1e-8, gradients that are
    zero up to rounding cause full steps in random directions."""
    documents = documents_of(settings, [1 + (i * 0.7) % 2 for i in range(48)], length)
    weights = {}
    for batch, accumulated in ((16, 1), (4, 4), (1, 16)):
        trainer, _ = trainer_for(
            settings,
            copy.deepcopy(model),
            documents,
            "fp32",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=3,
            learning_rate=1e-4,
            adam_epsilon=1e-6,
        )
        trainer.train()
        weights[f"{batch} × {accumulated}"] = weights_of(trainer.model)
    first, *others = weights
    moved = _max_difference(weights[first], weights_of(model))
    report.figure("weights moved by", moved)
    for name in others:
        report.figure(f"final weights, {first} ↔ {name}", _max_difference(weights[name], weights[first]))


def _max_difference(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    return max(float((theirs[name] - tensor).abs().max()) for name, tensor in ours.items())


def _live_chunks(
    settings: Settings,
    report: Report,
    device: torch.device,
    model: HierarchicalRobertaForSequenceClassification,
    length: int,
    name: str,
) -> None:
    """Recomputation must give the same gradients, replaying the random numbers of dropout. Encoder batches have 4 to 5
    chunks, so that no limit changes their composition."""
    model = copy.deepcopy(model).to(device).train()
    model.token_budget = 4 * length
    batch = batch_of(documents_of(settings, [9.6, 10, 8.3, 12], length), device)
    gradients = {}
    for live_chunks in (0, 16, 8):
        torch.manual_seed(1)
        model.live_chunks = live_chunks
        model(**batch).loss.backward()
        gradients[live_chunks] = gradients_of(model)
    for live_chunks in (16, 8):
        difference = largest_difference(gradients[live_chunks], gradients[0])
        report.figure(f"gradients, live chunks 0 ↔ {live_chunks}, {name}", difference)


# ---- precision -------------------------------------------------------------------------------------------------------


def precision(settings: Settings, report: Report) -> None:
    """Decides whether bf16 and fp16 train like fp32, whether the loss scaler settles and resumes, and whether resuming
    is bit-exact, which on CUDA only --full_determinism guarantees. Each setting runs in its own process, in parallel,
    as cuBLAS reads its workspace configuration before CUDA is first used."""
    names = precisions(settings)
    begun = {
        f"{name}{', full_determinism' if determinism else ''}": begin(
            settings, _precision_run, settings, name, determinism
        )
        for determinism in (False, True)
        for name in names
    }
    losses = {}
    for row, process in begun.items():
        if result := report.measure(row, finish, process):
            losses[row] = [float(loss) for loss in result["losses"].split()]
    for row, values in losses.items():
        if row != "fp32" and "fp32" in losses:
            differences = [abs(one - other) for one, other in zip(values, losses["fp32"], strict=True)]
            report.figure(f"{row}: largest loss difference to fp32", max(differences))


def _precision_run(settings: Settings, name: str, determinism: bool) -> dict[str, Any]:
    set_up(settings)
    length = min(128, chunk_length(settings))
    documents = documents_of(settings, [1 + i % 5 for i in range(8 * STEPS)], length)

    folder = tempfile.mkdtemp()

    def trained(checkpoint: str | None) -> tuple[Any, Any]:
        model = build_model(settings, dropout=0.1, attention_dropout=0.1, length=length, layers=4, vocab_size=5000)
        trainer, clock = trainer_for(
            settings,
            model,
            documents,
            name,
            max_steps=STEPS,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="steps",
            save_steps=SAVED_AT,
            save_total_limit=None,
            full_determinism=determinism,
            output_dir=folder,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, clock

    trainer, clock = trained(None)
    expected, evaluation = weights_of(trainer.model), trainer.evaluate()
    scaler = trainer.accelerator.scaler
    figures: dict[str, Any] = {
        "losses": " ".join(f"{loss:.4f}" for loss in clock.losses),
        "evaluation loss": evaluation["eval_loss"],
        "skipped steps": round(math.log2(65536 / scaler.get_scale())) if scaler is not None else 0,
    }
    logits = trainer.predict(documents).predictions
    del trainer
    resumed, _ = trained(str(Path(folder) / f"checkpoint-{SAVED_AT}"))
    weights = weights_of(resumed.model)
    figures["same bits after resume"] = all(bool((weights[key] == value).all()) for key, value in expected.items())
    figures["largest weight difference after resume"] = _max_difference(weights, expected)
    figures["largest logit difference after resume"] = float(abs(resumed.predict(documents).predictions - logits).max())
    shutil.rmtree(folder, ignore_errors=True)
    return figures


# ---- gradients in half precision -------------------------------------------------------------------------------------


def gradients(settings: Settings, report: Report) -> None:
    """Decides whether half precision is accurate enough for long documents, whose weight gradients accumulate over many
    encoder batches: 10 and 250 additions, with 8 chunks of 128 tokens per encoder batch."""
    device = set_up(settings)
    length = min(128, chunk_length(settings))
    model = build_model(settings, dropout=0.0, length=length, max_chunks=2000).to(device).train()
    model.token_budget, model.live_chunks = 8 * length, 16
    for chunks in (8, 40) if settings.tiny else (80, 2000):
        batch = batch_of(documents_of(settings, [chunks - 0.5], length), device)
        report.measure(f"{chunks} chunks", _gradient_errors, settings, report, model, batch, chunks)


def _gradient_errors(settings: Settings, report: Report, model: Any, batch: dict[str, Any], chunks: int) -> None:
    exact = _gradients_in(model, batch, "fp32")
    matrices = {name: value for name, value in exact.items() if ".layer." in name and value.dim() == 2}
    for name in precisions(settings)[1:]:
        theirs = _gradients_in(model, batch, name)
        report.figure(f"{name}, {chunks} chunks: relative error", relative_error(theirs, exact))
        report.figure(f"{name}, {chunks} chunks: of the layers' matrices", relative_error(theirs, matrices))


def _gradients_in(model: Any, batch: dict[str, Any], precision_name: str) -> dict[str, torch.Tensor]:
    with autocast(model.device, precision_name):
        loss = model(**batch).loss
    scale = LOSS_SCALE if precision_name == "fp16" else 1.0
    (loss * scale).backward()
    return {name: value / scale for name, value in gradients_of(model).items()}
