"""Options of scripts.prepare_dataset and scripts.run that say how a source is read."""

import argparse
from typing import Any

from data.documents import KEEPABLE, PROBLEMS, Columns, check_decisions
from scripts.common.cli import comma_list

COLUMN_KINDS = ("text", "label", "id", "split", "group", "evidence")


def add_preparation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def preparation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `prepare_dataset` from these options. Raises ValueError for a wrong value."""
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("encoding_errors", "num_proc")}
    options |= {name: comma_list(getattr(arguments, name) or "") for name in ("labels", "drop", "keep")}
    check_decisions(options["drop"], options["keep"])
    try:
        options["split_fractions"] = [float(share) for share in arguments.split_fractions.split(",")]
    except ValueError:
        raise ValueError(
            f"--split_fractions must be three shares such as 0.8,0.1,0.1, got {arguments.split_fractions}."
        ) from None
    options["columns"] = Columns(**{kind: getattr(arguments, f"{kind}_column") for kind in COLUMN_KINDS})
    return options
