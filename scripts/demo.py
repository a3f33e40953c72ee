"""The demo: embedded stories and the packaged encoder, prepared, trained, evaluated and explained on two CPU cores.

    make demo
    python -m scripts.demo --seed 1 --bf16 false
    make demo_descriptors       # python -m scripts.demo --descriptors: several labels a story

Options are those of train_hf.py.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from data.demo_corpus import DESCRIPTORS, LABELS, demo_corpus, descriptor_corpus
from data.documents import Columns
from data.labels import MULTI
from data.preparation import prepare_dataset
from data.prepared_dataset import load_prepared
from scripts.common.cli import UserParser, run_main
from scripts.common.launch import launch_evaluation, launch_training
from scripts.common.packaged_encoder import copy_packaged_encoder
from scripts.evaluation.kinds import baseline_metrics

NUM_LAYERS = 2
CHUNK_LENGTH, MAX_CHUNKS = 40, 26
TFIDF, TUNED = "TF-IDF + logistic regression", "the same, tuned on inner folds"
MAJORITY = "always the most frequent label"


@dataclass
class Corpus:
    """The stories of a demo, and what is printed of its metrics.

    Attributes:
        printed: title → metric.
    """

    folder: Path
    write: Callable[[], list[dict[str, Any]]]
    labels: Sequence[str]
    printed: dict[str, str]
    recipe: str
    columns: Columns = field(default_factory=Columns)


RATED = Corpus(
    Path("outputs/demo"),
    demo_corpus,
    LABELS,
    {"macro-F1": "f1_macro", "accuracy": "accuracy", "recall of Mature": "recall_Mature"},
    "scripts/recipes/demo.yaml",
)
DESCRIBED = Corpus(
    Path("outputs/demo_descriptors"),
    descriptor_corpus,
    tuple(DESCRIPTORS),
    {"macro-F1": "f1_macro", "micro-F1": "f1_micro", "all labels right": "subset_accuracy"},
    "scripts/recipes/demo_descriptors.yaml",
    Columns(problem_type=MULTI),
)


def main() -> None:
    started = time.monotonic()
    parser = UserParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # with --log_level, which is training's here
    )
    parser.add_argument("-h", "--help", action="help")
    parser.add_argument(
        "--descriptors", action="store_true", help="stories with content descriptors: several labels each"
    )
    arguments, options = parser.parse_known_args()
    corpus = DESCRIBED if arguments.descriptors else RATED
    folder = corpus.folder
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of loading weights, in the commands below
    datasets.disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    print("== 1/4  Stories: written, tokenized, split", flush=True)
    dataset_dir, run_dir = folder / "dataset", folder / "run"
    encoder = copy_packaged_encoder(folder / "encoder", NUM_LAYERS)
    prepare_stories(corpus, dataset_dir, encoder)
    step("2/4  Baselines on the test stories")
    splits, _ = load_prepared(str(dataset_dir))
    metrics = baseline_metrics(splits, ["test"])[0]["test"]
    print_metrics(
        {TFIDF: metrics["tfidf"], TUNED: metrics["tfidf_tuned"], MAJORITY: metrics["majority"]}, corpus.printed
    )
    step("3/4  Training on whole stories")
    directories = {"encoder": encoder, "dataset_dir": dataset_dir, "output_dir": run_dir}
    launch_training(corpus.recipe, "--overwrite_output_dir", *options, **directories)
    step("4/4  Evaluation and explanations on the test stories")
    report_dir = folder / "report"
    launch_evaluation(model=run_dir, dataset_dir=dataset_dir, output_dir=report_dir)
    print()
    print_metrics(comparison(report_dir), corpus.printed)
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Results:")
    print(f"  {report_dir}/report.html          open it in a browser: figures, and every story with its evidence")
    print(f"  {run_dir}/training_history.json   each epoch's numbers;  {run_dir}/training.log  the complete log")
    print(f"  {run_dir}/README.md               the model card;  {run_dir}/predictions_test.csv  every test story")
    print(f"  {run_dir}                         the model: AutoModelForSequenceClassification.from_pretrained(…)")
    print(f"  .venv/bin/tensorboard --logdir {run_dir}/runs    curves and a figure of each evaluation in a browser")


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def prepare_stories(corpus: Corpus, dataset_dir: Path, encoder: Path) -> None:
    """Write the stories, prepare them, and print their counts and lengths."""
    source = corpus.folder / "stories.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in corpus.write())
    manifest = prepare_dataset(
        str(source),
        str(encoder),
        dataset_dir,
        labels=corpus.labels,
        columns=corpus.columns,
        split_fractions=(0.82, 0.08, 0.1),
        chunk_length=CHUNK_LENGTH,
        max_chunks=MAX_CHUNKS,
        overwrite=True,
    )
    width = max(9, *(len(label) + 2 for label in corpus.labels))
    names = "".join(f"{label:>{width}}" for label in corpus.labels)
    print(f"{'':12}{'stories':>9}{names}{'tokens: median':>17}{'max':>7}")
    for split, about in manifest["splits"].items():
        counts, tokens = "".join(f"{about['labels'][label]:{width}}" for label in corpus.labels), about["tokens"]
        print(f"{split:12}{about['documents']:9}{counts}{tokens['median']:17.0f}{tokens['max']:7.0f}", flush=True)


def comparison(report_dir: Path) -> dict[str, dict[str, float]]:
    """Test metrics of the model and of the baselines, from the evaluation's metrics.json."""
    metrics = json.loads((report_dir / "metrics.json").read_text(encoding="utf-8"))
    entries = {
        "whole stories, this project": metrics["model"],
        TFIDF: metrics["baselines"]["tfidf"],
        TUNED: metrics["baselines"]["tfidf_tuned"],
        "first chunk's embedding + logistic regression": metrics["baselines"]["first_chunk"],
        MAJORITY: metrics["baselines"]["majority"],
    }
    return {name: {metric: entry["value"] for metric, entry in row.items()} for name, row in entries.items()}


def print_metrics(rows: dict[str, dict[str, float]], printed: dict[str, str]) -> None:
    print(f"{'':46}{''.join(f'{title:>{max(10, len(title) + 2)}}' for title in printed)}")
    for name, metrics in rows.items():
        values = (f"{metrics[key]:{max(10, len(title) + 2)}.3f}" for title, key in printed.items())
        print(f"{name:46}{''.join(values)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
