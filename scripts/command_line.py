"""What the commands share: errors for people, and exit statuses.

0 done; 1 a mistake that can be mended, told in a paragraph; 130 interrupted; 143 terminated.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser

# What a person can mend: wrong values, missing or unreadable files, a full disk. Anything else is a defect of ours.
USER_ERRORS = (ValueError, OSError)


class UserParser(argparse.ArgumentParser):
    """A parser whose complaints are `ValueError`s, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. ({self.prog} --help lists every option.)")


class _RecipeParser(HfArgumentParser):
    """Options from dataclasses, with complaints for people."""

    error = UserParser.error


def parse_with_recipe(kinds: Sequence[Any], argv: Sequence[str], description: str | None = None) -> tuple[Any, ...]:
    """Dataclasses from a recipe (`--config FILE.yaml`) and the command line, which overrides it.

    Raises:
        ValueError: an unknown key in either, by its name; a value of a wrong type; a recipe that is no mapping.
    """
    parser = _RecipeParser(
        list(kinds), description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="A recipe: a YAML file with any of these options.")
    recipe, rest = _split_off_config(list(argv))
    known = {action.dest for action in parser._actions} - {"help", "config"}
    *parsed, _remaining, unknown = parser.parse_args_into_dataclasses(
        [*_recipe_options(recipe, known), *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"Unknown option {' '.join(unknown)}. ({parser.prog} --help lists every option.)")
    return tuple(parsed)


def _split_off_config(argv: list[str]) -> tuple[str | None, list[str]]:
    reader = UserParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    found, rest = reader.parse_known_args(argv)
    return found.config, rest


def _recipe_options(recipe: str | None, known: set[str]) -> list[str]:
    """A recipe as the options that it stands for, so that its values are checked as theirs are."""
    if recipe is None:
        return []
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {recipe}. Those of the project are in scripts/recipes/.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{recipe} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{recipe}: expected a mapping of options to values, got {type(content).__name__}.")
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"{recipe}: unknown key {', '.join(unknown)}.")
    options = []
    for key, value in content.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *map(str, values)]
    return options


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command; its exit status. A traceback is shown for a defect, or with `--log_level debug`."""
    try:
        return main() or 0
    except USER_ERRORS as error:
        if is_debugging():
            raise
        if logging.root.handlers:
            logging.getLogger("error").error(one_paragraph(error))
        else:
            print(f"error: {one_paragraph(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def use_all_cores(num_threads: int = 0) -> int:
    """All cores, shared among the processes of this machine, for the work on a CPU, or so many threads; how many there
    are now. (`accelerate launch` sets OMP_NUM_THREADS to 1 where nothing else is said.)"""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // processes))
    return torch.get_num_threads()


def is_debugging() -> bool:
    """Whether `--log_level debug` stands on the command line."""
    return "--log_level=debug" in sys.argv or any(
        option == "--log_level" and value == "debug" for option, value in zip(sys.argv, sys.argv[1:], strict=False)
    )


def one_paragraph(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
