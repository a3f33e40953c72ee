"""The demo: the embedded stories and the packaged encoder, prepared, trained and compared, in minutes on two cores.

make demo
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from data.demo_corpus import LABELS, demo_corpus
from data.preparation import preparation_summary, prepare_dataset
from scripts.common.cli import run_main
from scripts.common.packaged_encoder import copy_packaged_encoder

FOLDER = Path("outputs/demo")


def main() -> None:
    started = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    step("1/5  Writing stories")
    source = FOLDER / "stories.jsonl"
    documents = demo_corpus()
    with open(source, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    encoder = copy_packaged_encoder(FOLDER / "encoder")
    step("2/5  Cutting them into chunks")
    dataset_dir = FOLDER / "dataset"
    manifest = prepare_dataset(
        str(source),
        str(encoder),
        dataset_dir,
        labels=LABELS,
        split_fractions=(0.7, 0.1, 0.2),
        chunk_length=64,
        max_chunks=25,
        overwrite=True,
    )
    print(preparation_summary(manifest), flush=True)
    step("3/5  Training the hierarchical model on whole stories")
    run_dir = FOLDER / "run"
    train(run_dir, dataset_dir, encoder)
    step("4/5  The same model on the first chunk alone")
    first_dir = FOLDER / "first_chunk"
    train(first_dir, dataset_dir, encoder, "--max_chunks", "1", "--chunk_policy", "head")
    step("5/5  Side by side, on the stories held back for the test")
    compare(dataset_dir, run_dir, first_dir)
    print(f"\nThat took {(time.monotonic() - started) / 60:.1f} minutes. Where to look:")
    print(f"  {FOLDER}/report/report.html       open it in a browser: figures, and every story with its evidence")
    print(f"  {run_dir}/training_history.json   each epoch's numbers;  {run_dir}/training.log  all that was said")
    print(f"  {run_dir}/README.md               the model card;  {run_dir}/predictions_test.csv  every test story")
    print(f"  {run_dir}                         the model: AutoModelForSequenceClassification.from_pretrained(…)")
    print(f"  .venv/bin/tensorboard --logdir {run_dir}/runs    curves and confusion matrices in a browser")


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


def train(output_dir: Path, dataset_dir: Path, encoder: Path, *extra: str) -> None:
    """`accelerate launch train_hf.py` with the demo's recipe. Raises ValueError where it fails."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_config.yaml",
        "train_hf.py",
        "--config",
        "scripts/recipes/demo.yaml",
        "--encoder",
        str(encoder),
        "--dataset_dir",
        str(dataset_dir),
        "--output_dir",
        str(output_dir),
        "--overwrite_output_dir",
        *extra,
    ]
    if status := subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"Training ended with exit status {status}; what it said is above and in {output_dir}/training.log."
        )


def compare(dataset_dir: Path, run_dir: Path, first_dir: Path) -> None:
    """Print the test metrics of the model and of its neighbours, and what its evidence is worth."""
    arguments = ["--model", str(run_dir), "--dataset_dir", str(dataset_dir), "--output_dir", str(FOLDER / "report")]
    command = [sys.executable, "-m", "scripts.evaluate_and_explain", *arguments]
    if status := subprocess.run(command, check=False).returncode:
        raise ValueError(f"The evaluation ended with exit status {status}.")
    found = json.loads((FOLDER / "report" / "metrics.json").read_text(encoding="utf-8"))
    values = {name: {metric: entry["value"] for metric, entry in metrics.items()} for name, metrics in (
        ("whole stories, this project", found["model"]),
        ("TF-IDF + logistic regression", found["baselines"]["tfidf"]),
        ("always the most frequent label", found["baselines"]["majority"]),
    )}  # fmt: skip
    first = json.loads((first_dir / "metrics.json").read_text(encoding="utf-8"))["test"]
    values["trained on the first chunk only"] = first
    print(f"\n{'':32}{'macro-F1':>10}{'accuracy':>10}{'recall of Mature':>18}")
    for name, metrics in values.items():
        print(f"{name:32}{metrics['f1_macro']:10.3f}{metrics['accuracy']:10.3f}{metrics['recall_Mature']:18.3f}")


if __name__ == "__main__":
    sys.exit(run_main(main))
