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

# Of the confusion matrix: inches, and labels up to which its cells are told in numbers.
LARGEST, MOST_TOLD = 15.0, 20


class TensorBoard(TrainerCallback):
    """Writes the run's TensorBoard files, on the first process.

    Args:
        config: shown under "text" as the run's arguments.
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
        if not self.trainer.is_fsdp_enabled:  # whose layers meet the other processes
            self.add_graph()

    def add_graph(self) -> None:
        """The model's graph, traced on two documents of two short chunks."""
        assert self.writer is not None
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training, token_counts = model.training, model.token_counts
        model.token_counts = [0, 0]  # tracing makes tensors of the numbers that are added here
        chatter = logging.getLogger("transformers.modeling_utils")  # tracing asks for every property, unused ones too
        level = chatter.level
        chatter.setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.writer.add_graph(HierarchicalClassifier(model.eval()), _example(model))
        except Exception as error:
            if is_disk_full(error):
                raise
            # Some encoders cannot be traced, and no run should end for want of a picture
            logger.warning(f"TensorBoard has no graph: this encoder cannot be traced ({type(error).__name__}).")
        finally:
            chatter.setLevel(level)
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
    """Tag of a logged value: evaluation under eval/, learning rates and training under train/."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def plain(label: str) -> str:
    """A label as matplotlib is to write it: what stands between two dollars is no formula."""
    return label.replace("$", r"\$")


def confusion_figure(matrix: np.ndarray, label_names: list[str]) -> Figure:
    """Counts (rows: true, columns: predicted) on a scale of each row's share."""
    size = min(1.5 + 1.1 * len(label_names), LARGEST)  # read at half its size among other cards
    font = min(14.0, 14.0 * 12 / len(label_names))
    label_names = [plain(name) for name in label_names]
    figure = Figure(figsize=(size, size), dpi=90, layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*matrix.shape) if len(label_names) <= MOST_TOLD else ():
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
    axes.set_xticks(ticks, label_names, fontsize=font, rotation=90 if len(label_names) > MOST_TOLD else 0)
    axes.set_yticks(ticks, label_names, rotation=0 if len(label_names) > MOST_TOLD else 90, va="center", fontsize=font)
    axes.set_xlabel("predicted", fontsize=14)
    axes.set_ylabel("true", fontsize=14)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


class HierarchicalClassifier(nn.Module):
    """The model with tensors in and logits out, as tracing needs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_chunks: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, num_chunks=num_chunks).logits


def _example(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    ids_NL = torch.full((4, 8), 3, device=device)
    return ids_NL, torch.ones_like(ids_NL), torch.tensor([2, 2], device=device)
