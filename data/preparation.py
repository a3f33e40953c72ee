"""Dataset preparation: source → validated, split and tokenized dataset on disk."""

import dataclasses
import glob
import json
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from data.dataset_checks import MAX_UNKNOWN
from data.dataset_report import MAX_PAIRS, DuplicatePair, write_dataset_report
from data.deduplication import near_duplicates
from data.documents import (
    DESCRIPTIONS,
    NUMBER,
    Columns,
    DataIssues,
    check_decisions,
    look_alike_key,
    read_documents,
    shorten,
    to_label,
)
from data.labels import SINGLE, label_names, label_sets
from data.legacy_tensors import LEGACY_FILES, read_legacy
from data.prepared_dataset import (
    MANIFEST,
    describe,
    files_of,
    remove_stale_staging,
    save_prepared,
    sha256_of,
    staging_path,
)
from data.readers import ReadOptions, Source
from data.source_files import SPLITS, describe_unread
from data.splits import split_documents, without_leaks
from data.tokenization import load_tokenizer, tokenize_documents, tokenizer_fingerprint, unknown_token_share
from modeling.hierarchical_roberta.chunking import special_token_frame


def prepare_dataset(
    source: str | Sequence[str],
    tokenizer: str,
    output_dir: Path,
    *,
    columns: Columns | None = None,
    labels: Sequence[str] | None = None,
    split_fractions: Sequence[float] = (0.8, 0.1, 0.1),
    validation_from_train: float = 0.0,
    duplicate_threshold: float = 0.8,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    merge_labels: bool = False,
    read_options: ReadOptions | None = None,
    num_proc: int = 1,
    seed: int = 42,
    chunk_length: int = 512,
    chunk_overlap: int = 0,
    max_chunks: int = 20,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read, validate, split, tokenize and save a dataset; return its manifest.

    Args:
        source: one or more files, folders, patterns or archives, or a dataset on the hub (see data/source_files.py).
        tokenizer: hub name or folder of the encoder whose tokenizer is used.
        columns: column names of the source.
        labels: labels in order (None: the order of the source, else sorted by name).
        split_fractions, validation_from_train, duplicate_threshold: see `split_documents`.
        drop, keep: problems (`data.documents.PROBLEMS`) whose rows are dropped or kept.
        merge_labels: count labels that look alike as one (see `look_alike_key`).
        read_options: how files are read.
        num_proc: number of tokenization processes.
        seed: seed of the splits.
        chunk_length, chunk_overlap, max_chunks: chunk geometry of the coverage statistics in the manifest.
        overwrite: replace a prepared dataset in output_dir.

    Raises:
        ValueError: invalid source, rows, labels, splits or geometry, or a folder that may not be replaced.
    """
    check_decisions(drop, keep)
    sources = [source] if isinstance(source, str) else list(source)
    labels = [to_label(label) for label in labels] if labels else None
    if labels and len(set(labels)) != len(labels):
        raise ValueError(f"--labels must be unique, got {','.join(labels)}.")
    if num_proc < 1:
        raise ValueError(f"--num_proc must be at least 1, got {num_proc}.")
    output_dir = output_dir.resolve()
    check_output_dir(output_dir, overwrite)
    loaded = load_tokenizer(tokenizer)
    fingerprint = tokenizer_fingerprint(loaded)
    body_length = check_geometry(loaded, chunk_length, chunk_overlap, max_chunks)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_staging(output_dir)
    workspace = staging_path(output_dir, "documents")
    workspace.mkdir()
    try:
        unread, pairs = [], []
        if (Path(sources[0]) / LEGACY_FILES["train"]).is_file():
            if len(sources) > 1:
                raise ValueError(f"{sources[0]}: a folder with {LEGACY_FILES['train']} must be the only --source.")
            splits, issues = check_legacy(read_legacy(Path(sources[0]), loaded, labels), drop, keep)
        else:
            columns = columns or Columns()
            rows = Source(sources, dataclasses.replace(read_options or ReadOptions(), text_columns=columns.texts))
            stored = [] if labels or columns.label_columns else rows.label_names(columns.label) or []
            stored = list(map(to_label, stored))
            documents, issues = read_documents(
                rows, columns, labels or stored, drop, keep, merge_labels, cache_dir=str(workspace)
            )
            unread = list(rows.found.unread)
            labels = labels or stored or _named_labels(columns, documents)
            if len(labels) < 2:
                found = f"a single label ({labels[0]!r})" if labels else "no label in any document"
                place = f"The column {columns.label!r} has" if not columns.label_columns else "--label_columns names"
                raise ValueError(f"{place} {found}; expected at least two labels.")
            split_of = split_documents(
                documents, issues, split_fractions, seed, validation_from_train, duplicate_threshold
            )
            splits = tokenize_splits(documents, split_of, loaded, labels, num_proc, columns.problem_type)
            pairs = duplicate_pairs(documents, split_of, issues)
        manifest = {
            "sources": [describe_source(name) for name in sources],
            "unread_files": unread,
            "problem_type": SINGLE if columns is None else columns.problem_type,
            "labels": label_names(splits["train"]),
            "tokenizer": {"name": tokenizer, "fingerprint": fingerprint},
            "unknown_token_share": unknown_token_share(splits, loaded),
            "seed": seed,
            "options": describe_options(
                columns=columns,
                read_options=read_options,
                split_fractions=split_fractions,
                validation_from_train=validation_from_train,
                duplicate_threshold=duplicate_threshold,
                drop=drop,
                keep=keep,
                merge_labels=merge_labels,
            ),
            "findings": {p: {"decision": issues.decisions[p], "rows": rows} for p, rows in issues.rows.items()},
            "geometry_of_coverage": {
                "chunk_length": chunk_length,
                "chunk_overlap": chunk_overlap,
                "max_chunks": max_chunks,
            },
            "splits": describe(splits, body_length, chunk_overlap, max_chunks),
            "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
            | {"python": platform.python_version()},
        }
        save_prepared(
            splits,
            output_dir,
            manifest,
            lambda path: write_dataset_report(path, splits, manifest, loaded, pairs, len(issues.pairs)),
        )
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def sorted_labels(labels: Sequence[str] | Sequence[list[str]]) -> list[str]:
    """Sort the labels, numeric ones as numbers, and print the order, which kappa and severity depend on."""

    def key(name: str) -> tuple[bool, float, str]:
        is_number = NUMBER.fullmatch(name) is not None
        return (not is_number, float(name) if is_number else 0.0, name)

    names = sorted({name for own in label_sets(labels) for name in own}, key=key)
    if labels and isinstance(labels[0], str):
        print(
            f"Labels, sorted by name: {', '.join(names)}. If they have a different order, set it with --labels: kappa and "
            "the severity weights depend on it."
        )
    return names


def tokenize_splits(
    documents: datasets.Dataset,
    split_of: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    num_proc: int,
    problem_type: str,
) -> datasets.DatasetDict:
    """Tokenize the documents of each split, omitting those with the split ""."""
    splits = {}
    optional = [name for name in ("evidence", "metadata", "sections") if any(documents[name])]
    for split in SPLITS:
        rows = [index for index, name in enumerate(split_of) if name == split]
        if rows:
            part = documents.select(rows)
            splits[split] = tokenize_documents(part, tokenizer, labels, num_proc, split, optional, problem_type)
    return datasets.DatasetDict(splits)


def duplicate_pairs(documents: datasets.Dataset, split_of: Sequence[str], issues: DataIssues) -> list[DuplicatePair]:
    """The first of the near-duplicates and leaks, with their texts."""
    pairs = []
    for problem, i, j in issues.pairs[:MAX_PAIRS]:
        first, second = documents[i], documents[j]
        splits, texts = (split_of[i], split_of[j]), (first["text"], second["text"])
        pairs.append(DuplicatePair(first["id"], second["id"], *splits, *texts, problem))
    return pairs


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raise ValueError if `output_dir` contains something that may not be replaced."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not (output_dir / MANIFEST).is_file():
        raise ValueError(f"{output_dir} already exists and is not a prepared dataset: choose another folder.")
    if not overwrite:
        raise ValueError(f"{output_dir} already exists: choose another folder or replace it with --overwrite.")


def check_legacy(
    splits: datasets.DatasetDict, drop: Sequence[str], keep: Sequence[str]
) -> tuple[datasets.DatasetDict, DataIssues]:
    """Validate documents in the legacy tensor format: empty texts, and leaks across splits."""
    issues = DataIssues(decisions=dict.fromkeys(drop, "dropped") | dict.fromkeys(keep, "kept"))
    combined = datasets.concatenate_datasets(list(splits.values()))
    split_of = [split for split, part in splits.items() for _ in part]
    empty = {index for index, text in enumerate(combined["text"]) if not text.strip()}
    for index in sorted(empty):
        issues.add("empty", combined[index]["id"])
    issues.raise_if_unresolved()
    kept = without_leaks(combined["id"], [""] * len(combined), split_of, near_duplicates(combined["text"]), issues)
    if issues.decisions.get("empty") == "dropped":
        kept = ["" if index in empty else split for index, split in enumerate(kept)]
    selected = {split: [index for index, name in enumerate(kept) if name == split] for split in splits}
    return datasets.DatasetDict({split: combined.select(rows) for split, rows in selected.items()}), issues


def check_geometry(tokenizer: PreTrainedTokenizerBase, chunk_length: int, chunk_overlap: int, max_chunks: int) -> int:
    """Validate the chunk geometry; return the tokens of a chunk excluding special tokens."""
    body_length = chunk_length - sum(map(len, special_token_frame(tokenizer)))
    if not 0 <= chunk_overlap < body_length:
        raise ValueError(
            f"`chunk_overlap` ({chunk_overlap}) must be below `chunk_length` minus the special tokens "
            f"({body_length}): lower it or raise `chunk_length`."
        )
    if max_chunks < 1:
        raise ValueError(f"`max_chunks` must be at least 1, got {max_chunks}.")
    return body_length


def _named_labels(columns: Columns, documents: datasets.Dataset) -> list[str]:
    """Labels in order: those of columns of 0 and 1, less those that only look like one that occurs; otherwise those that occur, sorted."""
    occurring = sorted_labels(documents["label"])
    names, keys = set(occurring), set(map(look_alike_key, occurring))
    marked = dict.fromkeys(map(to_label, columns.label_columns))
    return [name for name in marked if name in names or look_alike_key(name) not in keys] or occurring


def describe_options(columns: Columns | None, read_options: ReadOptions | None, **others: Any) -> dict[str, Any]:
    """The options that the documents of a prepared dataset depend on, as JSON has them."""
    options = {
        "columns": dataclasses.asdict(columns or Columns()),
        "read_options": dataclasses.asdict(read_options or ReadOptions()),
    }
    return json.loads(json.dumps(options | others))


def describe_source(source: str) -> dict[str, Any]:
    """Name and, for a file, size and sha256, to detect later changes."""
    path = Path(source)
    if not path.exists() and glob.has_magic(source):
        files = [describe_source(name) for name in sorted(glob.glob(source, recursive=True))]
        return {"name": path.name, "files": files}
    if path.is_file():
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if path.is_dir():
        return {"name": path.resolve().name, "bytes": sum(file.stat().st_size for file in files_of(path))}
    return {"name": source, "is_on_hub": True}


def preparation_summary(manifest: dict[str, Any]) -> str:
    """Human-readable summary of a manifest."""
    lines = [unread] if (unread := describe_unread(manifest.get("unread_files", []))) else []
    for problem, issue in manifest["findings"].items():
        lines.append(
            f"{len(issue['rows'])} with {DESCRIPTIONS[problem]}: {issue['decision']}: {shorten(issue['rows'])}"
        )
    for split, statistics in manifest["splits"].items():
        counts = shorten([f"{label} {count}" for label, count in statistics["labels"].items()], 20)
        tokens, coverage = statistics["tokens"], statistics["coverage"]
        lines.append(
            f"{split}: {statistics['documents']} documents ({counts}); tokens: median {tokens['median']:.0f}, max "
            f"{tokens['max']:.0f}; beyond max_chunks: {coverage['documents_cut_share']:.1%} of documents, "
            f"{coverage['tokens_cut_share']:.1%} of tokens"
        )
    if (share := manifest.get("unknown_token_share", 0.0)) > MAX_UNKNOWN:
        lines.append(
            f"Warning: {share:.1%} of the tokens are unknown to the tokenizer of {manifest['tokenizer']['name']}, which loses "
            "what they say. Is the encoder made for another language or script, or is the text no prose (broken encoding, "
            "emoji)? The report lists the characters."
        )
    return "\n".join(lines)
