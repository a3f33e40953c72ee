"""The demo: embedded stories and the packaged encoder, prepared, trained, evaluated and explained on two CPU cores.

    make demo
    python -m scripts.demo --seed 1 --bf16 false

Options are those of train_hf.py.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import datasets

from data.demo_corpus import LABELS, demo_corpus
from data.preparation import prepare_dataset
from data.prepared_dataset import load_prepared
from scripts.common.cli import UserParser, run_main
from scripts.common.launch import launch_evaluation, launch_training
from scripts.common.packaged_encoder import copy_packaged_encoder
from scripts.evaluation.kinds import baseline_metrics

FOLDER = Path("outputs/demo")
NUM_LAYERS = 2
CHUNK_LENGTH, MAX_CHUNKS = 40, 26
TFIDF, TUNED = "TF-IDF + logistic regression", "the same, tuned on inner folds"
MAJORITY = "always the most frequent label"


def main() -> None:
    started = time.monotonic()
    parser = UserParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # with --log_level, which is training's here
    )
    parser.add_argument("-h", "--help", action="help")
    _, options = parser.parse_known_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of loading weights, in the commands below
    datasets.disable_progress_bars()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print("== 1/4  Stories: written, tokenized, split", flush=True)
    dataset_dir, run_dir = FOLDER / "dataset", FOLDER / "run"
    encoder = copy_packaged_encoder(FOLDER / "encoder", NUM_LAYERS)
    prepare_stories(dataset_dir, encoder)
    step("2/4  Baselines on the test stories")
    splits, _ = load_prepared(str(dataset_dir))
    metrics = baseline_metrics(splits, ["test"])[0]["test"]
    print_metrics({TFIDF: metrics["tfidf"], TUNED: metrics["tfidf_tuned"], MAJORITY: metrics["majority"]})
    step("3/4  Training on whole stories")
    directories = {"encoder": encoder, "dataset_dir": dataset_dir, "output_dir": run_dir}
    launch_training("scripts/recipes/demo.yaml", "--overwrite_output_dir", *options, **directories)
    step("4/4  Evaluation and explanations on the test stories")
    report_dir = FOLDER / "report"
    launch_evaluation(model=run_dir, dataset_dir=dataset_dir, output_dir=report_dir)
    print()
    print_metrics(comparison(report_dir))
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Results:")
    print(f"  {report_dir}/report.html          open it in a browser: figures, and every story with its evidence")
    print(f"  {run_dir}/training_history.json   each epoch's numbers;  {run_dir}/training.log  the complete log")
    print(f"  {run_dir}/README.md               the model card;  {run_dir}/predictions_test.csv  every test story")
    print(f"  {run_dir}                         the model: AutoModelForSequenceClassification.from_pretrained(…)")
    print(f"  .venv/bin/tensorboard --logdir {run_dir}/runs    curves and confusion matrices in a browser")


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def prepare_stories(dataset_dir: Path, encoder: Path) -> None:
    """Write the stories, prepare them, and print their counts and lengths."""
    source = FOLDER / "stories.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in demo_corpus())
    manifest = prepare_dataset(
        str(source),
        str(encoder),
        dataset_dir,
        labels=LABELS,
        split_fractions=(0.82, 0.08, 0.1),
        chunk_length=CHUNK_LENGTH,
        max_chunks=MAX_CHUNKS,
        overwrite=True,
    )
    print(f"{'':12}{'stories':>9}{''.join(f'{label:>9}' for label in LABELS)}{'tokens: median':>17}{'max':>7}")
    for split, about in manifest["splits"].items():
        counts, tokens = "".join(f"{about['labels'][label]:9}" for label in LABELS), about["tokens"]
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


def print_metrics(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'':46}{'macro-F1':>10}{'accuracy':>10}{'recall of Mature':>18}")
    for name, metrics in rows.items():
        print(f"{name:46}{metrics['f1_macro']:10.3f}{metrics['accuracy']:10.3f}{metrics['recall_Mature']:18.3f}")


if __name__ == "__main__":
    sys.exit(run_main(main))
