"""The folds of scripts.benchmark.quality: documents prepared once and split into one dataset per fold."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from sklearn.model_selection import StratifiedGroupKFold

from data.chunk_dataset import ChunkVectorDocuments
from data.collator import DocumentCollator
from data.deduplication import join_groups, near_duplicates
from data.documents import Columns, shorten, to_name
from data.labels import label_array, label_counts, label_names, label_sets
from data.preparation import prepare_dataset
from data.prepared_dataset import load_prepared, save_prepared
from data.readers import read_rows
from data.source_files import SPLITS
from data.splits import make_splits, stratified_parts
from data.tokenization import load_tokenizer
from modeling.training.runtime import use_flash_attention_on_cuda
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.benchmark.candidates import Candidate, caches_all_chunks
from scripts.common.cli import comma_list
from scripts.common.recipe import parse_with_recipe
from scripts.evaluation.kinds import kind_of
from scripts.training.arguments import DataArguments, ModelArguments
from scripts.training.embedding_cache import cache_key, cached_chunk_vectors, vector_files, write_vectors
from scripts.training.setup import build_model, chunk_splits

VALIDATION_SHARE = 1 / 8


def columns_of(source: str, wanted: list[str]) -> Callable[[str], dict[str, Any]]:
    """Map document ids to column values."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_rows(source), 1):
        # Of rows with the same id the first is used (--drop duplicate_id).
        rows.setdefault(to_name(row.get("id")) or f"row-{number}", {column: row.get(column) for column in wanted})
    return lambda id_: rows.get(id_, dict.fromkeys(wanted))


class Folds:
    """The documents, prepared once, and each fold as a dataset of its own: `fold-0`, `fold-1`, …

    Attributes:
        whole: all documents in one order.
        kind: one label a document or several.
        rows: for each fold its splits, as rows of `whole`.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.folder, self.encoder = arguments.output_dir, arguments.encoder
        self.tokenizer = load_tokenizer(arguments.encoder)
        prepared = self.folder / "whole"
        if not prepared.exists():
            columns = Columns(split="none", **arguments.several_labels)
            names = comma_list(arguments.labels or "")
            drop = comma_list(arguments.drop or "")
            prepare_dataset(arguments.source, arguments.encoder, prepared, columns=columns, labels=names, drop=drop)
        splits, self.manifest = load_prepared(str(prepared), self.tokenizer)
        self.whole = datasets.concatenate_datasets(list(splits.values()))
        self.kind = kind_of(self.whole)
        column_of = columns_of(arguments.source, ["group", *filter(None, [arguments.fold_column])])
        group_of = [to_name(column_of(id_)["group"]) for id_ in self.whole["id"]]
        groups = np.asarray(join_groups(group_of, near_duplicates(self.whole["text"])))
        if arguments.fold_column:
            fold_of = self._folds_from_column(arguments.fold_column, column_of, groups)
        else:
            fold_of = self._stratified_folds(arguments.folds, groups)
        self.names = sorted(set(fold_of))
        if not arguments.fold_column and len(self.names) < arguments.folds:
            raise ValueError(
                f"The documents, with groups and near-duplicates kept together, make {len(self.names)} folds only, not "
                f"{arguments.folds}: set --folds {len(self.names)} or add documents."
            )
        self.rows: list[dict[str, list[int]]] = []
        for number, fold_name in enumerate(self.names):
            test = [row for row, fold in enumerate(fold_of) if fold == fold_name]
            rest = [row for row, fold in enumerate(fold_of) if fold != fold_name]
            shares = (1 - VALIDATION_SHARE, VALIDATION_SHARE, 0.0)
            own = label_sets(self.whole.select(rest)["label"])
            split_of = make_splits(own, groups[rest].tolist(), shares, seed=number)
            assigned = list(zip(rest, split_of, strict=True))
            chosen = {split: [row for row, name in assigned if name == split] for split in SPLITS}
            self.rows.append(chosen | {"test": test})
        self._check_labels()

    def _folds_from_column(
        self, column: str, column_of: Callable[[str], dict[str, Any]], groups: np.ndarray
    ) -> list[str]:
        fold_of = [to_name(column_of(id_)[column]) for id_ in self.whole["id"]]
        if not any(fold_of):
            raise ValueError(f"No document has a value in the column {column!r}: is there such a column?")
        if missing := [id_ for id_, fold in zip(self.whole["id"], fold_of, strict=True) if not fold]:
            raise ValueError(f"{len(missing)} documents have no value in {column!r}, for example {missing[0]}.")
        if len(set(fold_of)) < 2:
            raise ValueError(f"The column {column!r} names one fold only.")
        num_split = len(set(zip(groups.tolist(), fold_of, strict=True))) - len(set(groups.tolist()))
        if num_split:
            print(f"Warning: {num_split} groups or near-duplicates span several folds: figures are optimistic.")
        return fold_of

    def _stratified_folds(self, num_folds: int, groups: np.ndarray) -> list[str]:
        if self.kind.is_multi_label:
            shares = [1 / num_folds] * num_folds
            parts = stratified_parts(label_sets(self.whole["label"]), groups.tolist(), shares, seed=0)
            return [str(part) for part in parts]
        labels, fold_of = label_array(self.whole), [""] * len(groups)
        split = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0).split(labels, labels, groups)
        for number, (_, rows) in enumerate(split):
            for row in rows:
                fold_of[row] = str(number)
        return fold_of

    def _check_labels(self) -> None:
        """Raise ValueError if a label cannot be learned in some fold."""
        names, labels = label_names(self.whole), label_array(self.whole)
        counts = np.stack([label_counts(labels[rows["train"]], len(names)) for rows in self.rows])
        if missing := [name for name, least in zip(names, counts.min(axis=0), strict=True) if least == 0]:
            raise ValueError(
                f"{len(missing)} of {len(names)} labels have no training document in some fold: {shorten(missing, 20)}. Leave "
                "them out of the source, or add documents."
            )

    def path(self, number: int) -> Path:
        """The fold's dataset, written when it is first needed."""
        path = self.folder / f"fold-{number}"
        if not path.exists():
            parts = {split: self.whole.select(rows) for split, rows in self.rows[number].items()}
            about = {key: value for key, value in self.manifest.items() if key != "splits"}
            save_prepared(datasets.DatasetDict(parts), path, about | {"fold": self.names[number]})
        return path

    def cache_vectors(self, candidate: Candidate) -> ChunkVectorDocuments | None:
        """Encode all documents once for a candidate with a frozen encoder, and distribute the vectors over the folds.

        With the policy `lexical`, each fold's features select other chunks: its runs encode them."""
        if not caches_all_chunks(candidate.options()):
            return None
        kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
        changes = [f"--{name}={value}" for name, value in candidate.changed.items()]
        paths = [f"--encoder={self.encoder}", "--dataset_dir=unused", "--output_dir=unused"]
        model_args, _, args = parse_with_recipe(kinds, ["--config", candidate.recipe, *changes, *paths])
        mixed_precision = "no" if args.precision == "fp32" else args.precision
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=args.use_cpu)
        model = build_model(model_args, self.kind.names, args, self.tokenizer, self.kind.problem_type)
        use_flash_attention_on_cuda()
        documents, _ = chunk_splits(datasets.DatasetDict(whole=self.whole), self.tokenizer, model, args)
        collator = DocumentCollator(self.tokenizer.pad_token_id)
        cache = self.folder / "whole" / ".chunk_vectors" / cache_key(model, self.manifest, args.precision)
        whole = cached_chunk_vectors(model, documents, collator, cache, accelerator)["whole"]
        for number in range(len(self.rows)):
            folder = self.path(number)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            fold_cache = folder / ".chunk_vectors" / cache_key(model, manifest, args.precision)
            for split, rows in self.rows[number].items():
                (fold_cache / split).mkdir(parents=True, exist_ok=True)
                for indices, path in vector_files(fold_cache / split, len(rows)).items():
                    if not path.exists():
                        write_vectors(path, (whole.document_vectors(rows[index]) for index in indices))
        return whole
