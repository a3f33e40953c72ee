"""TensorBoard under runs/<timestamp>: scalars, the confusion matrix of each evaluation, the graph, the arguments."""

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..file_utils import is_disk_full
from .runtime import peak_memory
from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)

# Confusion matrix: maximum size in inches, and maximum number of labels for which cells are annotated.
MAX_INCHES, MAX_ANNOTATED = 15.0, 20


class TensorBoard(TrainerCallback):
    """Write the run's TensorBoard files on the main process.

    Args:
        config: the run's arguments, shown under "text".
    """

    def __init__(self, trainer: WeightedTrainer, label_names: list[str], config: dict[str, Any]):
        self.trainer, self.label_names, self.config = trainer, label_names, config
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "runs" / time.strftime("%Y-%m-%d_%H-%M-%S")
        self.writer = SummaryWriter(str(folder))
        self.writer.add_text("arguments", f"```json\n{json.dumps(self.config, indent=2, default=str)}\n```")
        if not self.trainer.is_fsdp_enabled:  # FSDP layers run collectives
            self.add_graph()

    def add_graph(self) -> None:
        """Add the model's graph, traced on two documents of two short chunks."""
        assert self.writer is not None
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training, token_counts = model.training, model.token_counts
        model.token_counts = [0, 0]  # tracing would add tensors to these counts
        # Tracing reads every property, which logs warnings.
        transformers_logger = logging.getLogger("transformers.modeling_utils")
        level = transformers_logger.level
        transformers_logger.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.writer.add_graph(HierarchicalClassifier(model.eval()), _example(model))
        except Exception as error:
            if is_disk_full(error):
                raise
            # Some encoders cannot be traced; that must not end the run.
            logger.warning(f"TensorBoard graph omitted: the encoder cannot be traced ({type(error).__name__}).")
        finally:
            transformers_logger.setLevel(level)
            model.train(training)
            model.token_counts = token_counts

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if self.writer is None:
            return
        logs = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if "loss" in logs:
            logs |= self.trainer.stats.speed() | {"padding_share": self.trainer.padding_share()}
            logs |= peak_memory(args.device)
        for name, value in logs.items():
            self.writer.add_scalar(scalar_name(name), value, state.global_step)
        self.writer.flush()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        evaluation = self.trainer.last_evaluation
        if self.writer is None or evaluation is None or evaluation.label_ids is None:
            return
        predicted = np.asarray(evaluation.predictions).argmax(axis=-1)
        matrix = np.zeros((len(self.label_names), len(self.label_names)), dtype=int)
        np.add.at(matrix, (np.asarray(evaluation.label_ids), predicted), 1)
        self.writer.add_figure("confusion_matrix", confusion_figure(matrix, self.label_names), state.global_step)
        self.writer.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.writer is not None:
            self.writer.close()


def scalar_name(name: str) -> str:
    """TensorBoard tag of a logged value: eval/ for evaluation, train/ for the rest."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def plain(label: str) -> str:
    """Escape dollar signs, which matplotlib would render as math."""
    return label.replace("$", r"\$")


def confusion_figure(matrix: np.ndarray, label_names: list[str]) -> Figure:
    """Confusion matrix of counts (rows: true, columns: predicted), colored by each row's share."""
    size = min(1.5 + 1.1 * len(label_names), MAX_INCHES)  # TensorBoard shows it at half size
    font = min(14.0, 14.0 * 12 / len(label_names))
    label_names = [plain(name) for name in label_names]
    figure = Figure(figsize=(size, size), dpi=90, layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape) if len(label_names) <= MAX_ANNOTATED else ():
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{matrix[row, column]}\n{share:.0%}",
            ha="center",
            va="center",
            fontsize=font + 1,
            color="white" if share > 0.55 else "#1b2a41",
        )
    ticks = range(len(label_names))
    axes.set_xticks(ticks, label_names, fontsize=font, rotation=90 if len(label_names) > MAX_ANNOTATED else 0)
    axes.set_yticks(
        ticks, label_names, rotation=0 if len(label_names) > MAX_ANNOTATED else 90, va="center", fontsize=font
    )
    axes.set_xlabel("predicted", fontsize=14)
    axes.set_ylabel("true", fontsize=14)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


class HierarchicalClassifier(nn.Module):
    """Wrapper with tensor inputs and logits as output, for tracing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_chunks: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, num_chunks=num_chunks).logits


def _example(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    ids_NL = torch.full((4, 8), 3, device=device)
    return ids_NL, torch.ones_like(ids_NL), torch.tensor([2, 2], device=device)
