"""Compare recipes by cross-validation, along with baselines on the same folds.

    python -m scripts.benchmark.quality --source films.parquet --labels General,Teen,Mature --fold_column fold \\
        --encoder outputs/minilm --output_dir outputs/quality \\
        --candidate films=scripts/recipes/films_cpu.yaml \\
        --candidate all_chunks=scripts/recipes/films_cpu.yaml,chunk_policy=random,max_chunks=192

Every candidate (a recipe with options changed) is trained by train_hf.py on each fold with each seed. It chooses its epoch
on validation documents taken from the training folds, and is measured on the held-out fold. The baselines use the same
folds, and may train on the validation documents too. Finished runs are not repeated, so an interrupted comparison resumes.
Writes quality.json and quality.md.
"""

import argparse
import sys
from pathlib import Path

from scripts.benchmark.candidates import parse_candidate
from scripts.common.cli import UserParser, run_main
from scripts.common.preparation_options import add_several_labels_options, several_labels


def parse_arguments() -> argparse.Namespace:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", required=True, help="labeled documents: CSV, JSONL, Parquet, …")
    add("--encoder", required=True, help="name on the hub or folder")
    add("--output_dir", required=True, type=Path)
    add("--candidate", action="append", required=True, help="NAME=RECIPE.yaml[,option=value…]; may be repeated")
    add("--labels", help="labels in order, mildest first if they are ordered")
    add_several_labels_options(parser)
    add(
        "--folds",
        type=int,
        default=5,
        help="number of stratified folds, groups and near-duplicates kept together, without --fold_column",
    )
    add("--fold_column", help="column of the source with each document's fold")
    add("--seeds", default="1,2,3")
    add("--drop", default="", help="as for scripts.prepare_dataset")
    add("--cpu_threads", type=int, default=0)
    arguments = parser.parse_args()
    try:
        arguments.seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds takes numbers such as 1,2,3; got {arguments.seeds!r}.") from None
    arguments.several_labels = several_labels(arguments)
    if arguments.folds < 2:
        raise ValueError(f"--folds must be at least 2, got {arguments.folds}.")
    arguments.candidate = [parse_candidate(text) for text in arguments.candidate]
    names = [candidate.name for candidate in arguments.candidate]
    if len(set(names)) < len(names):
        raise ValueError(f"Two candidates have the same name: {', '.join(names)}.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from scripts.benchmark.cross_validation import measure  # the libraries are imported once the options are right

    measure(arguments)


if __name__ == "__main__":
    sys.exit(run_main(main))
