"""Documents → a tokenized, checked, split data set on disk.

    python -m scripts.prepare_dataset --source stories.csv --tokenizer FacebookAI/roberta-base \\
        --labels General,Teen,Mature --output_dir outputs/stories
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from data.documents import KEEPABLE, PROBLEMS, Columns
from data.preparation import check_decisions, preparation_summary, prepare_dataset
from scripts.common.cli import UserParser, comma_list, run_main

COLUMN_KINDS = ("text", "label", "id", "split", "group", "evidence")


def parse_arguments(argv: list[str] | None = None) -> dict[str, Any]:
    """What `prepare_dataset` takes, checked as far as it can be without reading anything."""
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
    arguments.drop, arguments.keep = comma_list(arguments.drop), comma_list(arguments.keep)
    check_decisions(arguments.drop, arguments.keep)
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
    options = vars(arguments)
    options["columns"] = Columns(**{kind: options.pop(f"{kind}_column") for kind in COLUMN_KINDS})
    del options["log_level"]
    return options


def main() -> None:
    options = parse_arguments()
    manifest = prepare_dataset(**options)
    print(preparation_summary(manifest))
    print(f"Prepared in {options['output_dir']}")


if __name__ == "__main__":
    sys.exit(run_main(main))
