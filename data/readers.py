"""Rows of any source: tables, documents, saved `datasets` and datasets on the hub (see data/source_files.py)."""

import csv
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data.csv_records import MAX_FIELD, CsvRecords
from data.document_files import Section, import_extra, read_document_file
from data.labels import class_labels
from data.source_files import TABLES, SourceFile, SourceFiles, find_source_files, is_saved, split_of_name
from data.text_files import WrongEncoding, open_text, suffix_of

SPACE = re.compile(r"\s*")
CHARACTERS = 1 << 16  # of JSON, decoded at once


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(values)}")
    return values


JSON = json.JSONDecoder(object_pairs_hook=_unique)
MAX_CELL = 32_767  # characters in a cell of a spreadsheet
# What may stand around a name or label without being seen: spaces, byte order mark, zero-width space, joiners and directions.
AROUND = "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad"


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read.

    Args:
        encoding: of text files; None: UTF-8, or UTF-16 or UTF-32 with a byte order mark.
        encoding_errors: "strict" or "replace", for bytes that are not of the encoding.
        delimiter: of CSV files; None: see `CsvRecords`.
        text_columns: columns with the text. A table that has none of them but `path_column` lists documents.
        path_column: paths of documents, relative to the table.
        config_name, revision: of a dataset on the hub.
        by_folder: folders give documents labels and splits. False: every document below a folder is read, with neither.
    """

    encoding: str | None = None
    encoding_errors: str = "strict"
    delimiter: str | None = None
    text_columns: tuple[str, ...] = ("text",)
    path_column: str = "path"
    config_name: str | None = None
    revision: str | None = None
    by_folder: bool = True


@dataclass
class Row:
    """A row of a source.

    Args:
        location: what messages call it, `row 3`, with the file where there are several.
        values: by column. A document has `id` and `text`, and `label` and `split` where its folders give them.
        sections: places in the text of a document (see `Section`).
        error: why it cannot be used, or "".
    """

    location: str
    values: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    error: str = ""


@dataclass
class Source:
    """The sources of a command, to be read any number of times.

    Raises:
        ValueError: a source that does not exist, is not supported, or whose layout is not clear.
    """

    names: Sequence[str]
    options: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        self.names = [self.names] if isinstance(self.names, str) else list(self.names)
        self.saved = [name for name in self.names if is_saved(Path(name))]
        # A local folder may have configurations too, in the YAML of its README.md.
        self.on_hub = bool(self.options.config_name or self.options.revision)
        self.found = SourceFiles()
        if len(self.names) > 1 and (self.saved or self.on_hub):
            raise ValueError(f"{self}: a dataset on the hub, or saved by datasets, must be the only --source.")
        if not self.saved and not self.on_hub:
            files = find_source_files(self.names, self._has_documents, self.options.by_folder)
            self.on_hub, self.found = files is None, files or self.found

    def __str__(self) -> str:
        return ", ".join(self.names)

    def __iter__(self) -> Iterator[Row]:
        """The rows, one at a time, so that a source may be larger than memory.

        Raises:
            ValueError: a file that cannot be read. A row that cannot be used has an `error` instead.
        """
        if self.saved or self.on_hub:
            yield from _read_datasets(self._load())
            return
        is_single = len(self.found.files) == 1
        for file in self.found.files:
            row = None
            for row in _read_file(file, self.options, self.found.unread):
                if not file.is_document and not is_single:
                    row.location = f"{file.name} {row.location}"
                for name, value in (("split", file.split), ("label", file.label)):
                    if value and not row.values.get(name):
                        row.values[name] = value
                yield row
            if row is None:
                self.found.unread[f"{file.name} (no rows)"] = None

    def label_names(self, column: str) -> list[str] | None:
        """Label order that the source stores (a ClassLabel of `datasets`, or a list of it), or None."""

        def names_of(features: Mapping[str, Any]) -> list[str] | None:
            feature = class_labels(features).get(column)
            return None if feature is None else list(feature.names)

        if self.saved or self.on_hub:
            loaded = self._load()
            features = next(iter(loaded.values())).features if isinstance(loaded, dict) else loaded.features
            return names_of(features)
        parquet = [file.path for file in self.found.files if suffix_of(file.path) == ".parquet"]
        names = [names_of(_features_of(_open_parquet(path).schema_arrow)) for path in parquet]
        return names[0] if names and all(other == names[0] for other in names) else None

    def _load(self) -> datasets.Dataset | datasets.DatasetDict:
        if not self.saved:
            return _load_hub(self.names[0], self.options)
        try:
            return datasets.load_from_disk(self.names[0])
        except (ValueError, OSError) as error:
            raise ValueError(f"{self}: incomplete or damaged; save it again with save_to_disk ({error}).") from error

    def _has_documents(self, path: Path) -> bool:
        """Whether a table has a text column, or lists documents. One that cannot be read has not."""
        try:
            row = next(_read_table(SourceFile(path, path.name), self.options, {}), Row(""))
        except ValueError:
            return False
        return self.options.path_column in row.values or any(name in row.values for name in self.options.text_columns)


def read_rows(sources: str | Sequence[str], options: ReadOptions | None = None) -> Iterator[dict[str, Any]]:
    """The values of the rows of sources. Raises ValueError for a row that cannot be used, too."""
    source = Source([sources] if isinstance(sources, str) else sources, options or ReadOptions())
    for row in source:
        if row.error:
            raise ValueError(f"{source}: {row.location}: {row.error}.")
        yield row.values


def _read_file(file: SourceFile, options: ReadOptions, unread: dict[str, None]) -> Iterator[Row]:
    if not file.is_document:
        for row in _read_table(file, options, unread):
            yield _with_listed_document(row, file, options, unread)
        return
    row = Row(file.name, {"id": file.id})
    _add_document(row, file.path, options)
    yield row


def _add_document(row: Row, path: Path, options: ReadOptions) -> None:
    try:
        row.values["text"], row.sections = read_document_file(path, options.encoding, options.encoding_errors)
    except (ValueError, OSError) as error:
        row.error = str(error).removeprefix(f"{path}: ").rstrip(".")


def _with_listed_document(row: Row, table: SourceFile, options: ReadOptions, unread: dict[str, None]) -> Row:
    """Add the document that a row names in `path_column`, if the table has no text."""
    if row.error or options.path_column not in row.values or any(name in row.values for name in options.text_columns):
        return row
    name = str(row.values[options.path_column] or "").strip()
    if not (table.path.parent / name).exists():
        name = name.replace("\\", "/")  # a table from Windows
    name = os.path.normpath(name) if name else ""
    path = table.path.parent / name
    row.values.setdefault("id", name)
    if not os.path.isfile(path):
        row.error = f"the column {options.path_column!r} names no file: {name or 'it is empty'} (a column with texts is named by --text_column)"
        return row
    unread.pop(f"{table.name.rpartition('/')[0]}/{name}", None)
    _add_document(row, path, options)
    row.error = row.error and f"{name}: {row.error}"
    return row


def _read_table(file: SourceFile, options: ReadOptions, unread: dict[str, None]) -> Iterator[Row]:
    kind = TABLES[suffix_of(file.path)]
    if kind == "CSV":
        rows = _read_csv(file.path, options)
    elif kind == "Parquet":
        rows = _read_parquet(file.path, options)
    elif kind == "spreadsheet":
        rows = _read_spreadsheet(file, unread)
    else:
        rows = _read_json(file.path, options)
    for row in rows:
        names = [clean_name(name) for name in row.values]
        if names == list(row.values):
            yield row
            continue
        check_names(names, file.path)
        row.values = dict(zip(names, row.values.values(), strict=True))
        yield row


def clean_name(name: Any) -> str:
    """Text in NFC, without the spaces and invisible characters around it."""
    return unicodedata.normalize("NFC", str(name)).strip(AROUND)


def check_names(names: Sequence[str], path: Path) -> None:
    """Raise ValueError if two columns have the same name."""
    if repeated := [name for name, count in Counter(map(clean_name, names)).items() if count > 1]:
        raise ValueError(
            f"{path}: duplicate column in the header: {', '.join(repeated) or 'without a name'}. Rename one."
        )


def _read_csv(path: Path, options: ReadOptions) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD)
    delimiter = ","
    try:
        with open_text(path, options.encoding, options.encoding_errors) as file:
            records = CsvRecords(file, path, options.delimiter)
            delimiter = records.delimiter
            check_names(records.columns, path)
            for number, line, fields, error in records:
                if fields is None:
                    advice = "texts with delimiters, line breaks or quotes must be in double quotes, and quotes in them doubled"
                    yield Row(f"row {number} (line {line})", error=f"{error} ({advice})")
                else:
                    yield Row(f"row {number}", dict(zip(records.columns, fields, strict=True)))
    except WrongEncoding as error:
        with open_text(path, options.encoding, "replace") as file:
            before = (row for row, line, *_ in CsvRecords(file, path, delimiter) if line <= error.line)
            row = max(before, default=0)
        location = f"row {row} (line {error.line})" if row else f"line {error.line}"
        raise ValueError(str(error).replace(f"line {error.line}", location, 1)) from error


def _read_json(path: Path, options: ReadOptions) -> Iterator[Row]:
    """JSON Lines, or an array of objects."""
    with open_text(path, options.encoding, options.encoding_errors) as file:
        is_array = _begins_array(file.read(1 << 12))
    with open_text(path, options.encoding, options.encoding_errors) as file:
        if is_array:
            yield from _read_array(path, file)
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = JSON.decode(line)
            except (ValueError, RecursionError) as error:
                if number == 1 and suffix_of(path) == ".json":
                    raise ValueError(
                        f"{path}: expected an array of objects, or one object a line, each a document: {error}."
                    ) from error
                yield Row(f"row {number}", error=f"not JSON: {error}")
                continue
            yield _row_of(number, value)


def _begins_array(start: str) -> bool:
    """Whether a file begins with an array of objects, and not with a line that is some list."""
    start = start.lstrip()
    return start.startswith("[") and start[1:].lstrip().startswith(("{", "]"))


def _read_array(path: Path, file: IO[str]) -> Iterator[Row]:
    """The elements of an array, decoded one at a time: memory holds a part of the file that contains one."""
    number = 1
    buffer, place, is_complete = file.read(CHARACTERS).lstrip()[1:], 0, False
    while True:
        start = _after(SPACE, buffer, place)
        if number > 1 and buffer[start : start + 1] == ",":
            start = _after(SPACE, buffer, start + 1)
        elif number > 1 and start < len(buffer) and buffer[start] != "]":
            raise ValueError(f"{path}: row {number} of the array does not follow a comma.")
        if buffer[start : start + 1] == "]":
            if (buffer[start + 1 :] + file.read(CHARACTERS)).strip():
                raise ValueError(
                    f"{path}: there is text after the array of {number - 1} rows. Expected a single array."
                )
            return
        try:
            value, place = JSON.raw_decode(buffer, start)
        except (ValueError, RecursionError) as error:
            # The rest of a file that is not JSON is not read. A string without an end may have it there.
            reason = getattr(error, "msg", str(error))
            is_wrong = not isinstance(error, json.JSONDecodeError) or (
                error.pos < len(buffer) - CHARACTERS and not reason.startswith("Unterminated string")
            )
            if is_complete or is_wrong:
                raise ValueError(f"{path}: row {number} of the array is not complete JSON: {reason}.") from error
            more = file.read(max(CHARACTERS, len(buffer) - place))
            buffer, place, is_complete = buffer[place:] + more, 0, not more
            continue
        yield _row_of(number, value)
        number += 1


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    match = pattern.match(text, place)
    return match.end() if match else place


def _row_of(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(f"row {number}", value)
    return Row(f"row {number}", error=f"expected an object, got {type(value).__name__}")


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _features_of(schema: pa.Schema) -> dict[str, Any]:
    """Features that `datasets` keeps in a schema's metadata; {} where there are none or other ones."""
    try:
        return dict(datasets.Features.from_arrow_schema(schema))
    except Exception:  # of another version, or another library's
        return {}


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Row]:
    file = _open_parquet(path)
    check_names(file.schema_arrow.names, path)
    features = class_labels(_features_of(file.schema_arrow))
    number = 0
    for batch in file.iter_batches(batch_size=64):
        columns = {name: _values_of(batch.column(name), name, path) for name in batch.schema.names}
        for values in zip(*columns.values(), strict=True):
            number += 1
            row = Row(f"row {number}", dict(zip(columns, values, strict=True)))
            for name, value in row.values.items():
                if isinstance(value, bytes) and not pa.types.is_binary(batch.schema.field(name).type):
                    try:
                        row.values[name] = value.decode("utf-8", errors=options.encoding_errors)
                    except UnicodeDecodeError as error:
                        row.values[name] = None
                        row.error = (
                            f"the column {name!r} is not UTF-8 ({error.reason} at byte {error.start}). Fix it, or replace it by "
                            "U+FFFD with --encoding_errors replace"
                        )
            yield _with_label_names(row, features)


def _values_of(column: pa.Array, name: str, path: Path) -> list[Any]:
    """Python values, but bytes for text, since Arrow does not report which row is not UTF-8."""
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        return column.to_pylist()
    except (ValueError, OverflowError) as error:
        try:  # times beyond Python's
            return column.cast(pa.string()).to_pylist()
        except pa.ArrowException:
            raise ValueError(
                f"{path}: the column {name!r} cannot be read ({error}): leave it out of the file."
            ) from error


def _with_label_names(row: Row, features: dict[str, datasets.ClassLabel]) -> Row:
    for name, feature in features.items():
        value = row.values.get(name)
        names = [
            feature.int2str(i) if i is not None and 0 <= i < feature.num_classes else None
            for i in (value if isinstance(value, list) else [value])
        ]
        row.values[name] = names if isinstance(value, list) else names[0]
    return row


def _read_spreadsheet(file: SourceFile, unread: dict[str, None]) -> Iterator[Row]:
    """The sheets named after splits, or the first that is not hidden. Others are unread, empty ones are left out."""
    calamine = import_extra("python_calamine", file.path)
    try:
        workbook = calamine.CalamineWorkbook.from_path(str(file.path))
        hidden_last = sorted(
            workbook.sheets_metadata, key=lambda sheet: sheet.visible != calamine.SheetVisibleEnum.Visible
        )
        sheets = {sheet.name: workbook.get_sheet_by_name(sheet.name) for sheet in hidden_last}
        sheets = {name: sheet for name, sheet in sheets.items() if sheet.height > 1}
    except (calamine.CalamineError, OSError, RuntimeError) as error:
        raise ValueError(f"{file.path}: not a readable spreadsheet ({error}): save it as CSV.") from error
    splits = {name: split for name in sheets if (split := split_of_name(name))}
    if len(set(splits.values())) < 2:
        splits = dict.fromkeys(list(sheets)[:1], "")
    unread.update((f"{file.name}, sheet {name!r}", None) for name in sheets if name not in splits)
    for name, split in splits.items():
        for row in _read_sheet(file, sheets[name].iter_rows(), unread):
            if split:
                row.location = f"sheet {name!r} {row.location}"
                row.values = {"split": split} | row.values
            yield row


def _read_sheet(file: SourceFile, sheet: Iterator[list[Any]], unread: dict[str, None]) -> Iterator[Row]:
    rows = enumerate((list(map(_cell, cells)) for cells in sheet), 1)
    header = next((cells for _, cells in rows if any(cell is not None for cell in cells)), [])
    columns = {index: str(name) for index, name in enumerate(header) if name is not None}
    check_names(list(columns.values()), file.path)
    for number, cells in rows:
        values = {name: cells[index] for index, name in columns.items()}
        if any(isinstance(value, str) and len(value) == MAX_CELL for value in values.values()):
            unread[f"{file.name}, row {number} beyond the {MAX_CELL:,} characters that a cell can hold"] = None
        if any(value is not None for value in values.values()):  # empty cells are those of a CSV
            yield Row(f"row {number}", {name: "" if value is None else value for name, value in values.items()})


def _cell(value: Any) -> Any:
    """The value of a cell, None if it is empty. Spreadsheets know no integers: 1999.0 is 1999."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None if value == "" else value


def _read_datasets(loaded: datasets.Dataset | datasets.DatasetDict) -> Iterator[Row]:
    parts = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    number = 0
    for split, part in parts:
        names = class_labels(part.features)
        for values in part:
            number += 1
            row = _with_label_names(Row(f"row {number}", dict(values)), names)
            if split:
                row.values = {"split": split} | row.values
            yield row


def _load_hub(source: str, options: ReadOptions) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source, options.config_name, revision=options.revision)
    except Exception as error:
        message = " ".join(str(error).split()[:60])
        expected = (
            "--dataset_config_name and --dataset_revision are for datasets on the hub, and folders with configurations"
            if Path(source).exists()
            else "no such file or folder, and no dataset of that name could be loaded from the hub"
        )
        raise ValueError(
            f"{source}: {expected} ({type(error).__name__}: {message or 'no message'}). For one of several configurations pass "
            "--dataset_config_name."
        ) from error
