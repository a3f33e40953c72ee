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
    predicted: np.ndarray | None = None,
) -> None:
    """CSV with one row per document: id, label, predicted, one score column per class, and the kept columns.

    Args:
        predicted: class ids (B,) (None: those of the highest scores), or whether a document has a label (B, K): then label
            and predicted are lists in JSON.
    """
    predicted = scores.argmax(axis=1) if predicted is None else predicted

    def shown(ids: Any) -> str:
        if predicted.ndim == 1:
            return labels[ids]
        return json.dumps([labels[k] for k in ids], ensure_ascii=False)

    predicted_ids = predicted if predicted.ndim == 1 else [np.flatnonzero(row) for row in predicted]
    kept = metadata_columns(documents)
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "predicted", *labels, *kept])
        rows = zip(documents["id"], documents["label"], predicted_ids, scores, *kept.values(), strict=True)
        for id_, label, found, row, *values in rows:
            writer.writerow([id_, shown(label), shown(found), *(f"{score:.6f}" for score in row), *values])


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
