"""Documents → a tokenized, checked, split data set on disk.

    python -m scripts.prepare_dataset --source stories.csv --tokenizer FacebookAI/roberta-base \\
        --labels General,Teen,Mature --output_dir outputs/stories
"""

import argparse
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.chunking import special_token_frame
from data.documents import KEEPABLE, PROBLEMS, SPLITS, Columns, Findings, read_documents, shorten
from data.prepared import (
    LEGACY_FILES,
    MANIFEST,
    beside,
    clear_leftovers,
    describe,
    files_of,
    read_legacy,
    save_prepared,
    sha256_of,
    tokenize_documents,
    tokenizer_fingerprint,
)
from data.sources import label_names_of
from data.splits import near_duplicates, split_documents, without_leaks
from scripts.command_line import UserParser, run_main

COLUMN_KINDS = ("text", "label", "id", "split", "group", "evidence")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="CSV, JSONL or Parquet file; folder of text files, one folder a label; saved "
        "datasets folder; folder with train_dataset.pt and the like; data set on the hub",
    )
    add("--tokenizer", required=True, help="the encoder whose tokenizer is used: name on the hub or folder")
    add("--output_dir", required=True, type=Path)
    for kind in COLUMN_KINDS:
        add(f"--{kind}_column", default=getattr(Columns, kind), help=f"default {getattr(Columns, kind)}")
    add("--labels", help="the labels in their order, mildest first where they have one: General,Teen,Mature")
    add("--split_fractions", default="0.8,0.1,0.1", help="train,validation,test where the source has no splits")
    add("--drop", default="", help=f"leave such rows out: {','.join(PROBLEMS)}")
    add("--keep", default="", help=f"take such rows all the same: {','.join(KEEPABLE)}")
    add(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: an error, or U+FFFD",
    )
    add("--num_proc", type=int, default=1, help="processes that tokenize (one uses all cores already)")
    add("--seed", type=int, default=42, help="of the splits made here")
    add(
        "--chunk_length",
        type=int,
        default=512,
        help="for the report of what max_chunks leaves unread; it and the two below can be chosen again in training",
    )
    add("--chunk_overlap", type=int, default=0)
    add("--max_chunks", type=int, default=20)
    add("--overwrite", action="store_true", help="replace an output_dir that is there already")
    arguments = parser.parse_args(argv)
    for option, allowed in (("drop", PROBLEMS), ("keep", KEEPABLE)):
        chosen = comma_list(getattr(arguments, option))
        setattr(arguments, option, chosen)
        if unknown := [problem for problem in chosen if problem not in allowed]:
            raise ValueError(f"--{option} takes {', '.join(allowed)}; got {', '.join(unknown)}.")
    if both := set(arguments.drop) & set(arguments.keep):
        raise ValueError(f"{', '.join(sorted(both))} stands in --drop and in --keep: choose one.")
    try:
        arguments.split_fractions = [float(share) for share in arguments.split_fractions.split(",")]
    except ValueError:
        raise ValueError(
            f"--split_fractions takes three shares such as 0.8,0.1,0.1; got {arguments.split_fractions}."
        ) from None
    arguments.labels = comma_list(arguments.labels or "") or None
    if arguments.labels and len(set(arguments.labels)) != len(arguments.labels):
        raise ValueError(f"--labels names a label twice: {','.join(arguments.labels)}.")
    if arguments.num_proc < 1:
        raise ValueError(f"--num_proc must be at least 1, and is {arguments.num_proc}.")
    return arguments


def comma_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """The encoder's fast tokenizer. Raises ValueError where there is none, or it has no padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}. Expected a name on the hub (reachable or in the cache) or "
            f"a folder with tokenizer.json. ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of {name!r} has no padding token; expected an encoder's, such as RoBERTa's.")
    return tokenizer


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read, check, split, tokenize, save. Returns the manifest."""
    output_dir: Path = arguments.output_dir.resolve()
    check_output_dir(output_dir, arguments.overwrite)
    tokenizer = load_tokenizer(arguments.tokenizer)
    fingerprint = tokenizer_fingerprint(tokenizer)
    body_length = check_geometry(arguments, tokenizer)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output_dir)
    workspace = beside(output_dir, "documents")
    workspace.mkdir()
    try:
        findings = Findings()
        if (Path(arguments.source) / LEGACY_FILES["train"]).is_file():
            splits = read_legacy(Path(arguments.source), tokenizer, arguments.labels)
            splits, findings = check_legacy(splits, arguments)
        else:
            splits, findings = prepare_documents(arguments, tokenizer, workspace)
        manifest = {
            "sources": [describe_source(arguments.source)],
            "labels": splits["train"].features["label"].names,
            "tokenizer": {"name": arguments.tokenizer, "fingerprint": fingerprint},
            "seed": arguments.seed,
            "findings": {p: {"decision": findings.decisions[p], "rows": rows} for p, rows in findings.rows.items()},
            "geometry_of_coverage": {
                key: getattr(arguments, key) for key in ("chunk_length", "chunk_overlap", "max_chunks")
            },
            "splits": describe(splits, body_length, arguments.chunk_overlap, arguments.max_chunks),
            "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
            | {"python": platform.python_version()},
        }
        save_prepared(splits, output_dir, manifest)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return manifest


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raises ValueError where something stands that is not to be replaced."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not (output_dir / MANIFEST).is_file():
        raise ValueError(
            f"{output_dir} is there already and holds something else than a prepared data set: name another folder."
        )
    if not overwrite:
        raise ValueError(f"{output_dir} is there already: name another folder, or replace it with --overwrite.")


def prepare_documents(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, workspace: Path
) -> tuple[datasets.DatasetDict, Findings]:
    """Read the source, decide the splits, tokenize each."""
    columns = Columns(**{kind: getattr(arguments, f"{kind}_column") for kind in COLUMN_KINDS})
    labels = arguments.labels or label_names_of(arguments.source, arguments.label_column)
    documents, findings = read_documents(
        arguments.source, columns, labels, arguments.encoding_errors, arguments.drop, arguments.keep, str(workspace)
    )
    if labels is None:
        labels = sorted(
            set(documents["label"]), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
        )
        print(
            f"Labels, in the order of their names: {', '.join(labels)}. If they have an order of their own, give it "
            "with --labels: kappa and the severity weights go by it."
        )
    if len(labels) < 2:
        raise ValueError(f"There is one label only ({labels[0]!r}) in the column {columns.label!r}: nothing to learn.")
    split_of = split_documents(documents, findings, arguments.split_fractions, arguments.seed)
    splits, has_evidence = {}, any(documents["evidence"])
    for split in SPLITS:
        rows = [index for index, name in enumerate(split_of) if name == split]
        if rows:
            part = documents.select(rows)
            splits[split] = tokenize_documents(part, tokenizer, labels, arguments.num_proc, split, has_evidence)
    return datasets.DatasetDict(splits), findings


def check_legacy(splits: datasets.DatasetDict, arguments: argparse.Namespace) -> tuple[datasets.DatasetDict, Findings]:
    """The older tensors' documents, checked as those of any source: empty ones, and leaks across their splits."""
    findings = Findings(decisions=dict.fromkeys(arguments.drop, "dropped") | dict.fromkeys(arguments.keep, "kept"))
    whole = datasets.concatenate_datasets(list(splits.values()))
    split_of = [split for split, part in splits.items() for _ in part]
    empty = {index for index, text in enumerate(whole["text"]) if not text.strip()}
    for index in sorted(empty):
        findings.add("empty", whole[index]["id"])
    findings.raise_undecided()
    kept = without_leaks(whole["id"], [""] * len(whole), split_of, near_duplicates(whole["text"]), findings)
    if findings.decisions.get("empty") == "dropped":
        kept = ["" if index in empty else split for index, split in enumerate(kept)]
    chosen = {split: [index for index, name in enumerate(kept) if name == split] for split in splits}
    return datasets.DatasetDict({split: whole.select(rows) for split, rows in chosen.items()}), findings


def check_geometry(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> int:
    """Room for text in a chunk, in tokens. Raises ValueError for a geometry that cannot be."""
    body_length = arguments.chunk_length - sum(map(len, special_token_frame(tokenizer)))
    if not 0 <= arguments.chunk_overlap < body_length:
        raise ValueError(
            f"chunk_overlap ({arguments.chunk_overlap}) must be below chunk_length minus the special tokens "
            f"({body_length}): lower it or raise chunk_length."
        )
    if arguments.max_chunks < 1:
        raise ValueError(f"max_chunks must be at least 1, and is {arguments.max_chunks}.")
    return body_length


def describe_source(source: str) -> dict[str, Any]:
    """Name and, for a file, size and sha256: enough to see later whether it is still the same."""
    path = Path(source)
    if path.is_file():
        return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if path.is_dir():
        return {"name": path.resolve().name, "bytes": sum(file.stat().st_size for file in files_of(path))}
    return {"name": source, "is_on_hub": True}


def report(manifest: dict[str, Any]) -> str:
    """What was prepared, for people."""
    lines = []
    for problem, found in manifest["findings"].items():
        lines.append(f"{len(found['rows'])} with {PROBLEMS[problem]}: {found['decision']}: {shorten(found['rows'])}")
    for split, about in manifest["splits"].items():
        counts = ", ".join(f"{label} {count}" for label, count in about["labels"].items())
        cut = about["coverage"]
        lines.append(
            f"{split}: {about['documents']} documents ({counts}); tokens: median {about['tokens']['median']:.0f}, most "
            f"{about['tokens']['max']:.0f}; beyond max_chunks: {cut['documents_cut_share']:.1%} of documents, "
            f"{cut['tokens_cut_share']:.1%} of tokens"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    manifest = prepare(arguments)
    print(report(manifest))
    print(f"Prepared in {arguments.output_dir}")


if __name__ == "__main__":
    sys.exit(run_main(main))
