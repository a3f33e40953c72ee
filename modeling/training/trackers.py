"""Experiment trackers (`report_to`): whether they are installed, and a figure of each evaluation.

The figure is the confusion matrix; with several labels a document, the F1, precision and recall of the most frequent labels.
Everything else reaches trackers through `Trainer.log`.

B documents, K labels, M of them in the figure.
"""

import warnings
from collections.abc import Callable
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_fscore_support
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ..hierarchical_roberta.decision import MultiLabelDecision
from .trainer import WeightedTrainer

warnings.filterwarnings("ignore", "Glyph .* missing from")  # characters of names that the font lacks
# Confusion matrix: maximum size in inches, and maximum number of labels for which cells are annotated.
MAX_INCHES, MAX_ANNOTATED = 15.0, 20
# Several labels a document: maximum number of labels in the figure, the most frequent ones; characters in a line of a name.
MOST_LABELS, LINE_WIDTH = 20, 30


def check_trackers(report_to: Any) -> None:
    """Raise ValueError for a tracker that is unknown or not installed."""
    get_reporting_integration_callbacks(report_to)  # unknown names
    if missing := sorted(set(report_to) - {*get_available_reporting_integrations(), "flyte", "azure_ml"}):
        raise ValueError(
            f"`report_to` names {', '.join(missing)}, which is not installed: install it (pip install {' '.join(missing)}), "
            "or leave it out."
        )


class FigureCallback(TrainerCallback):
    """Send a figure of each evaluation to each tracker that takes figures. Must be added after them."""

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
        logits_BK, labels = np.asarray(evaluation.predictions), np.asarray(evaluation.label_ids)
        if labels.ndim == 2:
            name, figure = "label_metrics", label_metrics_figure(logits_BK, labels, self.label_names)
        else:
            matrix = np.zeros((len(self.label_names), len(self.label_names)), dtype=int)
            np.add.at(matrix, (labels, logits_BK.argmax(axis=-1)), 1)
            name, figure = "confusion_matrix", confusion_figure(matrix, self.label_names)
        for callback, send in senders:
            send(callback, name, figure, state.global_step)


def _to_tensorboard(callback: Any, name: str, figure: Figure, step: int) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_figure(name, figure, step)
        callback.tb_writer.flush()


def _to_wandb(callback: Any, name: str, figure: Figure, step: int) -> None:
    import wandb

    wandb.log({f"eval/{name}": wandb.Image(_pixels(figure)), "train/global_step": step})


def _to_mlflow(callback: Any, name: str, figure: Figure, step: int) -> None:
    import mlflow

    mlflow.log_figure(figure, f"{name}/step_{step:06}.png")


def _to_trackio(callback: Any, name: str, figure: Figure, step: int) -> None:
    import trackio

    trackio.log({f"eval/{name}": trackio.Image(_pixels(figure)), "train/global_step": step})


def _pixels(figure: Figure) -> np.ndarray:
    """RGB image (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


SENDERS: dict[type[TrainerCallback], Callable[[Any, str, Figure, int], None]] = {
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


def label_metrics_figure(logits_BK: np.ndarray, labels_BK: np.ndarray, label_names: list[str]) -> Figure:
    """F1 (bars), precision and recall (points) of the most frequent labels, as training's metrics have them: at a score of 0.5
    before calibration."""
    most_M = np.argsort(-labels_BK.sum(axis=0), kind="stable")[:MOST_LABELS]
    labels_BM, predicted_BM = (
        labels_BK[:, most_M].astype(int),
        MultiLabelDecision().decide(logits_BK[:, most_M]).astype(int),
    )
    precision_M, recall_M, f1_M, support_M = precision_recall_fscore_support(
        labels_BM, predicted_BM, average=None, zero_division=0
    )
    wrapped = [wrap(label_names[k], LINE_WIDTH) for k in most_M]
    names = [plain("\n".join(lines[:2])) + ("…" if lines[2:] else "") for lines in wrapped]
    rows = np.arange(len(names))
    figure = Figure(figsize=(12, 2.6 + 0.6 * len(names)), dpi=90, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(rows, f1_M, height=0.62, color="#a9c7e8", label="F1")
    axes.hlines(rows, precision_M, recall_M, color="#1b2a41", linewidth=1)
    # Of different sizes, so that both are seen where they are equal.
    points: dict[str, Any] = {"linestyle": "none", "clip_on": False, "markeredgecolor": "#1b2a41"}
    [precision] = axes.plot(precision_M, rows, marker="D", markersize=12, color="white", label="precision", **points)
    [recall] = axes.plot(recall_M, rows, marker="o", markersize=7, color="#c8501e", label="recall", **points)
    axes.set_yticks(rows, [f"{name} ({count:,})" for name, count in zip(names, support_M, strict=True)], fontsize=14)
    axes.secondary_yaxis("right").set_yticks(rows, [f"{f1:.2f}" for f1 in f1_M], fontsize=14)
    for each in (axes, *axes.child_axes):
        each.tick_params(axis="y", length=0, pad=12)
        each.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=14)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("F1 (also on the right), precision and recall, at a score of 0.5 before calibration", fontsize=14)
    is_cut = len(names) < len(label_names)
    figure.suptitle(
        (f"The {len(names)} most frequent of {len(label_names):,} labels" if is_cut else "All labels")
        + f"\nin parentheses: validation documents that have the label, of {len(labels_BK):,}",
        fontsize=14,
    )
    figure.legend(handles=[bars, precision, recall], loc="outside lower center", ncols=3, fontsize=14, frameon=False)
    return figure
