"""Sources of documents, read a row at a time: CSV, JSONL, Parquet, folders of texts, saved `datasets`, the hub."""

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
    """Rows of a CSV, TSV, JSONL or Parquet file, a text file, a folder of them (or one folder a label), a saved `datasets`
    folder, or a data set on the hub. One row at a time: the source may be larger than memory.

    Raises:
        ValueError: not readable, not UTF-8 (with `encoding_errors` "strict"), or no kind of source that is known.
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
                f"{source}: expected a .csv, .tsv, .jsonl, .parquet or .txt file, got {suffix or 'no ending'}."
            )
    else:
        yield from _read_datasets(_load_hub(source))


def _read_csv(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", errors=encoding_errors, newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            doubled = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
            if doubled:
                raise ValueError(f"{path}: the column {', '.join(doubled)} stands more than once in the first line.")
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}: row {number} (line {reader.line_num}) does not have the {len(reader.fieldnames or [])}"
                        " fields of the first line. A text with commas or line breaks must stand in double quotes."
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
    """Names the first row that is not UTF-8."""
    before = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                before.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                where = f"row {number} (line {number})" if number > 1 else "the first line"
                if delimiter:
                    head = "".join(before) + line[: error.start].decode("utf-8")
                    where = _place_in_table(head, delimiter, number)
                return ValueError(
                    f"{path}: {where} is not UTF-8: byte 0x{line[error.start]:02x} at column "
                    f"{error.start + 1}. Convert the file (iconv -f LATIN1 -t UTF-8), or put U+FFFD in place of such "
                    "bytes with --encoding_errors replace."
                )
    raise AssertionError("called for a file that is UTF-8")


def _place_in_table(head: str, delimiter: str, line: int) -> str:
    """In which row a table's text ends, where its quotes and line ends allow to count the rows."""
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
        # As bytes first: Arrow would not say in which row the text is not UTF-8.
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
                            f"{error.start}). Mend it, or put U+FFFD in its place with --encoding_errors replace."
                        ) from error
            yield row


def _read_text_folders(path: Path, encoding_errors: str) -> Iterator[dict[str, Any]]:
    # One folder a label, where there are such: a licence beside them is no document.
    files = sorted(path.glob("*/*.txt"))
    loose = [] if files else sorted(path.glob("*.txt"))
    files = files or loose
    if not files:
        raise ValueError(f"{path}: expected .txt files, or folders named after the labels with .txt files; found none.")
    for file in files:
        document = _read_text_file(file, encoding_errors)
        if not loose:
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
            f"{source}: no such file or folder, and no data set on the hub could be loaded under that name "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})."
        ) from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def label_names_of(source: str, label_column: str) -> list[str] | None:
    """The label order that the source itself carries (a ClassLabel of `datasets`), else None."""
    path = Path(source)
    if path.exists() and not _is_saved(path):
        return None
    loaded = datasets.load_from_disk(source) if path.exists() else _load_hub(source)
    part = next(iter(loaded.values())) if isinstance(loaded, dict) else loaded
    feature = part.features.get(label_column)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
