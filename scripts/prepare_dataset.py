"""Validate, split and tokenize documents into a dataset on disk.

    python -m scripts.prepare_dataset --source stories.csv --tokenizer FacebookAI/roberta-base \\
        --labels General,Teen,Mature --output_dir outputs/stories
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.common.cli import UserParser, run_main
from scripts.common.preparation_options import add_preparation_options, preparation_options


def parse_arguments(argv: list[str] | None = None) -> dict[str, Any]:
    """Arguments of `prepare_dataset`, validated as far as possible without reading the source."""
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--source",
        required=True,
        action="append",
        help="table (CSV, JSON, JSON Lines, Parquet, spreadsheet; .gz, .bz2, .xz, .zst), directory of tables or of documents "
        "(text, PDF, DOCX, EPUB, HTML, subtitles) with one subdirectory per label, archive of one, directory saved by datasets, "
        "directory with train_dataset.pt etc., or dataset id on the Hub; may be repeated, or a pattern such as 'part-*.csv'",
    )
    add("--tokenizer", required=True, help="tokenizer of the encoder: model id on the Hub or directory")
    add("--output_dir", required=True, type=Path, help="directory for the prepared dataset")
    add_preparation_options(parser)
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
    names = ("source", "tokenizer", "output_dir", "seed", "chunk_length", "chunk_overlap", "max_chunks", "overwrite")
    return {name: getattr(arguments, name) for name in names} | preparation_options(arguments)


def main() -> None:
    options = parse_arguments()
    from data.preparation import preparation_summary, prepare_dataset  # once the options are known to be right
    from data.prepared_dataset import REPORT

    manifest = prepare_dataset(**options)
    print(preparation_summary(manifest))
    print(f"Saved the dataset to {options['output_dir']}. Look at {options['output_dir'] / REPORT} before training.")


if __name__ == "__main__":
    sys.exit(run_main(main))
