"""Records of CSV files: delimiters, and recovery after a malformed record."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

DELIMITERS = (",", ";", "\t", "|")
# A quote that is never closed would otherwise read the rest of the file into a single field.
MAX_FIELD = 1 << 28


class CsvRecords:
    """The records of a CSV file after its header.

    Iteration yields `(row, line, fields, error)`: the record's number and its first line, both from 1, and its fields, or
    what is wrong with it. After a malformed record with quotes, reading resumes at the next line that begins a well-formed one.

    Args:
        file: opened with `newline=""`.
        delimiter: None: given by a first line `sep=;`, a tab in .tsv files, else the only one of `DELIMITERS` that the header
            has, else a comma.

    Raises:
        ValueError: a malformed header.
    """

    def __init__(self, file: IO[str], path: Path, delimiter: str | None = None):
        self._lines, self._pending, self._line = iter(file), [], 0  # type: ignore[var-annotated]
        self._record: list[str] = []
        first = self._peek()
        if first.lower().startswith("sep=") and len(first.strip()) == 5:
            delimiter = delimiter or first[4]
            self._pending, self._line = [], 1
            first = self._peek()
        self.delimiter = delimiter or _guess_delimiter(first, path)
        header = self._next_record()
        if header is None:
            self.columns: list[str] = []
        elif isinstance(header, str):
            raise ValueError(f"{path}: the header (line {self._line}) is not well-formed CSV: {header}.")
        else:
            self.columns = header

    def _peek(self) -> str:
        self._pending = [line for line in [next(self._lines, None)] if line is not None]
        return self._pending[0] if self._pending else ""

    def _source(self) -> Iterator[str]:
        """Lines of the current record, remembered so that they can be read again."""
        while True:
            line = self._pending.pop() if self._pending else next(self._lines, None)
            if line is None:
                return
            self._record.append(line)
            yield line

    def _next_record(self) -> list[str] | str | None:
        """The fields of the next record that is not blank, what is wrong with it, or None at the end."""
        while True:
            self._line += len(self._record)
            self._record = []
            try:
                fields = next(csv.reader(self._source(), delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                return str(error)
            if fields is None:
                return None
            if fields:
                return fields

    def _rewind(self) -> None:
        """Go back to the second line of the current record."""
        self._pending += reversed(self._record[1:])
        self._record = self._record[:1]

    def __iter__(self) -> Iterator[tuple[int, int, list[str] | None, str]]:
        row, num_columns = 0, len(self.columns)
        record = self._next_record()
        while record is not None:
            row += 1
            line = self._line + 1
            if isinstance(record, list) and len(record) == num_columns:
                yield row, line, record, ""
                record = self._next_record()
                continue
            is_ambiguous = isinstance(record, str) or len(self._record) > 1
            error = (
                record
                if isinstance(record, str)
                else f"{len(record)} fields in place of {num_columns} as in the header"
            )
            self._rewind()
            record = self._next_record()
            while is_ambiguous and record is not None and not (isinstance(record, list) and len(record) == num_columns):
                self._rewind()
                record = self._next_record()
            last = self._line if is_ambiguous else line
            yield row, line, None, f"{error}{f', until line {last}' if last > line else ''}"


def _guess_delimiter(header: str, path: Path) -> str:
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t"
    fitting = []
    for delimiter in DELIMITERS:
        try:
            if len(next(csv.reader([header], delimiter=delimiter), [])) > 1:
                fitting.append(delimiter)
        except csv.Error:
            continue
    return fitting[0] if len(fitting) == 1 else ","
