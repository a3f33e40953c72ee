"""Validation: rows of any source → documents `{id, text, label, split, group, …}`. No row is dropped silently.

Used by scripts/prepare_dataset.py. Every data issue has a problem name; it is an error unless the caller decides to
drop or keep the affected rows.
"""

import json
import os
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from data.document_files import Section
from data.labels import MULTI, SINGLE, marked_labels, renamed, split_labels
from data.readers import Row, Source, clean_name
from data.source_files import SPLITS, describe_unread, shorten, to_split

# Dashes and quotes of word processors, and the invisible selectors of an emoji's colour.
TYPOGRAPHIC = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2212\u2018\u2019\u201c\u201d", "------''\"\"", "\ufe0e\ufe0f"
)
MISSING = ("nan", "NaN", "NaT", "<NA>", "#N/A")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
# A list of labels as text, in JSON, Python or NumPy; but [OC] is a label.
LISTED = re.compile(r"""[\[{](\s*["'].*|.*,.*|[\d.\s]*)[\]}]""", re.DOTALL)
# Problem name, as used on the command line → description.
PROBLEMS = {
    "malformed": "a malformed record or an unreadable file",
    "missing_text": "no text",
    "missing_label": "no label",
    "unknown_label": "a label that is not in --labels",
    "similar_label": "a label that looks like a more frequent one (case, invisible characters, dashes, quotes, form of a number)",
    "empty": "an empty text",
    "duplicate_id": "a duplicate id",
    "unknown_split": "a split other than train, validation, test",
    "duplicate": "an identical or nearly identical text in another split",
    "group_leak": "a group that also occurs in another split",
}
ADVICE = {
    "similar_label": "To count such labels as one, use --merge_labels.",
    "duplicate_id": "To number the documents instead, use --id_column none.",
    "unknown_split": "To create the splits instead, use --split_column none.",
}
DESCRIPTIONS = PROBLEMS | {
    "evidence": "gold evidence that is not [{start, end}, …] in the unchanged text, or of a label that the document does not have"
}
# Problems that `keep` accepts; rows with the others are unusable.
KEEPABLE = ("empty", "similar_label", "duplicate", "group_leak")


@dataclass
class Columns:
    """Column names of a table. Columns other than text and label are optional under their default names.

    Args:
        text: one column, or several separated by commas, which are joined in this order.
        keep: further columns to keep with the documents.
        problem_type: whether a document has one label or several (any number).
        label_separator: what separates several labels in a text (None: they are a list, or a list in JSON).
        label_columns: columns of 0 and 1, one for each label, in place of a column with several labels.
    """

    text: str = "text"
    label: str = "label"
    id: str = "id"
    split: str = "split"
    group: str = "group"
    evidence: str = "evidence"
    keep: Sequence[str] = ()
    problem_type: str = SINGLE
    label_separator: str | None = None
    label_columns: Sequence[str] = ()

    def labels_of(self, values: dict[str, Any]) -> list[str] | None:
        """The labels of a row; None if they are missing.

        Raises:
            ValueError: a value that is no label, or not the number of labels that a document has.
        """
        if self.problem_type == SINGLE:
            label = to_label(values.get(self.label))
            return [label] if label else None
        if self.label_columns:
            if any(is_missing(value) or value == "" for value in map(values.get, self.label_columns)):
                return None
            return list(dict.fromkeys(map(to_label, marked_labels(values, self.label_columns))))
        value = values.get(self.label)
        if is_missing(value):
            return None
        if self.label_separator and isinstance(value, int | float):  # a single label such as 1984
            value = to_name(value)
        labels = split_labels(value, self.label_separator)
        if any(isinstance(label, list | tuple | dict) for label in labels or ()):
            raise ValueError(f"expected a list of labels such as ['a', 'b'], got a list in it: {str(labels)[:60]}")
        names = [""] if labels is None else [to_label(label) for label in labels]
        return list(dict.fromkeys(names)) if all(names) else None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.text.split(","))


def check_decisions(drop: Sequence[str], keep: Sequence[str]) -> None:
    """Raise ValueError if a problem is unknown or occurs in both."""
    for option, problems, allowed in (("drop", drop, PROBLEMS), ("keep", keep, KEEPABLE)):
        if unknown := [problem for problem in problems if problem not in allowed]:
            raise ValueError(f"--{option} accepts {', '.join(allowed)}; got {', '.join(unknown)}.")
    if both := set(drop) & set(keep):
        raise ValueError(f"{', '.join(sorted(both))} is in both --drop and --keep: choose one.")


@dataclass
class DataIssues:
    """Problem → affected rows (`row 17 (id b-3)`), and the decision for each problem.

    Attributes:
        pairs: `(problem, i, j)`: documents that are near-duplicates, or of a group in different splits.
    """

    rows: dict[str, list[str]] = field(default_factory=dict)
    decisions: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, int, int]] = field(default_factory=list)

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
                + "".join(f" {advice}" for problem, advice in ADVICE.items() if problem in unresolved)
            )


def check_surrogates(text: str, encoding_errors: str = "strict") -> str:
    """Return the text unchanged; unpaired surrogates raise an error or are replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if encoding_errors == "strict":
            raise ValueError(
                f"the text contains an unpaired surrogate ({text[error.start]!a}). Fix it, or replace it by U+FFFD with "
                "--encoding_errors replace"
            ) from error
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_missing(value: Any) -> bool:
    """None, and what other programs write for a missing value or an error of a formula."""
    return value is None or str(value) in MISSING


def to_name(value: Any) -> str:
    """Convert an id, split or group to text: "" if missing, 1.0 becomes "1"; NFC, without invisible characters around it."""
    if is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return clean_name(check_surrogates(str(value)))


def to_label(value: Any) -> str:
    """Convert a label to text as `to_name` does, and "1.0" to "1" (but not 01, which may be a code).

    Raises:
        ValueError: several labels, or another value that is no label.
    """
    if isinstance(value, list | tuple | dict | set | bytes) or (
        isinstance(value, str) and LISTED.fullmatch(value.strip())
    ):
        raise ValueError(
            f"expected one label, got {str(value)[:60]}; for several labels a document, the commands that prepare data take "
            f"--problem_type {MULTI}"
        )
    name = to_name(value)
    return name.split(".")[0] if NUMBER.fullmatch(name) and not name.partition(".")[2].strip("0") else name


def look_alike_key(label: str) -> str:
    """The same for labels that differ only in case, spaces, invisible characters, dashes, quotes or the form of a number.

    >>> look_alike_key("Teen") == look_alike_key("te\u200ben "), look_alike_key("01") == look_alike_key("1")
    (True, True)
    """
    text = unicodedata.normalize("NFKC", label).casefold().translate(TYPOGRAPHIC)
    visible = "".join(character for character in text if unicodedata.category(character) not in ("Cf", "Cc"))
    key = "".join(visible.split())
    number = re.fullmatch(r"([-+]?)0*(\d+)(?:\.(\d*?)0*)?", key)
    return f"{number[1].strip('+')}{number[2]}.{number[3] or ''}" if number else key


def similar_label_groups(labels: Iterable[str]) -> list[list[str]]:
    """Labels that look alike (see `look_alike_key`), in order.

    >>> similar_label_groups(["Teen", "Mature", "teen ", "1", "1.0"])
    [['Teen', 'teen '], ['1', '1.0']]
    """
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(look_alike_key(label), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def similar_labels(counts: Counter[str], preferred: Sequence[str] = ()) -> dict[str, str]:
    """Labels that look like another, and that one: the preferred or most frequent of those alike."""
    ordered = sorted(counts, key=lambda name: (name not in preferred, -counts[name], name))
    groups = similar_label_groups(ordered)
    return {label: first for first, *others in groups for label in others if label not in preferred}


def joined_text(row: Row, columns: Columns) -> tuple[str | None, list[Section]]:
    """The text of a row and its sections: of several text columns, joined by blank lines, each is a section.

    Raises:
        ValueError: a value that is not text.
    """
    names = columns.texts
    texts: dict[str, str] = {}
    for name in names:
        value = row.values.get(name)
        if is_missing(value):
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):  # a title such as 1984
            value = to_name(value)
        if not isinstance(value, str):
            raise ValueError(f"expected text in the column {name!r}, got {type(value).__name__}")
        texts[name] = value
    if len(names) == 1 or not texts:
        return texts.get(names[0]), row.sections
    text, sections = "", []
    for name, part in texts.items():
        if part.strip():
            text += "\n\n" if text else ""
            sections.append(Section(len(text), name))
            text += part
    return text, sections


def section_at(sections: Sequence[tuple[int, str]], position: int) -> str:
    """Name of the section that a position in the text is in, or ""."""
    index = bisect_right(sections, position, key=lambda section: section[0])
    return sections[index - 1][1] if index else ""


def normalize_sections(text: str, sections: Sequence[Section]) -> tuple[str, list[Section]]:
    """A text in NFC, and where its sections start there."""
    starts = [*(section.start for section in sections), len(text)]
    normalized, moved = unicodedata.normalize("NFC", text[: starts[0]]), []
    for section, end in zip(sections, starts[1:], strict=True):
        moved.append(Section(len(normalized), section.name))
        normalized += unicodedata.normalize("NFC", text[section.start : end])
    return normalized, moved


def _spans(value: Any, text: str, labels: Sequence[str], several: bool) -> str | None:
    """Gold evidence spans as JSON, `[{"start": 12, "end": 80}]` in characters, and the "label" that a span is evidence of if
    it has one; "" without any, None if they are none, or, with several labels a document, of one that it does not have."""
    if is_missing(value) or value in ("", []):
        return ""
    if isinstance(value, str):  # a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not all(_is_span(span, len(text)) for span in value):
        return None
    name_of = {look_alike_key(label): label for label in labels}
    spans = [{key: span[key] for key in ("start", "end")} for span in value]
    for span, given in zip(spans, value, strict=True):
        if "label" in given:
            named = given["label"]
            span["label"] = named if named in labels else name_of.get(look_alike_key(named), None if several else named)
    return None if None in [span.get("label", "") for span in spans] else json.dumps(spans)


def _renamed_evidence(evidence: str, names: Mapping[str, str]) -> str:
    """The JSON of `_spans` with other names for some labels."""
    spans = json.loads(evidence) if evidence and names else []
    for span in spans:
        if "label" in span:
            span["label"] = renamed(span["label"], names)
    return json.dumps(spans) if spans else evidence


def _is_span(value: Any, length: int) -> bool:
    if not isinstance(value, dict) or not all(type(value.get(key)) is int for key in ("start", "end")):
        return False
    return bool(0 <= value["start"] < value["end"] <= length) and isinstance(value.get("label", ""), str)


def read_documents(
    source: Source,
    columns: Columns,
    labels: Sequence[str] | None = None,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    merge_labels: bool = False,
    cache_dir: str | None = None,
) -> tuple[datasets.Dataset, DataIssues]:
    """Read all documents of a source into a memory-mapped table.

    The columns are id, text, label (a list with several), split, group, evidence (JSON, see `_spans`), metadata (JSON, the
    columns to keep) and sections (JSON: `[[start, name], …]`); all after label are "" if missing. Rows with a problem in `drop` are omitted, those
    with one in `keep` are included; any other problem is an error.

    Args:
        labels: labels in order; other labels are an `unknown_label`. None: any label.
        merge_labels: count labels that look alike as one (see `look_alike_key`).
        cache_dir: folder of the table; it must outlive the table.

    Raises:
        ValueError: unresolved problems, with their rows; a missing column; no rows.
    """
    decisions = dict.fromkeys(drop, "dropped") | dict.fromkeys(keep, "kept")
    issues = DataIssues(decisions=decisions)
    known_labels = set(labels) if labels else None
    alike = {look_alike_key(label): label for label in labels or ()} if merge_labels else {}
    counts: Counter[str] = Counter()
    merged: Counter[tuple[str, str]] = Counter()

    def documents() -> Iterator[dict[str, Any]]:
        files_of_id: dict[str, str] = {}
        rows = tqdm(rows_with_columns(source, columns), desc="Reading", unit=" documents", disable=None)
        for number, row in enumerate(rows, 1):
            if row.error:
                issues.add("malformed", f"{row.location}: {row.error}")
                continue
            try:
                document, problems = _document_of(row, number, columns, source.options.encoding_errors)
            except ValueError as error:
                issues.add("malformed", f"{row.location}: {error}")
                continue
            original = document["label"]
            own = list(dict.fromkeys(alike.get(look_alike_key(label), label) for label in original))
            if own != original:
                others = {label: alike[look_alike_key(label)] for label in original if label not in own}
                merged.update(others.items())
                document["evidence"] = document["evidence"] and _renamed_evidence(document["evidence"], others)
            file = _table_of(row)
            if file and files_of_id.get(document["id"], file) != file:  # another table that numbers its rows from 1
                document["id"] = f"{file}:{document['id']}"
            if document["id"] in files_of_id:
                problems.append("duplicate_id")
            files_of_id.setdefault(document["id"], file)
            unknown = [] if known_labels is None else [label for label in own if label not in known_labels]
            if unknown:
                problems.append("unknown_label")
            for problem in problems:
                shown = {"unknown_label": ", ".join(unknown), "unknown_split": document["split"]}.get(problem)
                issues.add(problem, _name_of(row, document) + (f": {shown[:60]!r}" if shown else ""))
            if document["evidence"] is None:
                issues.add("evidence", _name_of(row, document))
                issues.decisions["evidence"] = "left out"
                document["evidence"] = ""
            if all(decisions.get(problem) == "kept" for problem in problems):
                counts.update(own)
                yield document | {"label": own[0] if columns.problem_type == SINGLE else own}

    features = datasets.Features({name: datasets.Value("large_string") for name in ("id", "text", "label")})
    if columns.problem_type == MULTI:
        features["label"] = datasets.List(features["label"])
    features |= {name: datasets.Value("string") for name in ("split", "group", "evidence", "metadata", "sections")}
    table = _write_table(documents(), datasets.Features(features), cache_dir)
    for (label, other), count in merged.items():
        issues.add("similar_label", f"{label!a} ({count} rows) ~ {other!a}")
        issues.decisions["similar_label"] = "merged"
    table = _resolve_similar_labels(table, similar_labels(counts, labels or ()), counts, issues, merge_labels)
    issues.raise_if_unresolved()
    if len(table) == 0:
        raise ValueError(f"{source}: no documents (the source has no rows, or all were dropped).")
    return table, issues


def _name_of(row: Row, document: dict[str, str]) -> str:
    return row.location if document["id"].startswith("row-") else f"{row.location} (id {document['id']})"


def _document_of(row: Row, number: int, columns: Columns, encoding_errors: str) -> tuple[dict[str, Any], list[str]]:
    """The document of a row, and its problems. Its evidence is None if it cannot be used.

    Raises:
        ValueError: a text or label that is none.
    """
    values = row.values
    document: dict[str, Any] = {"id": to_name(values.get(columns.id)) or f"row-{number}"}
    labels = columns.labels_of(values)
    document["label"] = labels or []
    text, sections = joined_text(row, columns)
    if text is not None:
        text, sections = normalize_sections(check_surrogates(text, encoding_errors), sections)
    evidence = values.get(columns.evidence)
    is_unchanged = text is not None and text == values.get(columns.text)  # else the offsets refer to another text
    document |= {
        "text": text or "",
        "split": to_split(to_name(values.get(columns.split))),
        "group": to_name(values.get(columns.group)),
        "evidence": _spans(evidence, text or "", document["label"], columns.problem_type == MULTI)
        if is_unchanged or is_missing(evidence) or evidence in ("", [])
        else None,
        "metadata": metadata_of(values, columns.keep),
        "sections": json.dumps(sections, ensure_ascii=False) if sections else "",
    }
    problems = []
    if text is None:
        problems.append("missing_text")
    elif not clean_name(text):
        problems.append("empty")
    if labels is None:
        problems.append("missing_label")
    if document["split"] and document["split"] not in SPLITS:
        problems.append("unknown_split")
    return document, problems


def metadata_of(values: dict[str, Any], names: Sequence[str]) -> str:
    """The columns to keep as a JSON object; "" without any. Values that are not JSON's become text."""
    kept = {name: None if is_missing(values.get(name)) else values.get(name) for name in names}
    return check_surrogates(json.dumps(kept, ensure_ascii=False, default=str), "replace") if kept else ""


def _resolve_similar_labels(
    table: datasets.Dataset, similar: dict[str, str], counts: Counter[str], issues: DataIssues, merge: bool
) -> datasets.Dataset:
    """Merge or drop labels that look like a more frequent one, and note them."""
    if not similar:
        return table
    issues.rows["similar_label"] = [
        f"{label!a} ({counts[label]} rows) ~ {other!a} ({counts[other]})" for label, other in similar.items()
    ]
    if merge:
        issues.decisions["similar_label"] = "merged"
        columns = {
            "label": [renamed(label, similar) for label in table["label"]],
            "evidence": [_renamed_evidence(evidence, similar) for evidence in table["evidence"]],
        }
        for name, values in columns.items():
            table = table.remove_columns(name).add_column(name, values, feature=table.features[name])
        return table
    if issues.decisions.get("similar_label") == "dropped":
        return table.select([i for i, label in enumerate(table["label"]) if renamed(label, similar) == label])
    return table


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


def rows_with_columns(source: Source, columns: Columns) -> Iterator[Row]:
    """Yield the rows after checking that each table has the required columns. Of JSON, single rows may lack one."""
    for table, rows in groupby(source, _table_of):
        head = list(islice(rows, 100))
        names = dict.fromkeys(name for row in head for name in row.values)
        alike = set(map(look_alike_key, names))
        options = [("--text_column", name) for name in columns.texts]
        options += [("--label_columns", name) for name in columns.label_columns] or [("--label_column", columns.label)]
        for kind in ("id", "split", "group", "evidence"):
            name = getattr(columns, kind)
            # A column Split is not left out in silence.
            if name != "none" and (name != getattr(Columns, kind) or (name not in names and name in alike)):
                options.append((f"--{kind}_column", name))
        options += [("--keep_columns", name) for name in columns.keep]
        if not all(row.error for row in head):
            place = f"{source}: {table}" if table else str(source)
            require_columns(Row("", names), options, place, describe_unread(list(source.found.unread)))
        yield from chain(head, rows)  # noqa: B031 (only the head was taken)


def _table_of(row: Row) -> str:
    """Name of the table of a row, "" for a document or the only table."""
    return row.location.rpartition(" row ")[0]


def require_columns(row: Row, options: Sequence[tuple[str, str]], source: str, note: str = "") -> None:
    """Raise ValueError, with a note, if a row lacks a column. `options`: `("--text_column", "text")` for each."""
    absent = [(option, name) for option, name in options if name not in row.values]
    if not absent:
        return
    names = {look_alike_key(name): name for name in row.values}
    hints = [
        f" Did you mean {option} {names[look_alike_key(name)]}?"
        for option, name in absent
        if look_alike_key(name) in names
    ]
    if len(row.values) == 1 and all(name in next(iter(row.values)) for _, name in absent):
        hints.append(" Of a CSV with another delimiter, pass its --delimiter.")
    hints += [f" {note}"] if note else []
    # A name with a comma is written as lists of options take it.
    columns = [f'"{name}"' if "," in name else name for name in row.values]
    if any("," in name for name in row.values) and any(option == "--label_columns" for option, _ in absent):
        hints.append(" A name with a comma is given in double quotes.")
    listed = ", ".join(f"{option} {name}" for option, name in absent)
    raise ValueError(f"{source}: no column for {listed}; the columns are {shorten(columns, 20)}.{''.join(hints)}")
