"""Rows of any source → documents `{id, text, label, split, group}`, checked. Nothing is dropped in silence.

Used by scripts/prepare_dataset.py. Every doubtful row falls under a problem with a name; a problem is an error unless
the caller decides to drop or keep its rows.
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
# What can be wrong with rows, and what each is called on the command line.
PROBLEMS = {
    "missing_text": "no text",
    "missing_label": "no label",
    "unknown_label": "a label that is not in --labels",
    "empty": "an empty text",
    "duplicate_id": "an id that another row has",
    "unknown_split": "a split that is none of train, validation, test",
    "duplicate": "the same or nearly the same text as a document of another split",
    "group_leak": "a group that also stands in another split",
}
# What `keep` may decide; the others have no meaning when kept.
KEEPABLE = ("empty", "duplicate", "group_leak")


@dataclass
class Columns:
    """Names of a table's columns. Id, split and group are optional where they are at their default names."""

    text: str = "text"
    label: str = "label"
    id: str = "id"
    split: str = "split"
    group: str = "group"
    evidence: str = "evidence"


@dataclass
class DataIssues:
    """Problem → names of its rows (`row 17 (id b-3)`), and what was decided about each."""

    rows: dict[str, list[str]] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, row: str) -> None:
        self.rows.setdefault(problem, []).append(row)

    def raise_if_unresolved(self) -> None:
        """Raises ValueError naming every problem without a decision, with its rows."""
        undecided = {problem: rows for problem, rows in self.rows.items() if problem not in self.decisions}
        if undecided:
            parts = [f"{len(rows)} with {PROBLEMS[p]} [{p}]: {shorten(rows)}" for p, rows in undecided.items()]
            raise ValueError(
                f"The source has rows that cannot be used as they are: {'; '.join(parts)}. Mend them, or decide with "
                f"--drop {','.join(undecided)}"
                + (f" or --keep {','.join(kept)}." if (kept := [p for p in undecided if p in KEEPABLE]) else ".")
            )


def shorten(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def clean_text(text: str, row: str, encoding_errors: str = "strict") -> str:
    """The text in Unicode normal form C, of characters that there are."""
    return unicodedata.normalize("NFC", check_surrogates(text, row, encoding_errors))


def check_surrogates(text: str, row: str, encoding_errors: str = "strict") -> str:
    """The text as it is. Half a surrogate pair is no character: an error, or U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if encoding_errors == "strict":
            raise ValueError(
                f"{row}: the text holds half a surrogate pair ({text[error.start]!a}), which is no character. Mend it, "
                "or put U+FFFD in its place with --encoding_errors replace."
            ) from error
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def to_label(value: Any) -> str:
    """A label, id, split or group as text, "" where there is none: 1.0 and 1 are the same name."""
    if is_missing(value):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _spans(value: Any) -> str:
    """Where the evidence for a label is known to stand, `[{"start": 12, "end": 80}]` in characters, as JSON. Another
    column of that name is left alone."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # a table's cell
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    spans = value if isinstance(value, list) else []
    known = [{"start": int(span["start"]), "end": int(span["end"])} for span in spans if _is_span(span)]
    return json.dumps(known) if known else ""


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
    """All documents of a source as a memory-mapped table of id, text, label, and "" where there is none: split, group,
    and evidence (JSON, see `_spans`).

    Rows with a problem in `drop` are left out, in `keep` are taken; any other problem is an error.

    Args:
        labels: the labels in their order; a row with another is an `unknown_label`. None: whatever stands there.
        cache_dir: where the table is written; it must outlive it.

    Raises:
        ValueError: problems without a decision, with their rows; no such column; no rows.
    """
    decisions = dict.fromkeys(drop, "dropped") | dict.fromkeys(keep, "kept")
    issues = DataIssues(decisions=decisions)
    known = set(labels) if labels else None
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
                raise ValueError(f"{source}: {name}: the column {columns.text!r} holds {kind}, expected text.")
            problems = _problems_of(document, known, seen)
            for problem in problems:
                issues.add(problem, name)
            seen.add(id_)
            if all(decisions.get(problem) == "kept" for problem in problems):
                given = document["text"]
                document["text"] = clean_text(given, f"{source}: {name}", encoding_errors)
                if document["text"] != given:
                    document["evidence"] = ""  # its characters are counted in the text that was given
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
    """Rows → a memory-mapped table. (`Dataset.from_generator` hashes its generator and would reuse old files.)"""
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


def _problems_of(document: dict[str, Any], known: set[str] | None, seen: set[str]) -> list[str]:
    problems = []
    if is_missing(document["text"]):
        problems.append("missing_text")
    elif not document["text"].strip():
        problems.append("empty")
    if not document["label"]:
        problems.append("missing_label")
    elif known is not None and document["label"] not in known:
        problems.append("unknown_label")
    if document["id"] in seen:
        problems.append("duplicate_id")
    if document["split"] and document["split"] not in SPLITS:
        problems.append("unknown_split")
    return problems


def _rows_with_columns(source: str, columns: Columns, encoding_errors: str) -> Iterator[dict[str, Any]]:
    """The rows, once the first has shown that the named columns are there."""
    required = {"text": columns.text, "label": columns.label}
    for kind in ("id", "split", "group", "evidence"):
        if getattr(columns, kind) != getattr(Columns, kind) and getattr(columns, kind) != "none":
            required[kind] = getattr(columns, kind)
    for number, row in enumerate(read_rows(source, encoding_errors)):
        absent = [f"--{kind}_column {name}" for kind, name in required.items() if name not in row]
        if absent and number == 0:
            there = f"there is no column for {', '.join(absent)}; there are {', '.join(map(str, row))}."
            hint = " Fields must be separated by commas." if len(row) == 1 and ";" in next(iter(row)) else ""
            raise ValueError(f"{source}: {there}{hint}")
        yield dict.fromkeys(required.values()) | row  # a later row of JSON may leave a key out
