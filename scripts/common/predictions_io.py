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
    """CSV with one row per document: id, label, predicted, one score column per class, and the kept columns.

    Args:
        predicted_B: class ids (None: those of the highest scores).
    """
    predicted_B = scores.argmax(axis=1) if predicted_B is None else predicted_B
    kept = metadata_columns(documents)
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *labels, *kept])
        rows = zip(documents["id"], documents["label"], predicted_B, scores, *kept.values(), strict=True)
        for id_, label, predicted, row, *values in rows:
            writer.writerow([id_, labels[label], labels[predicted], *(f"{score:.6f}" for score in row), *values])


def metadata_columns(documents: datasets.Dataset) -> dict[str, list[Any]]:
    """The values of each kept column (`--keep_columns`); {} without any."""
    if "metadata" not in documents.column_names:
        return {}
    rows = [json.loads(metadata or "{}") for metadata in documents["metadata"]]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
