"""Atomic writing of prediction files."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from modeling.file_utils import atomic_write


def write_predictions(path: Path, documents: datasets.Dataset, labels: list[str], scores: np.ndarray) -> None:
    """CSV with one row per document: id, label, predicted, and one score column per class."""
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *labels])
        for id_, label, row in zip(documents["id"], documents["label"], scores, strict=True):
            writer.writerow([id_, labels[label], labels[int(row.argmax())], *(f"{score:.6f}" for score in row)])


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
