"""Which recipe rates best, by a protocol that cannot fool itself.

    python -m scripts.benchmark.quality --source films.parquet --labels General,Teen,Mature --fold_column fold \\
        --encoder outputs/minilm --output_dir outputs/quality \\
        --candidate films=scripts/recipes/films_cpu.yaml \\
        --candidate no_words=scripts/recipes/films_cpu.yaml,lexical_features=0

Every candidate (a recipe, with options changed) is trained by train_hf.py on each fold with each seed; it chooses its
epoch on validation documents that are taken from the training folds, and is measured on the fold that it never saw. The
baselines stand on the same folds, and may train on the validation documents too. What is there already is not run again: a
protocol that was stopped goes on. Writes quality.json and quality.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from accelerate import Accelerator
from scipy.special import softmax
from sklearn.model_selection import StratifiedGroupKFold

from data.chunk_dataset import ChunkedDocuments, ChunkVectorDocuments
from data.collator import DocumentCollator
from data.deduplication import join_groups, near_duplicates
from data.documents import Columns, to_label
from data.preparation import describe_source, prepare_dataset
from data.prepared_dataset import load_prepared, save_prepared
from data.readers import read_rows
from data.splits import make_splits
from data.tokenization import load_tokenizer
from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.losses import balanced_class_weights
from modeling.training.runtime import use_flash_attention_on_cuda
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.benchmark.quality_table import markdown, summary
from scripts.common.cli import UserParser, comma_list, run_main
from scripts.common.predictions_io import write_predictions
from scripts.evaluation.baselines import majority_predictions, tfidf_scores, vector_scores
from scripts.training.embedding_cache import cache_key, cached_chunk_vectors, vector_files, write_vectors
from scripts.training.fit_lexical_features import lexical_logits, lexical_weights

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 1 / 8
BASELINES = ("tfidf", "words_alone", "first_chunk", "head_tail", "majority")
GEOMETRY: dict[str, Any] = {"chunk_length": 512, "chunk_overlap": 0, "max_chunks": 20, "chunk_policy": "uniform"}


@dataclass
class Candidate:
    """A recipe with options changed."""

    name: str
    recipe: str
    changed: dict[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What it gives train_hf.py."""
        return (yaml.safe_load(Path(self.recipe).read_text(encoding="utf-8")) or {}) | {
            name: yaml.safe_load(value) for name, value in self.changed.items()
        }


def parse_candidate(text: str) -> Candidate:
    """`NAME=RECIPE.yaml[,option=value…]`.

    Raises:
        ValueError: it is not of this form, or there is no such recipe.
    """
    name, sign, rest = text.partition("=")
    recipe, *changes = rest.split(",")
    changed = dict(change.partition("=")[::2] for change in changes)
    if not sign or not name or not all(changed.values()) or set(name) & set("/\\ "):
        raise ValueError(f"--candidate takes NAME=RECIPE.yaml[,option=value…]; got {text!r}.")
    if name in BASELINES or name.startswith("."):
        raise ValueError(f"--candidate {name}: choose another name; {', '.join(BASELINES)} are the baselines'.")
    if not Path(recipe).is_file():
        raise ValueError(f"--candidate {name}: there is no recipe {recipe!r}.")
    candidate = Candidate(name, recipe, changed)
    try:
        candidate.options()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"--candidate {name}: {recipe} is no recipe, a YAML mapping of options to values.") from error
    return candidate


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, help="documents with labels: CSV, JSONL, Parquet and the like")
    add("--encoder", required=True, help="name on the hub or folder")
    add("--output_dir", required=True, type=Path)
    add("--candidate", action="append", required=True, help="NAME=RECIPE.yaml[,option=value…]; may be given again")
    add("--labels", help="in their order, mildest first")
    add(
        "--folds",
        type=int,
        default=5,
        help="made here, stratified, groups and near-duplicates together, where --fold_column is not given",
    )
    add("--fold_column", help="a column of the source that tells each document's fold")
    add("--seeds", default="1,2,3")
    add("--drop", default="", help="as for scripts.prepare_dataset")
    add("--cpu_threads", type=int, default=0)
    arguments = parser.parse_args()
    try:
        arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds takes numbers such as 1,2,3; got {arguments.seeds!r}.") from None
    if arguments.folds < 2:
        raise ValueError(f"--folds must be at least 2, and is {arguments.folds}.")
    arguments.candidate = [parse_candidate(text) for text in arguments.candidate]
    names = [candidate.name for candidate in arguments.candidate]
    if len(set(names)) < len(names):
        raise ValueError(f"Two candidates have one name: {', '.join(names)}.")
    return arguments


# ---- the folds -------------------------------------------------------------------------------------------------------


def check_protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    """What stands in output_dir must have come of the same documents, folds and options; documents that no run has read
    are prepared again where they did not. Returns what protocol.json is to hold.

    Raises:
        ValueError: it did not.
    """
    path = arguments.output_dir / "protocol.json"
    keys = ("source", "labels", "drop", "encoder", "fold_column", *([] if arguments.fold_column else ["folds"]))
    terms: dict[str, Any] = {key: getattr(arguments, key) for key in keys}
    terms["source"] = describe_source(arguments.source)
    candidates = {candidate.name: candidate.options() for candidate in arguments.candidate}
    before = json.loads(path.read_text()) if path.exists() else {"terms": terms, "candidates": {}}
    # A candidate whose options train_hf.py refused has no epoch yet, and may be mended.
    runs = arguments.output_dir / "runs"
    epochs = ("checkpoint-*", "training_history.json", "cost.json")
    begun = {name for name in before["candidates"] if any(any((runs / name).glob(f"*/{what}")) for what in epochs)}
    before["candidates"] = {name: options for name, options in before["candidates"].items() if name in begun}
    if path.exists() and before["terms"] != terms and not any(runs.glob("*/*/cost.json")):
        for folder in (arguments.output_dir / "whole", *arguments.output_dir.glob("fold-*")):
            shutil.rmtree(folder, ignore_errors=True)
    elif before["terms"] != terms:
        changed = [key for key in before["terms"].keys() | terms.keys() if before["terms"].get(key) != terms.get(key)]
        raise ValueError(f"{path.parent} holds figures of another {', '.join(sorted(changed))}: name another folder.")
    known = before["candidates"]
    if changed := [name for name, options in candidates.items() if known.get(name, options) != options]:
        raise ValueError(
            f"{path.parent} has runs of {', '.join(changed)} with other options: choose another name for it."
        )
    # first_chunk and head_tail stand on the vectors of the first candidate whose encoder is frozen.
    frozen = [options for options in candidates.values() if options.get("freeze_encoder")]
    lengths = [options.get("chunk_length", GEOMETRY["chunk_length"]) for options in frozen]
    first_length = before.get("first_chunk_length") or next(iter(lengths), None)
    return {"terms": terms, "candidates": known | candidates, "first_chunk_length": first_length}


def columns_of(source: str, wanted: list[str]) -> Callable[[str], dict[str, Any]]:
    """Document's id → its row's values of some columns."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_rows(source), 1):
        # Of rows with one id the first is the document (--drop duplicate_id).
        rows.setdefault(to_label(row.get("id")) or f"row-{number}", {column: row.get(column) for column in wanted})
    return lambda id_: rows.get(id_, dict.fromkeys(wanted))


class Folds:
    """The documents, prepared once, and each fold as a data set of its own: `fold-0`, `fold-1`, …

    Attributes:
        whole: all documents in one order.
        rows: for each fold its splits, as rows of `whole`.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.folder, self.encoder = arguments.output_dir, arguments.encoder
        self.tokenizer = load_tokenizer(arguments.encoder)
        prepared = self.folder / "whole"
        if not prepared.exists():
            columns, names = Columns(split="none"), comma_list(arguments.labels or "")
            drop = comma_list(arguments.drop or "")
            prepare_dataset(arguments.source, arguments.encoder, prepared, columns=columns, labels=names, drop=drop)
        splits, self.manifest = load_prepared(str(prepared), self.tokenizer)
        self.whole = datasets.concatenate_datasets(list(splits.values()))
        labels = np.asarray(self.whole["label"])
        column_of = columns_of(arguments.source, ["group", *filter(None, [arguments.fold_column])])
        group_of = [to_label(column_of(id_)["group"]) for id_ in self.whole["id"]]
        groups = np.asarray(join_groups(group_of, near_duplicates(self.whole["text"])))
        if arguments.fold_column:
            fold_of = self._folds_given(arguments.fold_column, column_of, groups)
        else:
            fold_of = self._folds_made(arguments, labels, groups)
        self.names = sorted(set(fold_of))
        self.rows: list[dict[str, list[int]]] = []
        for number, name in enumerate(self.names):
            test = [row for row, fold in enumerate(fold_of) if fold == name]
            rest = [row for row, fold in enumerate(fold_of) if fold != name]
            shares = (1 - VALIDATION_SHARE, VALIDATION_SHARE, 0.0)
            split_of = make_splits(labels[rest].tolist(), groups[rest].tolist(), shares, seed=number)
            chosen = {split: [row for row, its in zip(rest, split_of, strict=True) if its == split] for split in SPLITS}
            self.rows.append(chosen | {"test": test})

    def _folds_given(self, column: str, column_of: Callable[[str], dict[str, Any]], groups: np.ndarray) -> list[str]:
        fold_of = [to_label(column_of(id_)[column]) for id_ in self.whole["id"]]
        if absent := [id_ for id_, fold in zip(self.whole["id"], fold_of, strict=True) if not fold]:
            raise ValueError(f"{len(absent)} documents have nothing in {column!r}, {absent[0]} for one.")
        if len(set(fold_of)) < 2:
            raise ValueError(f"The column {column!r} names one fold only.")
        torn = len(set(zip(groups.tolist(), fold_of, strict=True))) - len(set(groups.tolist()))
        if torn:
            print(f"Warning: {torn} groups or near-duplicates stand in several of the folds given: figures flatter.")
        return fold_of

    @staticmethod
    def _folds_made(arguments: argparse.Namespace, labels: np.ndarray, groups: np.ndarray) -> list[str]:
        fold_of = [""] * len(labels)
        split = StratifiedGroupKFold(arguments.folds, shuffle=True, random_state=0).split(labels, labels, groups)
        for number, (_, rows) in enumerate(split):
            for row in rows:
                fold_of[row] = str(number)
        return fold_of

    def path(self, number: int) -> Path:
        """The fold's data set, written now where it is not there yet."""
        path = self.folder / f"fold-{number}"
        if not path.exists():
            parts = {split: self.whole.select(rows) for split, rows in self.rows[number].items()}
            about = {key: value for key, value in self.manifest.items() if key != "splits"}
            save_prepared(datasets.DatasetDict(parts), path, about | {"fold": self.names[number]})
        return path

    def keep_vectors(self, candidate: Candidate) -> ChunkVectorDocuments | None:
        """Encode all documents once for a candidate with a frozen encoder, and deal their vectors out to the folds."""
        options = candidate.options()
        if not options.get("freeze_encoder"):
            return None
        geometry: dict[str, Any] = {name: options.get(name, default) for name, default in GEOMETRY.items()}
        chosen: Any = {name: options[name] for name in ("bf16", "fp16") if name in options}
        args = HierarchicalTrainingArguments(output_dir=str(self.folder / "unused"), **chosen)
        precision = args.precision
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=args.use_cpu)
        num_labels = self.whole.features["label"].num_classes
        dropouts: dict[str, Any] = {name: options.get(name) for name in ("dropout", "attention_dropout")}
        model = HierarchicalRobertaForSequenceClassification.from_encoder(
            self.encoder, num_labels=num_labels, **geometry, **dropouts
        )
        model.freeze_encoder()
        model.token_budget = options.get("token_budget")
        use_flash_attention_on_cuda()
        documents = ChunkedDocuments(self.whole, self.tokenizer, **geometry)
        key = cache_key(model, self.manifest, precision)
        collator = DocumentCollator(self.tokenizer.pad_token_id)
        cache = self.folder / "whole" / ".chunk_vectors" / key
        whole = cached_chunk_vectors(model, {"whole": documents}, collator, cache, accelerator)["whole"]
        for number in range(len(self.rows)):
            folder = self.path(number)
            manifest = json.loads((folder / "manifest.json").read_text())
            kept = folder / ".chunk_vectors" / cache_key(model, manifest, precision)
            for split, rows in self.rows[number].items():
                (kept / split).mkdir(parents=True, exist_ok=True)
                for places, path in vector_files(kept / split, len(rows)).items():
                    if not path.exists():
                        write_vectors(path, (whole.document_vectors(rows[place]) for place in places))
        return whole


# ---- what is compared ------------------------------------------------------------------------------------------------


def run_once(command: list[str], log: Path) -> float:
    """A command in a process of its own: the seconds that it took.

    Raises:
        ValueError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status:
        said = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        raise ValueError(f"{' '.join(command[1:3])} … failed: {said[-1] if said else 'see'} ({log})")
    return time.perf_counter() - started


def train_candidate(candidate: Candidate, folds: Folds, number: int, seed: int, arguments: argparse.Namespace) -> bool:
    """One training, unless its predictions are there: whether they were not."""
    folder = folds.folder / "runs" / candidate.name / f"fold-{number}-seed-{seed}"
    if (folder / "cost.json").exists():
        return False
    given = candidate.changed | {"dataset_dir": folds.path(number), "encoder": folds.encoder, "output_dir": folder}
    given |= {
        "seed": seed,
        "cpu_threads": arguments.cpu_threads,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
    }
    given |= {"evaluate_kept_vectors": bool(candidate.options().get("freeze_encoder"))}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    was_begun = any(folder.glob("checkpoint-*"))
    seconds = run_once([sys.executable, "train_hf.py", "--config", candidate.recipe, *options], Path(f"{folder}.log"))
    history = json.loads((folder / "training_history.json").read_text())
    peak = max(epoch["peak_memory_gib"] for epoch in history["epochs"]) * 1024
    # What a run took that was stopped in between nobody knows.
    write_json(folder / "cost.json", {"seconds": None if was_begun else seconds, "peak_mib": peak})
    for path in (*folder.glob("checkpoint-*"), *folder.glob("model.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def baseline_scores(folds: Folds, vectors: ChunkVectorDocuments | None) -> dict[str, Callable[[int], np.ndarray]]:
    """Name → what gives the scores (B, K) of a fold's test documents."""
    labels = np.asarray(folds.whole["label"])
    num_labels = folds.whole.features["label"].num_classes

    def parts(number: int) -> tuple[datasets.Dataset, datasets.Dataset]:
        rows = folds.rows[number]
        return folds.whole.select(rows["train"] + rows["validation"]), folds.whole.select(rows["test"])

    def majority(number: int) -> np.ndarray:
        return np.eye(num_labels)[majority_predictions(*parts(number))]

    def words(number: int) -> np.ndarray:
        train, test = (
            ChunkedDocuments(part, folds.tokenizer, **(GEOMETRY | {"max_chunks": 10**6})) for part in parts(number)
        )
        balanced = balanced_class_weights(np.asarray(train.documents["label"]).tolist(), num_labels)
        fitted = lexical_weights(train, num_labels, 1000, len(folds.tokenizer), balanced)
        return softmax(lexical_logits(test, *fitted, len(folds.tokenizer)), axis=1)

    def ends(which: list[int]) -> Callable[[int], np.ndarray]:
        assert vectors is not None
        of_BD = np.stack([vectors.document_vectors(row)[which].ravel() for row in range(len(vectors))])

        def scores(number: int) -> np.ndarray:
            rows = folds.rows[number]
            train = rows["train"] + rows["validation"]
            return vector_scores(of_BD[train], labels[train], of_BD[rows["test"]], num_labels)

        return scores

    found = {"tfidf": lambda number: tfidf_scores(*parts(number)), "majority": majority, "words_alone": words}
    return found | ({"first_chunk": ends([0]), "head_tail": ends([0, -1])} if vectors is not None else {})


def rate_by_baselines(folds: Folds, vectors: ChunkVectorDocuments | None) -> None:
    """Predictions of each baseline on each fold, unless they are there."""
    names = folds.whole.features["label"].names
    for name, scores in baseline_scores(folds, vectors).items():
        for number, rows in enumerate(folds.rows):
            folder = folds.folder / "runs" / name / f"fold-{number}-seed-0"
            if (folder / "cost.json").exists():
                continue
            started = time.perf_counter()
            folder.mkdir(parents=True, exist_ok=True)
            write_predictions(folder / "predictions_test.csv", folds.whole.select(rows["test"]), names, scores(number))
            write_json(folder / "cost.json", {"seconds": time.perf_counter() - started, "peak_mib": None})


def main() -> None:
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    protocol = check_protocol(arguments)
    write_json(arguments.output_dir / "protocol.json", protocol)
    folds = Folds(arguments)
    sizes = ", ".join(str(len(rows["test"])) for rows in folds.rows)
    print(f"{len(folds.whole)} documents in {len(folds.rows)} folds ({sizes})", flush=True)
    vectors = None
    for candidate in arguments.candidate:
        kept = folds.keep_vectors(candidate)
        vectors = vectors or kept
    rate_by_baselines(folds, vectors)
    for number in range(len(folds.rows)):
        for candidate in arguments.candidate:
            for seed in arguments.seeds:
                started = time.perf_counter()
                is_new = train_candidate(candidate, folds, number, seed, arguments)
                took = f"{time.perf_counter() - started:.0f} s" if is_new else "there already"
                print(f"fold {number}, {candidate.name}, seed {seed}: {took}", flush=True)
        systems = {candidate.name: arguments.seeds for candidate in arguments.candidate}
        systems |= {name: [0] for name in BASELINES if (folds.folder / "runs" / name).exists()}
        measured = summary(folds.folder / "runs", folds.whole.features["label"].names, systems)
        measured["first_chunk_length"] = protocol["first_chunk_length"]
        write_json(folds.folder / "quality.json", measured)
        write_text(folds.folder / "quality.md", markdown(measured))
    print(markdown(measured))


if __name__ == "__main__":
    sys.exit(run_main(main))
