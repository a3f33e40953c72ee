"""Validate, split and tokenize documents into a dataset on disk.

    python -m scripts.prepare_dataset --source stories.csv --tokenizer FacebookAI/roberta-base \\
        --labels General,Teen,Mature --output_dir outputs/stories
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.documents import KEEPABLE, PROBLEMS, Columns, check_decisions
from scripts.common.cli import UserParser, comma_list, run_main

COLUMN_KINDS = ("text", "label", "id", "split", "group", "evidence")


def parse_arguments(argv: list[str] | None = None) -> dict[str, Any]:
    """Arguments of `prepare_dataset`, validated as far as possible without reading the source."""
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="CSV, JSONL or Parquet file, directory of text files with one subdirectory per label, directory saved by "
        "datasets, directory with train_dataset.pt etc., or dataset id on the Hub",
    )
    add("--tokenizer", required=True, help="tokenizer of the encoder: model id on the Hub or directory")
    add("--output_dir", required=True, type=Path, help="directory for the prepared dataset")
    for kind in COLUMN_KINDS:
        add(
            f"--{kind}_column",
            default=getattr(Columns, kind),
            help=f"name of the {kind} column (default: {getattr(Columns, kind)})",
        )
    add("--labels", help="labels in order, mildest first if they are ordered, e.g. General,Teen,Mature")
    add(
        "--split_fractions",
        default="0.8,0.1,0.1",
        help="shares of train, validation and test if the source has no splits",
    )
    add("--drop", default="", help=f"data issues whose rows are dropped: {','.join(PROBLEMS)}")
    add("--keep", default="", help=f"data issues whose rows are kept: {','.join(KEEPABLE)}")
    add(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="on bytes that are not UTF-8: raise an error, or replace them by U+FFFD",
    )
    add(
        "--num_proc", type=int, default=1, help="number of tokenization processes (a single one already uses all cores)"
    )
    add("--seed", type=int, default=42, help="random seed of the splits")
    add(
        "--chunk_length",
        type=int,
        default=512,
        help="only for reporting, with --chunk_overlap and --max_chunks, how much text max_chunks truncates; training "
        "has its own options",
    )
    add("--chunk_overlap", type=int, default=0)
    add("--max_chunks", type=int, default=20)
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    arguments = parser.parse_args(argv)
    arguments.drop, arguments.keep = comma_list(arguments.drop), comma_list(arguments.keep)
    check_decisions(arguments.drop, arguments.keep)
    try:
        arguments.split_fractions = [float(share) for share in arguments.split_fractions.split(",")]
    except ValueError:
        raise ValueError(
            f"--split_fractions must be three shares such as 0.8,0.1,0.1, got {arguments.split_fractions}."
        ) from None
    arguments.labels = comma_list(arguments.labels or "") or None
    options = vars(arguments)
    options["columns"] = Columns(**{kind: options.pop(f"{kind}_column") for kind in COLUMN_KINDS})
    del options["log_level"]
    return options


def main() -> None:
    options = parse_arguments()
    from data.preparation import preparation_summary, prepare_dataset  # once the options are known to be right

    manifest = prepare_dataset(**options)
    print(preparation_summary(manifest))
    print(f"Saved the dataset to {options['output_dir']}")


if __name__ == "__main__":
    sys.exit(run_main(main))
