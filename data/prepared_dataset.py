"""Prepared datasets on disk: tokenized splits (Arrow, memory-mapped) and a manifest describing them.

`train`, `validation` and optionally `test` have the columns id, text, label (a ClassLabel with ordered label names, or a list
of them where a document may have several),
input_ids, token_start, token_end, token_break (see modeling/hierarchical_roberta/chunking.py), and where the source has them
the JSON columns evidence (character spans of the gold evidence), metadata (the columns to keep) and sections (places in the
text, see `Section`).
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
from transformers import PreTrainedTokenizerBase

from data.labels import is_multi_label, label_array, label_counts, label_names, labels_together
from data.legacy_tensors import LEGACY_FILES, read_legacy
from data.tokenization import tokenizer_fingerprint
from modeling.file_utils import sync_to_disk
from modeling.hierarchical_roberta.chunking import coverage

MANIFEST = "manifest.json"
REPORT = "dataset_report.html"


def describe(
    splits: datasets.DatasetDict, body_length: int, chunk_overlap: int, max_chunks: int
) -> dict[str, dict[str, Any]]:
    """Statistics for the manifest: counts by split and label, length quantiles, and coverage under a chunk geometry."""
    statistics = {}
    for split, part in splits.items():
        names = label_names(part)
        counts = label_counts(label_array(part), len(names))
        lengths = num_tokens_of(part)
        quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1])
        statistics[split] = {
            "documents": len(part),
            "labels": dict(zip(names, counts.tolist(), strict=True)),
            **(describe_several(label_array(part), names) if is_multi_label(part) else {}),
            "tokens": dict(zip(("min", "25%", "median", "75%", "95%", "max"), quantiles.round().tolist(), strict=True)),
            "coverage": coverage(lengths, body_length, chunk_overlap, max_chunks),
        }
    return statistics


def describe_several(label_BK: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Labels of a document (number of documents by number of labels), and the pairs that occur together most often."""
    numbers, counts = np.unique(label_BK.sum(axis=1, dtype=np.int64), return_counts=True)
    return {
        "labels_of_a_document": dict(zip(map(str, numbers.tolist()), counts.tolist(), strict=True)),
        "labels_together": [(names[first], names[second], both) for first, second, both in labels_together(label_BK)],
    }


def num_tokens_of(part: datasets.Dataset) -> np.ndarray:
    """Number of tokens of each document, read from Arrow's offsets without loading the tokens."""
    import pyarrow.compute as pc

    table = part.with_format("arrow").select_columns(["input_ids"])[:]
    return pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)


def files_of(folder: Path) -> list[Path]:
    """All files of a folder except its manifest and hidden files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path for path in files if not path.relative_to(folder).parts[0].startswith("."))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint_sha256(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def staging_path(folder: Path, role: str, process: int | str = "") -> Path:
    """Hidden sibling of `folder`, specific to this host and process."""
    return folder.with_name(f".{folder.name}.{role}-{platform.node()}-{process or os.getpid()}")


def remove_stale_staging(folder: Path) -> None:
    """Delete staging folders of killed processes of this host next to `folder`; restore a dataset being replaced."""
    for role in ("before", "partial", "documents"):
        for leftover in folder.parent.glob(staging_path(folder, role, "*").name):
            owner = leftover.name.rpartition("-")[2]
            # A folder with this process's own id is stale: containers reuse process ids.
            if not owner.isdecimal() or (int(owner) != os.getpid() and psutil.pid_exists(int(owner))):
                continue
            if role == "before" and not folder.exists():
                leftover.rename(folder)
            shutil.rmtree(leftover, ignore_errors=True)


def save_prepared(
    splits: datasets.DatasetDict,
    folder: Path,
    manifest: dict[str, Any],
    write_report: Callable[[Path], None] | None = None,
) -> None:
    """Write splits, manifest and report to a staging folder, flush them to disk and rename it to `folder`.

    An existing `folder` is replaced; the caller has checked that this is allowed. `write_report` writes the report to a
    path (see data/dataset_report.py).
    """
    partial = staging_path(folder, "partial")
    try:
        splits.save_to_disk(str(partial))
        files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in files_of(partial)}
        fingerprint = _joint_sha256(digest for name, digest in files.items() if name.endswith(".arrow"))
        manifest = {**manifest, "data_fingerprint": fingerprint, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if write_report is not None:  # after the list of files: it is no data, and may be edited or deleted
            write_report(partial / REPORT)
        for path in partial.rglob("*"):
            sync_to_disk(path)
        if folder.exists():
            previous = staging_path(folder, "before")
            folder.rename(previous)
            partial.rename(folder)
            shutil.rmtree(previous)
        else:
            partial.rename(folder)
        sync_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_prepared(
    folder: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Load splits and manifest of a prepared dataset, or of a folder in the legacy tensor format (see `read_legacy`).

    Args:
        tokenizer: the model's tokenizer, which must match the one used for preparation.

    Raises:
        ValueError: no prepared dataset, missing or modified files, or a different tokenizer.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        if (path / LEGACY_FILES["train"]).is_file() and tokenizer is not None:
            splits = read_legacy(path, tokenizer)
            files = [path / name for name in LEGACY_FILES.values() if (path / name).is_file()]
            fingerprint = _joint_sha256(sha256_of(file) for file in files)
            return splits, {"sources": [{"name": folder}], "data_fingerprint": fingerprint}
        raise ValueError(
            f"{folder} is not a prepared dataset: {'it has no ' + MANIFEST if path.is_dir() else 'no such directory'}. "
            "Create one with python -m scripts.prepare_dataset --source FILE --tokenizer ENCODER --output_dir DIR."
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        absent = [key for key in ("files", "tokenizer", "sources", "data_fingerprint") if key not in manifest]
    except ValueError:
        absent = ["all keys (it is not valid JSON)"]
    if absent:
        raise ValueError(f"{path / MANIFEST} lacks {', '.join(absent)}: prepare the dataset again.")
    invalid = [
        f"{name} is {'modified' if (path / name).is_file() else 'missing'}"
        for name, digest in manifest["files"].items()
        if not (path / name).is_file() or sha256_of(path / name) != digest
    ]
    if invalid:
        raise ValueError(f"{folder} has changed since it was prepared: {', '.join(invalid[:3])}. Prepare it again.")
    if tokenizer is not None and manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{folder} was tokenized with {manifest['tokenizer']['name']}, which differs from the encoder's tokenizer "
            f"({tokenizer.name_or_path}): prepare the data with --tokenizer {tokenizer.name_or_path}."
        )
    return datasets.load_from_disk(folder), manifest
