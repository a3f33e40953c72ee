"""Options of scripts.prepare_dataset and scripts.run that say how a source is read."""

import argparse
from typing import Any

from data.documents import KEEPABLE, PROBLEMS, Columns, check_decisions
from data.labels import MULTI, PROBLEM_TYPES, SINGLE
from data.readers import ReadOptions
from data.text_files import check_encoding
from scripts.common.cli import comma_list

COLUMN_KINDS = ("text", "label", "id", "split", "group", "evidence")


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that reads documents."""
    add = parser.add_argument
    add("--encoding", help="encoding of text files, e.g. cp1252 (default: UTF-8, or as a byte order mark says)")
    add(
        "--encoding_errors",
        choices=("strict", "replace"),
        default="strict",
        help="on bytes that are not of the encoding: raise an error, or replace them by U+FFFD",
    )
    add("--delimiter", help="delimiter of CSV files, or 'tab' (default: a comma, or the only one that the header has)")
    add(
        "--path_column",
        default=ReadOptions.path_column,
        help="column with the paths of documents, in a table without a text column (default: path)",
    )
    add("--keep_columns", default="", help="columns to keep with the documents, e.g. url,year")
    add("--dataset_config_name", help="configuration of a dataset on the Hub")
    add("--dataset_revision", help="branch, tag or commit of a dataset on the Hub")


def reading_options(arguments: argparse.Namespace) -> ReadOptions:
    """Raises ValueError for a wrong value."""
    delimiter = {"tab": "\t", "\\t": "\t"}.get(arguments.delimiter, arguments.delimiter)
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n'):
        raise ValueError(f"--delimiter must be one character, or tab, got {arguments.delimiter!r}.")
    return ReadOptions(
        encoding=check_encoding(arguments.encoding) if arguments.encoding else None,
        encoding_errors=arguments.encoding_errors,
        delimiter=delimiter,
        text_columns=Columns(text=arguments.text_column).texts,
        path_column=arguments.path_column,
        config_name=arguments.dataset_config_name,
        revision=arguments.dataset_revision,
    )


def add_preparation_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--text_column",
        default=Columns.text,
        help="name of the text column, or of several, e.g. title,body, which are joined (default: text)",
    )
    for kind in COLUMN_KINDS[1:]:
        add(
            f"--{kind}_column",
            default=getattr(Columns, kind),
            help=f"name of the {kind} column (default: {getattr(Columns, kind)})",
        )
    add_reading_options(parser)
    add_several_labels_options(parser)
    add("--labels", help="labels in order, mildest first if they are ordered, e.g. General,Teen,Mature")
    add(
        "--split_fractions",
        default="0.8,0.1,0.1",
        help="shares of train, validation and test if the source has no splits",
    )
    add(
        "--validation_from_train",
        type=float,
        default=0.0,
        help="share of train that becomes validation, e.g. 0.1, if the source has train and test only",
    )
    add(
        "--duplicate_threshold",
        type=float,
        default=0.8,
        help="share of common five-word sequences from which texts are near-duplicates",
    )
    add("--drop", default="", help=f"data issues whose rows are dropped: {','.join(PROBLEMS)}")
    add("--keep", default="", help=f"data issues whose rows are kept: {','.join(KEEPABLE)}")
    add(
        "--merge_labels",
        action="store_true",
        help="count labels that look alike (case, invisible characters, dashes, quotes) as one: that of --labels, or the most frequent",
    )
    add(
        "--num_proc",
        type=int,
        default=1,
        help="number of tokenization processes (a single one already uses all cores; more may pay from about eight cores on)",
    )


def add_several_labels_options(parser: argparse.ArgumentParser) -> None:
    """Options that `several_labels` reads."""
    add = parser.add_argument
    add(
        "--problem_type",
        choices=PROBLEM_TYPES,
        help="whether a document has one label (the default) or several: any number of those in the label column",
    )
    add("--label_separator", help="what separates several labels in a cell, e.g. ';' (default: a JSON list)")
    add("--label_columns", default="", help="columns of 0 and 1, one for each label, in place of the label column")


def preparation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `prepare_dataset` from these options. Raises ValueError for a wrong value."""
    names = ("num_proc", "merge_labels", "validation_from_train", "duplicate_threshold")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    options |= {name: comma_list(getattr(arguments, name) or "") for name in ("labels", "drop", "keep")}
    check_decisions(options["drop"], options["keep"])
    if not 0 < options["duplicate_threshold"] <= 1:
        raise ValueError(f"--duplicate_threshold must be above 0 and at most 1, got {arguments.duplicate_threshold}.")
    if not 0 <= options["validation_from_train"] < 1:
        raise ValueError(f"--validation_from_train must be a share below 1, got {arguments.validation_from_train}.")
    try:
        options["split_fractions"] = [float(share) for share in arguments.split_fractions.split(",")]
    except ValueError:
        raise ValueError(
            f"--split_fractions must be three shares such as 0.8,0.1,0.1, got {arguments.split_fractions}."
        ) from None
    names_of_columns = {kind: getattr(arguments, f"{kind}_column") for kind in COLUMN_KINDS}
    options["columns"] = Columns(
        **names_of_columns, **several_labels(arguments), keep=comma_list(arguments.keep_columns)
    )
    options["read_options"] = reading_options(arguments)
    return options


def several_labels(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Columns` about several labels a document. Raises ValueError for options that contradict each other."""
    given = [name for name in ("label_separator", "label_columns") if getattr(arguments, name)]
    if len(given) == 2:
        raise ValueError(
            "--label_separator and --label_columns: several labels are in one column or in several, set one."
        )
    if given and arguments.problem_type == SINGLE:
        raise ValueError(f"--{given[0]} is for several labels a document: set --problem_type {MULTI} or leave one out.")
    return {
        "problem_type": MULTI if given else arguments.problem_type or SINGLE,
        "label_separator": arguments.label_separator,
        "label_columns": comma_list(arguments.label_columns),
    }
