"""A page about a prepared dataset, to read before anything is trained: what is in it, and what needs attention.

    write_dataset_report(folder / "dataset_report.html", splits, manifest, tokenizer, duplicates)

The page is data/dataset_report.html, rendered by Jinja2 (see data/report_page.py). It quotes documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from data import dataset_checks
from data.dataset_checks import (
    DatasetWarning,
    check_dataset,
    count_documents,
    measure_documents,
    unknown_characters,
)
from data.documents import DESCRIPTIONS, similar_label_groups
from data.labels import is_multi_label, label_array, label_counts, label_names, labels_together, shown_labels
from data.report_page import page_environment
from data.text_excerpts import Pieces, beginning, character_name, differences, first_and_last_words, visible_name
from modeling.file_utils import atomic_write
from modeling.hierarchical_roberta.chunking import coverage, special_token_frame

# Bounds that keep the page small, whatever the dataset.
MAX_LABELS = 50  # listed in the tables; the most frequent ones
MAX_PAIRS, MAX_ROWS, MAX_CHARACTERS, MAX_EXTREMES = 50, 50, 20, 5
EXCERPT = 2000  # characters of a document
BINS = 30  # of a histogram
QUANTILES = (0, 0.25, 0.5, 0.75, 0.95, 1)


class DuplicatePair(NamedTuple):
    """Two near-duplicates, or two documents of a group in different splits."""

    first: str  # id
    second: str
    first_split: str  # "" if dropped
    second_split: str
    first_text: str
    second_text: str
    kind: str  # "duplicate" or "group_leak"


def write_dataset_report(
    path: Path,
    splits: datasets.DatasetDict,
    manifest: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    duplicates: Sequence[DuplicatePair],
    num_duplicates: int | None = None,
) -> None:
    """Write the report of a prepared dataset to `path` atomically.

    Its size and the memory it takes do not depend on the length of the texts, nor its size on their number.

    Args:
        duplicates: the pairs to show, of which the first `MAX_PAIRS` are.
        num_duplicates: number of pairs in all (None: as many as there are in `duplicates`).
    """
    documents, labelled, unknown_texts = measure_documents(splits, tokenizer)
    labels = label_names(splits["train"])
    names, split_names = [visible_name(label) for label in labels], list(splits)
    counts = count_documents(labelled, len(labels), split_names)
    sizes = {split: len(part) for split, part in splits.items()}
    listed = sorted(counts.sum(axis="columns").nlargest(MAX_LABELS).index)
    geometry = _geometry(manifest, tokenizer)
    issues = manifest["findings"]
    total = coverage(documents["num_tokens"].to_numpy(), **geometry)
    pairs = _pairs(duplicates[:MAX_PAIRS], splits, names)
    warnings = check_dataset(documents, labelled, labels, split_names, issues, total["tokens_cut_share"])
    if num_contradictions := sum(pair["labels_differ"] for pair in pairs):
        message = f"Duplicates with different labels ({num_contradictions} of those shown): one of the labels is wrong."
        warnings.insert(0, DatasetWarning(message, "duplicates"))
    content = {
        "source": ", ".join(visible_name(source["name"]) for source in manifest["sources"]),
        "warnings": warnings,
        "splits": split_names,
        "num_labels": len(labels),
        "num_unlisted": len(labels) - len(listed),
        "median": float(documents["num_tokens"].median()),
        "total": total,
        "geometry": manifest["geometry_of_coverage"],
        "counts": [{"label": names[i], "splits": _shares(counts, sizes, i)} for i in listed],
        "split_sizes": sizes,
        "together": _together(splits["train"], names),
        "similar": [
            [(visible_name(label), int(counts.to_numpy()[labels.index(label)].sum())) for label in group]
            for group in similar_label_groups(labels)[:MAX_ROWS]
        ],
        "axis": _limit(documents["num_tokens"], **geometry),
        "lengths": _lengths(documents, labelled, split_names, names, listed),
        "coverage": _coverage(documents, labelled, split_names, names, listed, geometry),
        "vocabulary": _vocabulary(documents, labelled, names, listed),
        "characters": [
            (visible_name(text, 40), character_name(text), count)
            for text, count in unknown_characters(unknown_texts, tokenizer).most_common(MAX_CHARACTERS)
        ],
        "has_unknown_token": tokenizer.unk_token_id is not None,
        "issues": [_issue(problem, issue) for problem, issue in issues.items()] + _unread(manifest),
        "pairs": pairs,
        "num_pairs": max(num_duplicates or 0, len(duplicates)),
        "extremes": _extremes(documents, splits, names),
        "facts": _facts(manifest),
        "limits": dataset_checks,
        "bins": BINS,
    }
    environment = page_environment(Path(__file__).parent)
    with atomic_write(path) as file:
        file.writelines(environment.get_template("dataset_report.html").generate(**content))


def _geometry(manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The manifest's chunk geometry as arguments of `coverage`."""
    geometry = manifest["geometry_of_coverage"]
    return {
        "body_length": geometry["chunk_length"] - sum(map(len, special_token_frame(tokenizer))),
        "overlap": geometry["chunk_overlap"],
        "max_chunks": geometry["max_chunks"],
    }


def _shares(counts: pd.DataFrame, sizes: dict[str, int], label: int) -> list[tuple[int, float]]:
    """Documents of a label in each split, and their share of the split."""
    return [
        (int(count), count / max(size, 1)) for count, size in zip(counts.to_numpy()[label], sizes.values(), strict=True)
    ]


def _together(train: datasets.Dataset, names: Sequence[str]) -> dict[str, Any] | None:
    """Labels that occur together, where a document may have several."""
    if not is_multi_label(train):
        return None
    label_BK = label_array(train)
    counts = label_counts(label_BK, len(names))
    return {
        "mean": float(label_BK.sum(axis=1).mean()),
        "num_without": int((label_BK.sum(axis=1) == 0).sum()),
        "pairs": [
            {
                "first": names[first],
                "second": names[second],
                "both": both,
                "shares": (both / counts[first], both / counts[second]),
            }
            for first, second, both in labels_together(label_BK, 20)
        ],
    }


def _histogram_axis(num_tokens: pd.Series) -> tuple[int, int]:
    """The ends of the logarithmic axis of every histogram, of which the lower is above 0 and below the other."""
    low = max(int(num_tokens.min()), 1)
    return low, max(int(num_tokens.max()), low + 1)


def _limit(num_tokens: pd.Series, body_length: int, overlap: int, max_chunks: int) -> dict[str, Any]:
    """The longest document that is not cut, and its position on the histograms' axis (None: beyond them)."""
    low, high = _histogram_axis(num_tokens)
    limit = max_chunks * (body_length - overlap) + overlap
    return {
        "low": low,
        "high": high,
        "limit": limit,
        "position": BINS * np.log(limit / low) / np.log(high / low) if low < limit < high else None,
    }


def _histogram(num_tokens: np.ndarray, low: int, high: int) -> str:
    """A histogram as an SVG path, one unit wide for each bin and one unit high."""
    counts, _ = np.histogram(np.log(np.maximum(num_tokens, low)), BINS, (np.log(low), np.log(high)))
    heights = counts / max(counts.max(), 1)
    return "".join(f"M{i} 1V{1 - height:.2f}h1V1z" for i, height in enumerate(heights) if height)


def _lengths(
    documents: pd.DataFrame,
    labelled: pd.DataFrame,
    splits: Sequence[str],
    names: Sequence[str],
    listed: Sequence[int],
) -> list[dict[str, Any]]:
    """Quantiles and a histogram of the tokens of all documents and of each label, in all splits and in each."""
    axis = _histogram_axis(documents["num_tokens"])
    groups = []
    for label in (None, *listed):
        own = documents if label is None else labelled[labelled["label"] == label]
        parts = {"all splits": own} | {split: own[own["split"] == split] for split in splits}
        rows = [
            {
                "split": split,
                "num_documents": len(part),
                "quantiles": np.quantile(part["num_tokens"], QUANTILES).round().astype(int).tolist(),
                "histogram": _histogram(part["num_tokens"].to_numpy(), *axis),
            }
            for split, part in parts.items()
            if len(part)
        ]
        if rows:
            groups.append({"label": "All labels" if label is None else names[label], "rows": rows})
    return groups


def _coverage(
    documents: pd.DataFrame,
    labelled: pd.DataFrame,
    splits: Sequence[str],
    names: Sequence[str],
    listed: Sequence[int],
    geometry: dict[str, int],
) -> list[dict[str, Any]]:
    """What `max_chunks` cuts of all documents, of each split and of each label."""
    parts = [("All documents", documents)]
    parts += [(split, documents[documents["split"] == split]) for split in splits]
    parts += [(names[label], labelled[labelled["label"] == label]) for label in listed]
    return [{"name": name, **coverage(part["num_tokens"].to_numpy(), **geometry)} for name, part in parts if len(part)]


def _vocabulary(
    documents: pd.DataFrame, labelled: pd.DataFrame, names: Sequence[str], listed: Sequence[int]
) -> list[dict[str, Any]]:
    """Unknown tokens and bytes per token, of all documents and of each label."""
    rows = []
    for label in (None, *listed):
        part = documents if label is None else labelled[labelled["label"] == label]
        num_tokens, num_bytes, num_unknown = part[["num_tokens", "num_bytes", "num_unknown"]].sum().tolist()
        if num_tokens:
            rows.append(
                {
                    "name": "All labels" if label is None else names[label],
                    "num_tokens": num_tokens,
                    "num_unknown": num_unknown,
                    "unknown_share": num_unknown / num_tokens,
                    "bytes_per_token": num_bytes / num_tokens,
                }
            )
    return rows


def _issue(problem: str, issue: dict[str, Any]) -> dict[str, Any]:
    rows = [visible_name(row, 160) for row in issue["rows"][:MAX_ROWS]]
    description = DESCRIPTIONS.get(problem, problem)
    return {"problem": description, "decision": issue["decision"], "count": len(issue["rows"]), "rows": rows}


def _unread(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    names = manifest.get("unread_files", [])
    rows = [visible_name(name, 160) for name in names[:MAX_ROWS]]
    return (
        [{"problem": "files that are not read", "decision": "left out", "count": len(names), "rows": rows}]
        if names
        else []
    )


def _pairs(
    duplicates: Sequence[DuplicatePair], splits: datasets.DatasetDict, names: Sequence[str]
) -> list[dict[str, Any]]:
    label_of = _labels_of(splits, {id_ for pair in duplicates for id_ in (pair.first, pair.second)})
    pairs = []
    for pair in duplicates:
        texts: tuple[Pieces, ...]
        if pair.kind == "duplicate":
            texts = differences(pair.first_text, pair.second_text)
        else:  # the texts of a group need not have anything in common
            texts = (
                [(beginning(pair.first_text, EXCERPT // 4), False)],
                [(beginning(pair.second_text, EXCERPT // 4), False)],
            )
        sides = [
            {
                "id": visible_name(id_),
                "split": split or "dropped",
                "label": shown_labels(label_of[id_], names) if id_ in label_of else "",
                "text": text,
            }
            for id_, split, text in zip(pair[:2], pair[2:4], texts, strict=True)
        ]
        found = [side["label"] for side in sides]
        pairs.append(
            {
                "sides": sides,
                "is_duplicate": pair.kind == "duplicate",
                "is_identical": pair.first_text == pair.second_text,
                "labels_differ": pair.kind == "duplicate" and all(found) and found[0] != found[1],
            }
        )
    return pairs


def _labels_of(splits: datasets.DatasetDict, ids: set[str]) -> dict[str, int | list[int]]:
    """Labels of the documents with these ids, without loading the others."""
    labels: dict[str, int | list[int]] = {}
    for part in splits.values():
        table = part.select_columns(["id", "label"]).with_format("arrow")[:]
        table = table.filter(pc.is_in(table["id"], value_set=pa.array(sorted(ids), table["id"].type)))
        labels |= zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True)
    return labels


def _extremes(
    documents: pd.DataFrame, splits: datasets.DatasetDict, names: Sequence[str]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """The longest and the shortest documents."""
    by_length = documents.sort_values("num_tokens", kind="stable")
    shown = min(MAX_EXTREMES, (len(documents) + 1) // 2)
    result = []
    for title, part in (("Longest", by_length[::-1][:shown]), ("Shortest", by_length[:shown])):
        rows = []
        for split, row, num_tokens in part[["split", "row", "num_tokens"]].itertuples(index=False):
            columns = splits[split].select_columns(["id", "text", "label"])[row]
            first, last = first_and_last_words(columns["text"])
            rows.append(
                {
                    "id": visible_name(columns["id"]),
                    "label": shown_labels(columns["label"], names),
                    "split": split,
                    "num_tokens": num_tokens,
                    "first": first,
                    "last": last,
                    "beginning": beginning(columns["text"], EXCERPT),
                }
            )
        result.append((title, rows))
    return result


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    geometry = manifest["geometry_of_coverage"]
    return [
        *(("Source", visible_name(source["name"])) for source in manifest["sources"]),
        ("Tokenizer", visible_name(manifest["tokenizer"]["name"])),
        (
            "Chunks",
            f"{geometry['chunk_length']} tokens, overlap {geometry['chunk_overlap']}, at most {geometry['max_chunks']}; "
            "training has its own options",
        ),
        ("Seed of the splits", str(manifest["seed"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())),
    ]
