"""Labels of documents: one of them each, or several (multi-label: any number, also none).

B documents, K labels.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

SINGLE, MULTI = PROBLEM_TYPES = ("single_label_classification", "multi_label_classification")
TRUE, FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")


def split_labels(value: Any, separator: str | None) -> list[Any] | None:
    """The labels in a cell of several: a list, a JSON list as text, or with a separator a text; None if it is missing.

    Raises:
        ValueError: neither.

    >>> split_labels("drugs; violence", ";"), split_labels('["drugs"]', None), split_labels("", ";")
    (['drugs', ' violence'], ['drugs'], [])
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | set):
        return list(value)
    if separator is not None and isinstance(value, str):
        if re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", value.strip(), re.DOTALL):
            raise ValueError(
                f"expected labels separated by {separator!r}, got a list: {value[:60]}; leave --label_separator out"
            )
        return [part for part in value.split(separator) if part.strip()]
    if value is None or value == "":
        return None
    try:
        labels = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        labels = None
    if not isinstance(labels, list):
        raise ValueError(
            f'expected a list of labels such as ["a", "b"], got {str(value)[:60]!r}; for labels in one text set '
            "--label_separator, for one column a label --label_columns"
        )
    return labels


def marked_labels(values: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The names of the columns that are 1, of columns of 0 and 1.

    Raises:
        ValueError: a column has another value.
    """
    value_of = {name: str(values[name]).strip().lower() for name in names}
    for name, value in value_of.items():
        if value not in (*TRUE, *FALSE):
            raise ValueError(f"expected 0 or 1 in the column {name!r}, got {values[name]!r}")
    return [name for name, value in value_of.items() if value in TRUE]


def renamed(label: str | list[str], names: Mapping[str, str]) -> str | list[str]:
    """A document's label or labels, with other names for some."""
    if isinstance(label, str):
        return names.get(label, label)
    return list(dict.fromkeys(names.get(name, name) for name in label))


def class_labels(features: Mapping[str, Any]) -> dict[str, datasets.ClassLabel]:
    """The columns that are ids of named classes, or lists of them."""
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {name: feature for name, feature in inner.items() if isinstance(feature, datasets.ClassLabel)}


def label_names(part: datasets.Dataset) -> list[str]:
    """Names of the labels of a prepared split, in order."""
    return class_labels(part.features)["label"].names


def is_multi_label(part: datasets.Dataset) -> bool:
    return isinstance(part.features["label"], datasets.List)


def label_feature(names: Sequence[str], problem_type: str) -> Any:
    """The feature `label` of a prepared split: an id, or a list of ids."""
    feature = datasets.ClassLabel(names=list(names))
    return feature if problem_type == SINGLE else datasets.List(feature)


def label_rows(part: datasets.Dataset) -> pd.DataFrame:
    """A row for each label of a document: row (of the document) and label (its id)."""
    column = part.select_columns(["label"]).with_format("arrow")[:]["label"]
    rows = np.arange(len(part))
    if is_multi_label(part):
        rows, column = np.repeat(rows, pc.list_value_length(column).to_numpy()), pc.list_flatten(column)
    return pd.DataFrame({"row": rows, "label": column.to_numpy().astype(np.int64)})


def label_array(part: datasets.Dataset) -> np.ndarray:
    """Labels of a prepared split: ids (B,) int64, or for several labels 0 and 1 (B, K) int8."""
    rows = label_rows(part)
    if not is_multi_label(part):
        return rows["label"].to_numpy()
    label_BK = np.zeros((len(part), len(label_names(part))), dtype=np.int8)
    label_BK[rows["row"], rows["label"]] = 1
    return label_BK


def labels_together(label_BK: np.ndarray, most: int = 50) -> list[tuple[int, int, int]]:
    """Pairs of labels (ids) and the documents that have both, the most frequent first."""
    sparse_BK = sparse.csr_matrix(label_BK, dtype=np.int64)
    both = sparse.triu(sparse_BK.T @ sparse_BK, k=1).tocoo()
    order = np.argsort(-both.data, kind="stable")[:most]
    return [(int(both.row[i]), int(both.col[i]), int(both.data[i])) for i in order]


def shown_labels(label: int | Sequence[int], names: Sequence[str]) -> str:
    """The name of a document's label, or those of its labels, for people."""
    if isinstance(label, int):
        return names[label]
    return ", ".join(names[i] for i in label) or "none"


def label_counts(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Documents of each label, (K,), from ids (B,) or from 0 and 1 (B, K)."""
    return labels.sum(axis=0, dtype=np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=num_labels)


def label_sets(labels: Sequence[Any]) -> list[list[Any]]:
    """The labels of each document, from the column `label`: names, or ids of a prepared split."""
    return [label if isinstance(label, list) else [label] for label in labels]


def label_ids(column: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
    """Names of labels, or lists of them, as ids."""
    ids = {name: i for i, name in enumerate(names)}
    return pa.array(
        [ids[label] if isinstance(label, str) else sorted(ids[name] for name in label) for label in column.to_pylist()]
    )
