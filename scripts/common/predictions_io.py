"""Prediction files: written atomically, and read.

B documents, K labels.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from data.documents import shorten
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
        for id_, label, predicted_own, row, *values in rows:
            writer.writerow([id_, shown(label), shown(predicted_own), *(f"{score:.6f}" for score in row), *values])


class PredictedDocument(NamedTuple):
    """A row of a prediction file: label and predicted as they stand there, and the scores (K,)."""

    label: str
    predicted: str
    scores_K: np.ndarray


def read_predictions(path: Path, labels: Sequence[str]) -> dict[str, PredictedDocument]:
    """The rows of a prediction file by id.

    Raises:
        ValueError: its labels are others, or it is cut.
    """
    with open(path, encoding="utf-8", newline="") as file:
        # By position: a label or a kept column may have any name.
        header, *rows = list(csv.reader(file)) or [[]]
    if header[3 : 3 + len(labels)] != list(labels):
        raise ValueError(f"{path} is not of a model with these labels: {shorten(labels, 20)}.")
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"{path} is cut: a row has fewer columns than the header.")
    scores_BK = np.array([row[3 : 3 + len(labels)] for row in rows], dtype=np.float64)
    return {row[0]: PredictedDocument(row[1], row[2], scores_K) for row, scores_K in zip(rows, scores_BK, strict=True)}


def label_codes(cells: Sequence[str], labels: Sequence[str], is_multi_label: bool) -> np.ndarray:
    """Labels or predictions of a prediction file as class ids (B,), or with several labels a document as whether it has each,
    (B, K)."""
    id_of = {name: k for k, name in enumerate(labels)}
    if not is_multi_label:
        return np.array([id_of[cell] for cell in cells], dtype=np.int64)
    codes_BK = np.zeros((len(cells), len(labels)), dtype=bool)
    for row, cell in enumerate(cells):
        codes_BK[row, [id_of[name] for name in json.loads(cell)]] = True
    return codes_BK


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
