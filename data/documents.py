"""Validation: rows of any source → documents `{id, text, label, split, group}`. No row is dropped silently.

Used by scripts/prepare_dataset.py. Every data issue has a problem name; it is an error unless the caller decides to
drop or keep the affected rows.
"""

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from data.readers import read_rows

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train"}
# Problem name, as used on the command line → description.
PROBLEMS = {
    "missing_text": "no text",
    "missing_label": "no label",
    "unknown_label": "a label that is not in --labels",
    "empty": "an empty text",
    "duplicate_id": "a duplicate id",
    "unknown_split": "a split other than train, validation, test",
    "duplicate": "an identical or nearly identical text in another split",
    "group_leak": "a group that also occurs in another split",
}
# Problems that `keep` accepts; rows with the others are unusable.
KEEPABLE = ("empty", "duplicate", "group_leak")


@dataclass
class Columns:
    """Column names of a table. Columns other than text and label are optional under their default names."""

    text: str = "text"
    label: str = "label"
    id: str = "id"
    split: str = "split"
    group: str = "group"
    evidence: str = "evidence"


def check_decisions(drop: Sequence[str], keep: Sequence[str]) -> None:
    """Raise ValueError if a problem is unknown or occurs in both."""
    for option, problems, allowed in (("drop", drop, PROBLEMS), ("keep", keep, KEEPABLE)):
        if unknown := [problem for problem in problems if problem not in allowed]:
            raise ValueError(f"--{option} accepts {', '.join(allowed)}; got {', '.join(unknown)}.")
    if both := set(drop) & set(keep):
        raise ValueError(f"{', '.join(sorted(both))} is in both --drop and --keep: choose one.")


@dataclass
class DataIssues:
    """Problem → affected rows (`row 17 (id b-3)`), and the decision for each problem."""

    rows: dict[str, list[str]] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, row: str) -> None:
        self.rows.setdefault(problem, []).append(row)

    def raise_if_unresolved(self) -> None:
        """Raise ValueError listing every problem without a decision, with its rows."""
        unresolved = {problem: rows for problem, rows in self.rows.items() if problem not in self.decisions}
        if unresolved:
            parts = [f"{len(rows)} with {PROBLEMS[p]} [{p}]: {shorten(rows)}" for p, rows in unresolved.items()]
            raise ValueError(
                f"The source has invalid rows: {'; '.join(parts)}. Fix them, or use --drop {','.join(unresolved)}"
                + (f" or --keep {','.join(kept)}." if (kept := [p for p in unresolved if p in KEEPABLE]) else ".")
            )


def shorten(names: Sequence[str], most: int = 5) -> str:
    """Join the first few names, and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def clean_text(text: str, row: str, encoding_errors: str = "strict") -> str:
    """Normalize a text to Unicode NFC after checking for unpaired surrogates."""
    return unicodedata.normalize("NFC", check_surrogates(text, row, encoding_errors))


def check_surrogates(text: str, row: str, encoding_errors: str = "strict") -> str:
    """Return the text unchanged; unpaired surrogates raise an error or are replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if encoding_errors == "strict":
            raise ValueError(
                f"{row}: the text contains an unpaired surrogate ({text[error.start]!a}). Fix it, or replace it by "
                "U+FFFD with --encoding_errors replace."
            ) from error
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def to_label(value: Any) -> str:
    """Convert a label, id, split or group to text; "" if missing, and 1.0 becomes "1"."""
    if is_missing(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _spans(value: Any) -> str:
    """Gold evidence spans as JSON, `[{"start": 12, "end": 80}]` in characters; "" for any other content."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a CSV cell
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    spans = value if isinstance(value, list) else []
    valid = [{"start": int(span["start"]), "end": int(span["end"])} for span in spans if _is_span(span)]
    return json.dumps(valid) if valid else ""


def _is_span(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), int) for key in ("start", "end"))


def read_documents(
    source: str,
    columns: Columns,
    labels: Sequence[str] | None = None,
    encoding_errors: str = "strict",
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    cache_dir: str | None = None,
) -> tuple[datasets.Dataset, DataIssues]:
    """Read all documents of a source into a memory-mapped table.

    The columns are id, text, label, split, group and evidence (JSON, see `_spans`); the last three are "" if missing.
    Rows with a problem in `drop` are omitted, those with one in `keep` are included; any other problem is an error.

    Args:
        labels: labels in order; other labels are an `unknown_label`. None: any label.
        cache_dir: folder of the table; it must outlive the table.

    Raises:
        ValueError: unresolved problems, with their rows; a missing column; no rows.
    """
    decisions = dict.fromkeys(drop, "dropped") | dict.fromkeys(keep, "kept")
    issues = DataIssues(decisions=decisions)
    known_labels = set(labels) if labels else None
    rows = _rows_with_columns(source, columns, encoding_errors)

    def documents() -> Iterator[dict[str, str]]:
        seen: set[str] = set()
        for number, row in enumerate(rows, 1):
            id_ = to_label(row.get(columns.id)) or f"row-{number}"
            name = f"row {number} (id {id_})" if columns.id in row else f"row {number}"
            document = {
                "id": id_,
                "text": row[columns.text],
                "label": to_label(row[columns.label]),
                "split": to_label(row.get(columns.split)).lower(),
                "group": to_label(row.get(columns.group)),
                "evidence": _spans(row.get(columns.evidence)),
            }
            document["split"] = SPLIT_ALIASES.get(document["split"], document["split"])
            if not is_missing(document["text"]) and not isinstance(document["text"], str):
                kind = type(document["text"]).__name__
                raise ValueError(f"{source}: {name}: expected text in the column {columns.text!r}, got {kind}.")
            problems = _find_problems(document, known_labels, seen)
            for problem in problems:
                issues.add(problem, name)
            seen.add(id_)
            if all(decisions.get(problem) == "kept" for problem in problems):
                original = document["text"]
                document["text"] = clean_text(original, f"{source}: {name}", encoding_errors)
                if document["text"] != original:
                    document["evidence"] = ""  # its offsets refer to the original text
                yield document

    features = datasets.Features({name: datasets.Value("large_string") for name in ("id", "text", "label")})
    features |= {name: datasets.Value("string") for name in ("split", "group", "evidence")}
    table = _write_table(documents(), datasets.Features(features), cache_dir)
    issues.raise_if_unresolved()
    if len(table) == 0:
        raise ValueError(f"{source}: no documents (the source has no rows, or all were dropped).")
    return table, issues


def _write_table(
    rows: Iterator[dict[str, str]], features: datasets.Features, cache_dir: str | None
) -> datasets.Dataset:
    """Write rows to a memory-mapped table. (`Dataset.from_generator` may reuse stale files.)"""
    empty = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    if cache_dir is None:
        collected = list(rows)
        return datasets.Dataset.from_list(collected, features=features) if collected else empty
    path = os.path.join(cache_dir, "documents.arrow")
    with ArrowWriter(path=path, features=features, writer_batch_size=64) as writer:
        for row in rows:
            writer.write(row)
        num_rows, _ = writer.finalize()
    return datasets.Dataset.from_file(path) if num_rows else empty


def _find_problems(document: dict[str, Any], known_labels: set[str] | None, seen: set[str]) -> list[str]:
    problems = []
    if is_missing(document["text"]):
        problems.append("missing_text")
    elif not document["text"].strip():
        problems.append("empty")
    if not document["label"]:
        problems.append("missing_label")
    elif known_labels is not None and document["label"] not in known_labels:
        problems.append("unknown_label")
    if document["id"] in seen:
        problems.append("duplicate_id")
    if document["split"] and document["split"] not in SPLITS:
        problems.append("unknown_split")
    return problems


def _rows_with_columns(source: str, columns: Columns, encoding_errors: str) -> Iterator[dict[str, Any]]:
    """Yield the rows after checking that the first has the required columns."""
    required = {"text": columns.text, "label": columns.label}
    for kind in ("id", "split", "group", "evidence"):
        if getattr(columns, kind) != getattr(Columns, kind) and getattr(columns, kind) != "none":
            required[kind] = getattr(columns, kind)
    for number, row in enumerate(read_rows(source, encoding_errors)):
        absent = [f"--{kind}_column {name}" for kind, name in required.items() if name not in row]
        if absent and number == 0:
            message = f"no column for {', '.join(absent)}; the columns are {', '.join(map(str, row))}."
            hint = " Fields must be separated by commas." if len(row) == 1 and ";" in next(iter(row)) else ""
            raise ValueError(f"{source}: {message}{hint}")
        yield dict.fromkeys(required.values()) | row  # later JSON rows may omit keys
