"""Figures of the report, as PNG."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from modeling.training.calibration import reliability
from modeling.training.trackers import confusion_figure

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # labels may contain dollar signs
warnings.filterwarnings("ignore", "Glyph .* missing from")  # and characters that the font lacks
# Okabe and Ito's palette, distinguishable by colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _axes(x: str, y: str, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.6 * columns, 3.8))
    axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for each in axes:
        each.set_xlabel(x)
        each.set_ylabel(y)
        each.grid(alpha=0.3)
    return figure, axes


def confusion_png(confusion_KK: np.ndarray, names: list[str]) -> bytes:
    """Confusion matrix: counts, shaded by their share of the label."""
    return _png(confusion_figure(confusion_KK, names))


def curves_figure(scores_BK: np.ndarray, labels_B: np.ndarray, names: Sequence[str]) -> bytes:
    """Precision-recall and ROC curves, one class against the rest."""
    return label_curves_figure(scores_BK, labels_B[:, None] == np.arange(len(names)), names)


def label_curves_figure(scores_BK: np.ndarray, labels_BK: np.ndarray, names: Sequence[str]) -> bytes:
    """Precision-recall and ROC curves of labels, of which a document may have several."""
    figure, [left, right] = _axes("", "", columns=2)
    for k, name in enumerate(names):
        is_class = labels_BK[:, k] == 1
        if not 0 < is_class.sum() < len(is_class):
            continue
        line = {"color": COLOURS[k % len(COLOURS)], "linestyle": STYLES[k % len(STYLES)]}
        precision, recall, _ = precision_recall_curve(is_class, scores_BK[:, k])
        left.plot(recall, precision, label=name, **line)
        false, true, _ = roc_curve(is_class, scores_BK[:, k])
        right.plot(false, true, label=f"{name} (AUC {auc(false, true):.2f})", **line)
    right.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    right.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.02))
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return _png(figure)


def reliability_figure(before_BK: np.ndarray, after_BK: np.ndarray, labels_B: np.ndarray) -> bytes:
    """Reliability diagram before and after temperature scaling; the size of a point is its share of the documents."""
    bins = [reliability(scores_BK, labels_B) for scores_BK in (before_BK, after_BK)]
    return _reliability_figure(bins, "before temperature scaling", "confidence", "accuracy")


def label_reliability_figure(
    before: list[tuple[float, float, float]], after: list[tuple[float, float, float]]
) -> bytes:
    """Reliability diagram of the scores of labels, from `binary_reliability` before and after calibration."""
    return _reliability_figure([before, after], "before calibration", "score", "share that has the label")


def _reliability_figure(bins: list[list[tuple[float, float, float]]], before: str, x: str, y: str) -> bytes:
    figure, [axes] = _axes(x, y)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for k, (name, points) in enumerate(zip((before, "after"), bins, strict=True)):
        confidence, accuracy, share = zip(*points, strict=True)
        sizes = 30 + 300 * np.array(share)
        axes.plot(confidence, accuracy, color=COLOURS[k], linestyle=STYLES[k], linewidth=1)
        axes.scatter(confidence, accuracy, s=sizes, color=COLOURS[k], alpha=0.7, marker="os"[k], label=name)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
    axes.legend(loc="upper left")
    return _png(figure)


def abstain_figure(curve: list[dict[str, float]]) -> bytes:
    """Accuracy against coverage, the share of documents classified by the model."""
    figure, [axes] = _axes("coverage (share classified by the model)", "accuracy on these documents")
    axes.plot([row["kept_share"] for row in curve], [row["accuracy"] for row in curve], color=COLOURS[0], marker=".")
    axes.set(xlim=(1.02, 0), ylim=(min(0.5, min(row["accuracy"] for row in curve)) - 0.02, 1.02))
    return _png(figure)


def faithfulness_figure(faithfulness: dict[str, Any], unit: str) -> bytes:
    """Deletion and insertion curves of the predicted label's probability."""
    figure, axes = _axes(f"{unit} deleted", "probability of the predicted label", columns=2)
    curves = faithfulness["curves"]
    for k, kind in enumerate(("deletion", "insertion")):
        axes[k].plot(curves["at"], curves[kind], color=COLOURS[0], label="strongest first")
        axes[k].plot(curves["at"], curves[f"{kind}_random"], color=COLOURS[2], linestyle="--", label="random order")
        axes[k].set(ylim=(0, 1.02))
        axes[k].legend()
    axes[1].set_xlabel(f"{unit} kept")
    return _png(figure)


def learning_curves_figure(histories: dict[str, list[dict[str, Any]]]) -> bytes:
    """Training loss (dotted), validation loss and validation macro-F1 of each run, by epoch."""
    figure, [left, right] = _axes("epoch", "loss", columns=2)
    right.set_ylabel("validation macro-F1")
    for k, (name, epochs) in enumerate(histories.items()):
        line = {"color": COLOURS[k % len(COLOURS)], "marker": "."}
        at = [epoch["epoch"] for epoch in epochs]
        left.plot(at, [epoch["train_loss"] for epoch in epochs], linewidth=0.8, linestyle=":", **line)
        left.plot(at, [epoch["eval_loss"] for epoch in epochs], label=name, **line)
        right.plot(at, [epoch.get("eval_f1_macro") for epoch in epochs], label=name, **line)
    figure.set_layout_engine("constrained")
    left.set_title("validation loss; dotted: training", fontsize=10)
    right.legend(fontsize=8)
    return _png(figure)
