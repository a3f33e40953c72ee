"""Train on your own documents, from a file to a model and its report: prepare → train → evaluate.

    python -m scripts.run --source stories.csv --labels General,Teen,Mature        (make run SOURCE=stories.csv LABELS=…)

The recipe is chosen by the device and by the number and length of the documents, and printed:

| device | training documents | recipe | encoder |
|---|---|---|---|
| GPU | any | roberta_base.yaml, max_chunks by their lengths | FacebookAI/roberta-base, else the packaged MiniLM |
| CPU | up to a million tokens | upper_layers_cpu.yaml | the packaged MiniLM |
| CPU | more | films_cpu.yaml | the packaged MiniLM |

An interrupted run resumes when it is started again. Options that are not listed below are passed to train_hf.py.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from scripts.common.cli import UserParser, run_main
from scripts.common.preparation_options import add_preparation_options, preparation_options

MAX_TOKENS_TO_TRAIN_ON_A_CPU = 1_000_000
MAX_CHUNKS_ON_A_GPU = 64
# The recipe for shorter documents has three epochs of batches of 16; few documents get more epochs.
MIN_STEPS = 100
RECIPES = Path("scripts/recipes")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = UserParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # with --log_level, which is training's here
    )
    add = parser.add_argument
    add("-h", "--help", action="help")
    add(
        "--source",
        required=True,
        action="append",
        help="documents with the columns text and label, or a folder per label (see scripts.prepare_dataset); may be repeated",
    )
    add("--encoder", help="name on the Hub or folder; default: see above")
    add("--recipe", help="recipe to use instead of the automatic choice")
    add("--output_dir", type=Path, default=Path("outputs/run"))
    add("--overwrite", action="store_true", help="replace an earlier run in output_dir")
    add_preparation_options(parser)
    return parser.parse_known_args()


def main() -> None:
    arguments, training_options = parse_arguments()
    # Imported here, so that --help and mistakes in options are answered at once.
    from data.preparation import preparation_summary
    from scripts.common.launch import launch_evaluation, launch_training
    from scripts.training.output_dir import clear_earlier_run, lock_output_dir

    output_dir: Path = arguments.output_dir
    dataset_dir = output_dir / "dataset"
    on_gpu = has_gpu()
    encoder = choose_encoder(arguments.encoder, on_gpu)
    paths = {"encoder": encoder, "dataset_dir": dataset_dir, "output_dir": output_dir}
    is_dry_run = check_training_options(arguments.recipe, training_options, paths)
    if arguments.overwrite:
        with lock_output_dir(output_dir):
            clear_earlier_run(str(output_dir))
    print(f"== 1/3  Preparing {', '.join(arguments.source)}", flush=True)
    manifest = prepare_or_reuse(arguments, encoder, dataset_dir)
    print(preparation_summary(manifest))
    recipe, options, reason = choose_recipe(manifest["splits"]["train"], on_gpu)
    if arguments.recipe:
        recipe, options, reason = arguments.recipe, {}, "as given"
    print(f"\n== 2/3  Training {encoder} with {recipe} ({reason})", flush=True)
    launch_training(recipe, "--resume_from_checkpoint", "auto", *training_options, **options, **paths)
    if is_dry_run:
        return
    split = "test" if "test" in manifest["splits"] else "validation"
    print(f"\n== 3/3  Evaluating on the {split} split", flush=True)
    report = output_dir / "report"
    launch_evaluation(model=output_dir, dataset_dir=dataset_dir, split=split, output_dir=report)
    print()
    print(
        f"Model: {output_dir}. To classify new documents: python -m scripts.predict --model {output_dir} --source FILE"
    )


def check_training_options(recipe: str | None, options: list[str], paths: dict[str, Any]) -> bool:
    """Whether the options of train_hf.py ask for a dry run. Raises ValueError for one that is wrong, before any work."""
    from modeling.training.training_args import HierarchicalTrainingArguments
    from scripts.common.recipe import parse_with_recipe
    from scripts.training.arguments import DataArguments, ModelArguments

    argv = [*(["--config", recipe] if recipe else []), *(f"--{name}={path}" for name, path in paths.items()), *options]
    return parse_with_recipe((ModelArguments, DataArguments, HierarchicalTrainingArguments), argv)[-1].dry_run


def has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def choose_encoder(name: str | None, on_gpu: bool) -> str:
    """The given encoder; otherwise RoBERTa on a GPU if it can be loaded; otherwise the packaged MiniLM."""
    from scripts.common.packaged_encoder import copy_packaged_encoder

    if name is not None:
        return name
    if on_gpu:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained("FacebookAI/roberta-base")
            return "FacebookAI/roberta-base"
        except OSError as error:
            print(
                f"FacebookAI/roberta-base cannot be loaded ({str(error).splitlines()[0]}): using the packaged MiniLM."
            )
    return str(copy_packaged_encoder(Path("outputs/minilm")))


def prepare_or_reuse(arguments: argparse.Namespace, encoder: str, dataset_dir: Path) -> dict[str, Any]:
    """Prepare the documents, or reuse an identical earlier preparation. Returns the manifest.

    Raises:
        ValueError: output_dir holds a run on other documents, labels or with another encoder.
    """
    from data.preparation import describe_options, describe_source, prepare_dataset
    from data.prepared_dataset import MANIFEST, load_prepared
    from modeling.training.checkpointing import list_checkpoints

    output_dir, options = arguments.output_dir, preparation_options(arguments)
    labels = options["labels"]
    relevant = {name: value for name, value in options.items() if name not in ("labels", "num_proc")}
    if (dataset_dir / MANIFEST).is_file():
        _, manifest = load_prepared(str(dataset_dir))
        differences = {
            "documents": manifest["sources"] != [describe_source(name) for name in arguments.source],
            "labels": bool(labels) and manifest["labels"] != labels,
            "options": manifest.get("options", described := describe_options(**relevant)) != described,
            f"encoder ({manifest['tokenizer']['name']})": manifest["tokenizer"]["name"] != encoder,
        }
        different = [name for name, differs in differences.items() if differs]
        if not different:
            return manifest
        if list_checkpoints(str(output_dir)) or (output_dir / "model.safetensors").is_file():
            raise ValueError(
                f"{output_dir} holds a run with other {', '.join(different)}: replace it with --overwrite, or choose another "
                "--output_dir."
            )
    return prepare_dataset(arguments.source, encoder, dataset_dir, overwrite=True, **options)


def choose_recipe(train: dict[str, Any], on_gpu: bool) -> tuple[str, dict[str, Any], str]:
    """Recipe, additional options and the reason, from the manifest's description of the training split."""
    num_documents, num_tokens = train["documents"], train["coverage"]["tokens"]
    size = f"{num_documents:,} training documents, {num_tokens:,} tokens"
    if on_gpu:
        long = train["tokens"]["95%"]
        max_chunks = min(max(math.ceil(long / 510), 1), MAX_CHUNKS_ON_A_GPU)
        reason = f"GPU; {size}; {max_chunks} chunks hold 95 % of the documents"
        if long > 510 * MAX_CHUNKS_ON_A_GPU:
            reason = f"GPU; {size}; at most {max_chunks} chunks of a document are read"
        return str(RECIPES / "roberta_base.yaml"), {"max_chunks": max_chunks}, reason
    if num_tokens > MAX_TOKENS_TO_TRAIN_ON_A_CPU:
        return str(RECIPES / "films_cpu.yaml"), {}, f"CPU; {size}"
    epochs = -(-MIN_STEPS // -(-num_documents // 16))
    options = {"num_train_epochs": epochs, "early_stopping_patience": epochs // 3} if epochs > 3 else {}
    reason = f"CPU; {size}" + (f"; {epochs} epochs, because there are few documents" if options else "")
    return str(RECIPES / "upper_layers_cpu.yaml"), options, reason


if __name__ == "__main__":
    sys.exit(run_main(main))
