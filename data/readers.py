"""Readers that yield rows of CSV, JSONL, Parquet and text files, saved `datasets`, and hub datasets."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


def read_rows(source: str, encoding_errors: str = "strict") -> Iterator[dict[str, Any]]:
    """Yield the rows of a source, one at a time, so that it may be larger than memory.

    Supports CSV, TSV, JSONL, Parquet and text files, a folder of text files or of one such folder per label, a saved
    `datasets` folder, and a dataset on the hub.

    Raises:
        ValueError: an unreadable or unsupported source, or text that is not UTF-8 (if `encoding_errors` is "strict").
    """
    path = Path(source)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    if path.is_dir():
        if _is_saved(path):
            yield from _read_datasets(datasets.load_from_disk(source))
        else:
            yield from _read_text_folders(path, encoding_errors)
    elif path.is_file():
        suffix = path.suffix.lower()
        if suffix in readers:
            yield from readers[suffix](path, encoding_errors)
        elif suffix == ".txt":
            yield _read_text_file(path, encoding_errors)
        elif suffix == ".parquet":
            yield from _read_parquet(path, encoding_errors)
        else:
            raise ValueError(
                f"{source}: expected a .csv, .tsv, .jsonl, .parquet or .txt file, got {suffix or 'no suffix'}."
            )
    else:
        yield from _read_datasets(_load_hub(source))


def _read_csv(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", errors=encoding_errors, newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            duplicates = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
            if duplicates:
                raise ValueError(f"{path}: duplicate column in the header: {', '.join(duplicates)}.")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}: row {number} (line {reader.line_num}) does not have the "
                        f"{len(reader.fieldnames or [])} fields of the header. Texts with commas or "
                        "line breaks must be in double quotes."
                    )
                yield row
    except UnicodeDecodeError as error:
        raise _not_utf8(path, delimiter) from error
    except csv.Error as error:
        raise ValueError(f"{path}: not a well-formed CSV file: {error}.") from error


def _read_jsonl(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8-sig", errors=encoding_errors) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"{path}: row {number} is not JSON: {error}.") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}: row {number} is {type(row).__name__}, expected an object.")
                yield row
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _not_utf8(path: Path, delimiter: str | None = None) -> ValueError:
    """Build an error that locates the first row that is not UTF-8."""
    decoded = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                decoded.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                location = f"row {number} (line {number})" if number > 1 else "the first line"
                if delimiter:
                    head = "".join(decoded) + line[: error.start].decode("utf-8")
                    location = _locate_row(head, delimiter, number)
                return ValueError(
                    f"{path}: {location} is not UTF-8: byte 0x{line[error.start]:02x} at column "
                    f"{error.start + 1}. Convert the file (iconv -f LATIN1 -t UTF-8), or replace such bytes by U+FFFD "
                    "with --encoding_errors replace."
                )
    raise AssertionError("called for a file that is UTF-8")


def _locate_row(head: str, delimiter: str, line: int) -> str:
    """Locate the end of the text `head` of a table as row and line, or as line only if its rows cannot be counted."""
    try:
        row = sum(1 for _ in csv.reader(io.StringIO(head), delimiter=delimiter)) - 1
    except csv.Error:
        return f"line {line}"
    return f"row {row} (line {line})" if row > 0 else "the first line"


def _read_parquet(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    try:
        file = pq.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    number = 0
    for batch in file.iter_batches(batch_size=64):
        # Read as bytes first, since Arrow does not report which row is not UTF-8.
        columns = {
            name: column.cast(pa.large_binary())
            if pa.types.is_string(kind) or pa.types.is_large_string(kind)
            else column
            for name, kind, column in zip(batch.schema.names, batch.schema.types, batch.columns, strict=True)
        }
        for values in zip(*(column.to_pylist() for column in columns.values()), strict=True):
            number += 1
            row = dict(zip(columns, values, strict=True))
            for name, value in row.items():
                if isinstance(value, bytes) and not pa.types.is_binary(batch.schema.field(name).type):
                    try:
                        row[name] = value.decode("utf-8", errors=encoding_errors)
                    except UnicodeDecodeError as error:
                        raise ValueError(
                            f"{path}: row {number}: the column {name!r} is not UTF-8 ({error.reason} at byte "
                            f"{error.start}). Fix it, or replace it by U+FFFD with --encoding_errors replace."
                        ) from error
            yield row


def _read_text_folders(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    # With one folder per label, ignore text files next to them, such as a license.
    files = sorted(path.glob("*/*.txt"))
    flat = [] if files else sorted(path.glob("*.txt"))
    files = files or flat
    if not files:
        raise ValueError(
            f"{path}: no .txt files found; expected .txt files, or folders named after the labels with .txt files."
        )
    for file in files:
        document = _read_text_file(file, encoding_errors)
        if not flat:
            document = {"id": f"{file.parent.name}/{file.stem}", "text": document["text"], "label": file.parent.name}
        yield document


def _read_text_file(path: Path, encoding_errors: str) -> dict[str, Any]:
    try:
        return {"id": path.stem, "text": path.read_bytes().decode("utf-8-sig", errors=encoding_errors)}
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error


def _read_datasets(loaded: datasets.Dataset | datasets.DatasetDict) -> Iterator[dict[str, Any]]:
    parts = loaded.items() if isinstance(loaded, dict) else [(None, loaded)]
    for split, part in parts:
        names = {name: f for name, f in part.features.items() if isinstance(f, datasets.ClassLabel)}
        for row in part:
            for name, feature in names.items():
                row[name] = feature.int2str(row[name]) if row[name] is not None and row[name] >= 0 else None
            yield row if split is None else {"split": split, **row}


def _load_hub(source: str) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source)
    except Exception as error:
        raise ValueError(
            f"{source}: no such file or folder, and no dataset of that name could be loaded from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})."
        ) from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def label_names_of(source: str, label_column: str) -> list[str] | None:
    """Label order stored in the source (a ClassLabel of `datasets`), or None."""
    path = Path(source)
    if path.exists() and not _is_saved(path):
        return None
    loaded = datasets.load_from_disk(source) if path.exists() else _load_hub(source)
    part = next(iter(loaded.values())) if isinstance(loaded, dict) else loaded
    feature = part.features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
