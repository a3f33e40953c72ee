"""Experiment trackers (`report_to`): whether they are installed, and a confusion matrix for each evaluation.

Everything else reaches them through `Trainer.log`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from .trainer import WeightedTrainer

# Confusion matrix: maximum size in inches, and maximum number of labels for which cells are annotated.
MAX_INCHES, MAX_ANNOTATED = 15.0, 20


def check_trackers(report_to: Any) -> None:
    """Raise ValueError for a tracker that is unknown or not installed."""
    get_reporting_integration_callbacks(report_to)  # unknown names
    if missing := sorted(set(report_to) - {*get_available_reporting_integrations(), "flyte", "azure_ml"}):
        raise ValueError(
            f"`report_to` names {', '.join(missing)}, which is not installed: install it (pip install {' '.join(missing)}), "
            "or leave it out."
        )


class ConfusionMatrixCallback(TrainerCallback):
    """Send a figure of the confusion matrix to each tracker that takes figures. Must be added after them."""

    def __init__(self, trainer: WeightedTrainer, label_names: list[str]):
        self.trainer, self.label_names = trainer, label_names

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        evaluation = self.trainer.last_evaluation
        if not state.is_world_process_zero or evaluation is None or evaluation.label_ids is None:
            return
        senders = [
            (callback, send)
            for callback in self.trainer.callback_handler.callbacks
            for kind, send in SENDERS.items()
            if isinstance(callback, kind)
        ]
        if not senders:
            return
        matrix = np.zeros((len(self.label_names), len(self.label_names)), dtype=int)
        np.add.at(matrix, (np.asarray(evaluation.label_ids), np.asarray(evaluation.predictions).argmax(axis=-1)), 1)
        figure = confusion_figure(matrix, self.label_names)
        for callback, send in senders:
            send(callback, figure, state.global_step)


def _to_tensorboard(callback: Any, figure: Figure, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_figure("confusion_matrix", figure, step)
        callback.tb_writer.flush()


def _to_wandb(callback: Any, figure: Figure, step: int) -> None:
    import wandb

    wandb.log({"eval/confusion_matrix": wandb.Image(_pixels(figure)), "train/global_step": step})


def _to_mlflow(callback: Any, figure: Figure, step: int) -> None:
    import mlflow

    mlflow.log_figure(figure, f"confusion_matrix/step_{step:06}.png")


def _to_trackio(callback: Any, figure: Figure, step: int) -> None:
    import trackio

    trackio.log({"eval/confusion_matrix": trackio.Image(_pixels(figure)), "train/global_step": step})


def _pixels(figure: Figure) -> np.ndarray:
    """RGB image (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


SENDERS: dict[type[TrainerCallback], Callable[[Any, Figure, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    WandbCallback: _to_wandb,
    MLflowCallback: _to_mlflow,
    TrackioCallback: _to_trackio,
}


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
