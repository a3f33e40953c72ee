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
        self._lines, self._line = iter(file), 0
        self._pending: list[str] = []  # lines to read again, the next one last
        self._record: list[str] = []  # lines of the current record, and blank ones before it
        self._blank = 0  # how many of these are blank
        first = self._peek()
        if first.lower().startswith("sep=") and len(first.rstrip("\r\n")) == 5:
            delimiter = delimiter or first[4]
            self._pending.clear()
            self._line += 1
            first = self._peek()
        self.delimiter = delimiter or _guess_delimiter(first, path)
        header = self._next_record()
        if isinstance(header, str):
            raise ValueError(f"{path}: the header (line {self._line + 1}) is not well-formed CSV: {header}.")
        self.columns = header or []
        while self.columns and not self.columns[-1].strip():  # of empty columns, as spreadsheets write them
            self.columns.pop()

    def _peek(self) -> str:
        """The first line that is not blank, which will be read again."""
        for line in self._lines:
            if line.strip():
                self._pending = [line]
                return line
            self._line += 1
        return ""

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
        self._line += len(self._record)
        self._record, self._blank = [], 0
        while True:
            try:
                fields = next(csv.reader(self._source(), delimiter=self.delimiter, strict=True), None)
            except csv.Error as error:
                return str(error)
            if fields is None:
                return None
            if fields:
                return fields
            self._blank = len(self._record)

    def _fields(self, record: list[str] | str) -> list[str] | None:
        """The fields of a well-formed record, else None."""
        if isinstance(record, str) or len(record) < len(self.columns) or any(record[len(self.columns) :]):
            return None
        return record[: len(self.columns)]

    def __iter__(self) -> Iterator[tuple[int, int, list[str] | None, str]]:
        row = 0
        record = self._next_record()
        while record is not None:
            row += 1
            line = self._line + self._blank + 1
            fields = self._fields(record)
            if fields is not None:
                yield row, line, fields, ""
                record = self._next_record()
                continue
            num_columns = len(self.columns)
            error = (
                record
                if isinstance(record, str)
                else f"{len(record)} fields in place of {num_columns} as in the header"
            )
            following = self._after_malformed(record)
            last = self._line
            yield row, line, None, f"{error}{f', until line {last}' if last > line else ''}"
            record = following

    def _after_malformed(self, record: list[str] | str) -> list[str] | str | None:
        """The next record that is well-formed, or the next one if only the number of fields was wrong."""
        lines = self._record[self._blank :]
        following = self._next_record()
        if isinstance(record, list) and (len(lines) == 1 or following is None or self._fields(following) is not None):
            return following
        # A quote may have opened or closed where none was meant: try again from the second line on.
        self._pending += reversed([*lines[1:], *self._record])
        self._line, self._record = self._line - len(lines), lines[:1]
        following = self._next_record()
        while following is not None and self._fields(following) is None:
            self._pending += reversed(self._record[self._blank + 1 :])
            self._record = self._record[: self._blank + 1]
            following = self._next_record()
        return following


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
