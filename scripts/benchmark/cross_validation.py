"""The runs of scripts.benchmark.quality: candidates trained by train_hf.py, and baselines, on every fold."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.chunk_dataset import ChunkedDocuments, ChunkVectorDocuments
from data.labels import MULTI, label_array, label_counts, label_names
from data.preparation import describe_source
from modeling.file_utils import write_json, write_text
from modeling.hierarchical_roberta.decision import softmax
from scripts.benchmark.candidates import BASELINES, GEOMETRY, LEXICAL_FEATURES, Candidate, caches_all_chunks
from scripts.benchmark.folds import Folds
from scripts.benchmark.quality_table import markdown, summary
from scripts.common.launch import run_to_end
from scripts.common.predictions_io import write_predictions
from scripts.evaluation.single_label import highest
from scripts.evaluation.statistics import Prediction, TextBaseline
from scripts.training.fit_lexical_features import fit_lexical_features, lexical_logits


def check_protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare output_dir's protocol with this one, and delete folds of other data that no run has used yet.

    Returns:
        What protocol.json is to hold.

    Raises:
        ValueError: output_dir holds runs on other documents, folds or options.
    """
    path = arguments.output_dir / "protocol.json"
    keys = ("source", "labels", "drop", "encoder", "fold_column", *([] if arguments.fold_column else ["folds"]))
    terms: dict[str, Any] = {key: getattr(arguments, key) for key in keys}
    terms["source"] = describe_source(arguments.source)
    terms["baselines"] = {"words_alone": LEXICAL_FEATURES}
    if arguments.several_labels["problem_type"] == MULTI:
        terms["several_labels"] = arguments.several_labels
        terms["baselines"]["tfidf_tuned"] = "class weights by average precision"
    candidates = {candidate.name: candidate.options() for candidate in arguments.candidate}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"terms": terms, "candidates": {}}
    runs = arguments.output_dir / "runs"
    # A candidate whose options train_hf.py refused has no epoch yet: its options may be corrected.
    epochs = ("checkpoint-*", "training_history.json", "cost.json")
    started = {name for name in stored["candidates"] if any(any((runs / name).glob(f"*/{file}")) for file in epochs)}
    known = {name: options for name, options in stored["candidates"].items() if name in started}
    if stored["terms"] != terms:
        if any(runs.glob("*/*/cost.json")):
            names = stored["terms"].keys() | terms.keys()
            changed = sorted(name for name in names if stored["terms"].get(name) != terms.get(name))
            raise ValueError(f"{path.parent} holds results for another {', '.join(changed)}: choose another folder.")
        for folder in (arguments.output_dir / "whole", *arguments.output_dir.glob("fold-*")):
            shutil.rmtree(folder, ignore_errors=True)
    if changed := [name for name, options in candidates.items() if known.get(name, options) != options]:
        raise ValueError(
            f"{path.parent} holds runs of {', '.join(changed)} with other options: give the candidate another name."
        )
    # The baselines first_chunk and head_tail use the embeddings of the first candidate with a frozen encoder.
    frozen = [options for options in candidates.values() if caches_all_chunks(options)]
    chunk_lengths = [options.get("chunk_length", GEOMETRY["chunk_length"]) for options in frozen]
    first_length = stored.get("first_chunk_length") or next(iter(chunk_lengths), None)
    return {"terms": terms, "candidates": known | candidates, "first_chunk_length": first_length}


def run_once(command: list[str], log: Path) -> float:
    """Run a command in a process of its own. Returns the seconds that it took.

    Raises:
        ValueError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "w", encoding="utf-8") as output:
        status = run_to_end(command, stdout=output, stderr=subprocess.STDOUT)
    if status:
        errors = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "error" in line.lower()
        ]
        raise ValueError(f"{' '.join(command[1:3])} … failed; see {log}. {errors[-1] if errors else ''}")
    return time.perf_counter() - started


def train_candidate(candidate: Candidate, folds: Folds, number: int, seed: int, arguments: argparse.Namespace) -> bool:
    """Train and predict, unless an earlier start did. Returns whether anything was done."""
    folder = folds.folder / "runs" / candidate.name / f"fold-{number}-seed-{seed}"
    if (folder / "cost.json").exists():
        return False
    options = candidate.changed | {"dataset_dir": folds.path(number), "encoder": folds.encoder, "output_dir": folder}
    options |= {
        "seed": seed,
        "cpu_threads": arguments.cpu_threads,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
        "evaluate_kept_vectors": bool(candidate.options().get("freeze_encoder")),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    was_interrupted = any(folder.glob("checkpoint-*"))
    seconds = run_once([sys.executable, "train_hf.py", "--config", candidate.recipe, *words], Path(f"{folder}.log"))
    history = json.loads((folder / "training_history.json").read_text(encoding="utf-8"))
    peak = max(epoch["peak_memory_gib"] for epoch in history["epochs"]) * 1024
    # The time of an interrupted run is unknown.
    write_json(folder / "cost.json", {"seconds": None if was_interrupted else seconds, "peak_mib": peak})
    for path in (*folder.glob("checkpoint-*"), *folder.glob("model.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def baselines_of(folds: Folds, vectors: ChunkVectorDocuments | None) -> dict[str, Callable[[int], Prediction]]:
    """Name → function from a fold's number to the prediction of its test documents."""
    kind, names, labels = folds.kind, label_names(folds.whole), label_array(folds.whole)

    def of_texts(baseline: TextBaseline, number: int) -> Prediction:
        rows = folds.rows[number]
        return baseline(folds.whole.select(rows["train"] + rows["validation"]), folds.whole.select(rows["test"]))

    def word_logits(fitted: list[int], scored: list[int]) -> np.ndarray:
        train, test = (
            ChunkedDocuments(folds.whole.select(rows), folds.tokenizer, **(GEOMETRY | {"max_chunks": 10**6}))
            for rows in (fitted, scored)
        )
        counts = label_counts(label_array(train.documents), len(names)).tolist()
        balanced = kind.balanced_weights(dict(zip(names, counts, strict=True)), len(train))
        lexical = fit_lexical_features(train, len(names), LEXICAL_FEATURES, len(folds.tokenizer), balanced)
        return lexical_logits(test, lexical)

    def words(number: int) -> Prediction:
        train, validation, test = (folds.rows[number][split] for split in ("train", "validation", "test"))
        logits_BK = word_logits(train + validation, test)
        if not kind.is_multi_label:
            return highest(softmax(logits_BK))
        # Thresholds are fitted on documents that the features do not know.
        return kind.lexical_baseline(word_logits(train, validation), labels[validation], logits_BK)

    def ends(which: list[int]) -> Callable[[int], Prediction]:
        assert vectors is not None
        vectors_BD = np.stack([vectors.document_vectors(row)[which].ravel() for row in range(len(vectors))])

        def predict(number: int) -> Prediction:
            rows = folds.rows[number]
            train = rows["train"] + rows["validation"]
            return kind.vector_baseline(vectors_BD[train], labels[train], vectors_BD[rows["test"]])

        return predict

    baselines = {name: partial(of_texts, baseline) for name, baseline in kind.text_baselines().items()}
    ends_of = {"first_chunk": ends([0]), "head_tail": ends([0, -1])} if vectors is not None else {}
    return {**baselines, "words_alone": words, **ends_of}


def run_baselines(folds: Folds, vectors: ChunkVectorDocuments | None) -> None:
    """Predictions of each baseline on each fold, except those of an earlier start."""
    names = label_names(folds.whole)
    for name, predict in baselines_of(folds, vectors).items():
        for number, rows in enumerate(folds.rows):
            folder = folds.folder / "runs" / name / f"fold-{number}-seed-0"
            if (folder / "cost.json").exists():
                continue
            started = time.perf_counter()
            prediction, documents = predict(number), folds.whole.select(rows["test"])
            folder.mkdir(parents=True, exist_ok=True)
            write_predictions(
                folder / "predictions_test.csv", documents, names, prediction.scores, prediction.predicted
            )
            write_json(folder / "cost.json", {"seconds": time.perf_counter() - started, "peak_mib": None})


def measure(arguments: argparse.Namespace) -> None:
    """Train and measure every candidate and baseline on every fold. Writes quality.json and quality.md."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    protocol = check_protocol(arguments)
    write_json(arguments.output_dir / "protocol.json", protocol)
    folds = Folds(arguments)
    sizes = ", ".join(str(len(rows["test"])) for rows in folds.rows)
    print(f"{len(folds.whole)} documents in {len(folds.rows)} folds ({sizes})", flush=True)
    vectors = None
    for candidate in arguments.candidate:
        cached = folds.cache_vectors(candidate)
        vectors = vectors or cached
    run_baselines(folds, vectors)
    for number in range(len(folds.rows)):
        for candidate in arguments.candidate:
            for seed in arguments.seeds:
                started = time.perf_counter()
                is_new = train_candidate(candidate, folds, number, seed, arguments)
                took = f"{time.perf_counter() - started:.0f} s" if is_new else "done before"
                print(f"fold {number}, {candidate.name}, seed {seed}: {took}", flush=True)
        systems = {candidate.name: arguments.seeds for candidate in arguments.candidate}
        systems |= {name: [0] for name in BASELINES if (folds.folder / "runs" / name).exists()}
        measured = summary(folds.folder / "runs", label_names(folds.whole), systems, folds.kind.is_multi_label)
        measured["first_chunk_length"] = protocol["first_chunk_length"]
        write_json(folds.folder / "quality.json", measured)
        write_text(folds.folder / "quality.md", markdown(measured))
    print(markdown(measured))
