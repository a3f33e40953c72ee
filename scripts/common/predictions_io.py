"""Atomic writing of prediction files."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from modeling.file_utils import atomic_write


def write_predictions(
    path: Path,
    documents: datasets.Dataset,
    labels: list[str],
    scores: np.ndarray,
    predicted_B: np.ndarray | None = None,
) -> None:
    """CSV with one row per document: id, label, predicted, and one score column per class.

    Args:
        predicted_B: class ids (None: those of the highest scores).
    """
    predicted_B = scores.argmax(axis=1) if predicted_B is None else predicted_B
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *labels])
        for id_, label, predicted, row in zip(documents["id"], documents["label"], predicted_B, scores, strict=True):
            writer.writerow([id_, labels[label], labels[predicted], *(f"{score:.6f}" for score in row)])


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
