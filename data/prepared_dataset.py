"""A prepared data set on disk: tokenized splits (Arrow, memory-mapped) beside a manifest that says what they are.

`train`, `validation` and, where there is one, `test` hold id, text, label (a ClassLabel: its names are the ordered
labels), input_ids, token_start, token_end and token_break (see modeling/hierarchical_roberta/chunking.py); and evidence (JSON: spans of characters)
where the source says in which place the evidence stands.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
from transformers import PreTrainedTokenizerBase

from data.legacy_tensors import LEGACY_FILES, read_legacy
from data.tokenization import tokenizer_fingerprint
from modeling.hierarchical_roberta.chunking import coverage

MANIFEST = "manifest.json"


def describe(
    splits: datasets.DatasetDict, body_length: int, chunk_overlap: int, max_chunks: int
) -> dict[str, dict[str, Any]]:
    """For the manifest: counts by split and label, distribution of lengths, coverage under a chunk geometry."""
    about = {}
    for split, part in splits.items():
        names = part.features["label"].names
        counts = np.bincount(np.asarray(part["label"], dtype=np.int64), minlength=len(names))
        lengths = num_tokens_of(part)
        marks = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 0.95, 1])
        about[split] = {
            "documents": len(part),
            "labels": dict(zip(names, counts.tolist(), strict=True)),
            "tokens": dict(zip(("min", "25%", "median", "75%", "95%", "max"), marks.round().tolist(), strict=True)),
            "coverage": coverage(lengths, body_length, chunk_overlap, max_chunks),
        }
    return about


def num_tokens_of(part: datasets.Dataset) -> np.ndarray:
    """Flat tokens of each document, read from Arrow's offsets without touching the tokens."""
    import pyarrow.compute as pc

    table = part.with_format("arrow").select_columns(["input_ids"])[:]
    return pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder but its manifest and what is hidden."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path for path in files if not path.relative_to(folder).parts[0].startswith("."))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _joint_sha256(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def staging_path(folder: Path, role: str, process: int | str = "") -> Path:
    """A name for a hidden folder of this process's beside `folder`."""
    return folder.with_name(f".{folder.name}.{role}-{platform.node()}-{process or os.getpid()}")


def remove_stale_staging(folder: Path) -> None:
    """Delete what a process of this machine that was killed left beside `folder`; what it was replacing gets its name back."""
    for role in ("before", "partial", "documents"):
        for leftover in folder.parent.glob(staging_path(folder, role, "*").name):
            owner = leftover.name.rpartition("-")[2]
            # One with this process's own number is from before: in a container the numbers come again.
            if not owner.isdecimal() or (int(owner) != os.getpid() and psutil.pid_exists(int(owner))):
                continue
            if role == "before" and not folder.exists():
                leftover.rename(folder)
            shutil.rmtree(leftover, ignore_errors=True)


def save_prepared(splits: datasets.DatasetDict, folder: Path, manifest: dict[str, Any]) -> None:
    """Write splits and manifest under another name, and give them theirs when every byte is there.

    What stood in `folder` goes only then; the caller has made sure that it may.
    """
    partial = staging_path(folder, "partial")
    try:
        splits.save_to_disk(str(partial))
        files = {path.relative_to(partial).as_posix(): sha256_of(path) for path in files_of(partial)}
        fingerprint = _joint_sha256(digest for name, digest in files.items() if name.endswith(".arrow"))
        manifest = {**manifest, "data_fingerprint": fingerprint, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in partial.rglob("*"):
            _sync_to_disk(path)
        if folder.exists():
            before = staging_path(folder, "before")
            folder.rename(before)
            partial.rename(folder)
            shutil.rmtree(before)
        else:
            partial.rename(folder)
        _sync_to_disk(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def load_prepared(
    folder: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[datasets.DatasetDict, dict[str, Any]]:
    """Splits and manifest of a prepared folder, or of one with the older tensors (see `read_legacy`).

    Args:
        tokenizer: the one that the model will use; it must be the one that the data was tokenized with.

    Raises:
        ValueError: no prepared data there, files missing or changed, another tokenizer.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        if (path / LEGACY_FILES["train"]).is_file() and tokenizer is not None:
            splits = read_legacy(path, tokenizer)
            found = [path / name for name in LEGACY_FILES.values() if (path / name).is_file()]
            fingerprint = _joint_sha256(sha256_of(file) for file in found)
            return splits, {"sources": [{"name": folder}], "data_fingerprint": fingerprint}
        raise ValueError(
            f"{folder}: no prepared data set there ({'no ' + MANIFEST + ' in it' if path.is_dir() else 'no folder'}). "
            "Make one: python -m scripts.prepare_dataset --source FILE --tokenizer ENCODER --output_dir DIR."
        )
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        absent = [key for key in ("files", "tokenizer", "sources", "data_fingerprint") if key not in manifest]
    except ValueError:
        absent = ["all of it (it is not JSON)"]
    if absent:
        raise ValueError(f"{path / MANIFEST} lacks {', '.join(absent)}: prepare the data set again.")
    wrong = [
        f"{name} is {'not what it was' if (path / name).is_file() else 'missing'}"
        for name, digest in manifest["files"].items()
        if not (path / name).is_file() or sha256_of(path / name) != digest
    ]
    if wrong:
        raise ValueError(
            f"{folder} has changed since the data set was prepared: {', '.join(wrong[:3])}. Prepare it again."
        )
    if tokenizer is not None and manifest["tokenizer"]["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{folder} was tokenized with {manifest['tokenizer']['name']}, and the encoder's tokenizer "
            f"({tokenizer.name_or_path}) is another one: prepare the data with --tokenizer {tokenizer.name_or_path}."
        )
    return datasets.load_from_disk(folder), manifest
