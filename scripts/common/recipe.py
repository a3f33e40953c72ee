"""Parse a recipe and the command line, which overrides it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from scripts.common.cli import UserParser


class _RecipeParser(HfArgumentParser):
    """An `HfArgumentParser` that raises ValueError."""

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
    recipe, rest = split_off_config(list(argv))
    known = {action.dest for action in parser._actions} - {"help", "config"}
    *parsed, _remaining, unknown = parser.parse_args_into_dataclasses(
        [*_recipe_options(recipe, known), *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"Unknown option {' '.join(unknown)}. ({parser.prog} --help lists every option.)")
    return tuple(parsed)


def split_off_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split --config from the other arguments."""
    reader = UserParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    known, rest = reader.parse_known_args(argv)
    return known.config, rest


def _recipe_options(recipe: str | None, known: set[str]) -> list[str]:
    """Convert a recipe to command-line options, so that its values are validated alike."""
    if recipe is None:
        return []
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"Recipe not found: {recipe}. The project's own are in scripts/recipes/.") from None
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
