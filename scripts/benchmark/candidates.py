"""Candidates of scripts.benchmark.quality: a recipe each, with options changed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GEOMETRY: dict[str, Any] = {"chunk_length": 512, "chunk_overlap": 0, "max_chunks": 20, "chunk_policy": "uniform"}
LEXICAL_FEATURES = 20_000  # of the baseline words_alone
BASELINES = ("tfidf_tuned", "tfidf", "words_alone", "first_chunk", "head_tail", "majority")


@dataclass
class Candidate:
    """A recipe with overridden options."""

    name: str
    recipe: str
    changed: dict[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Options passed to train_hf.py."""
        return (yaml.safe_load(Path(self.recipe).read_text(encoding="utf-8")) or {}) | {
            name: yaml.safe_load(value) for name, value in self.changed.items()
        }


def caches_all_chunks(options: dict[str, Any]) -> bool:
    """Whether the embeddings of a candidate are the same on every fold: with the policy `lexical` each fold selects its own."""
    return bool(options.get("freeze_encoder")) and options.get("chunk_policy") != "lexical"


def parse_candidate(text: str) -> Candidate:
    """`NAME=RECIPE.yaml[,option=value…]`.

    Raises:
        ValueError: it is not of this form, or there is no such recipe.
    """
    name, sign, rest = text.partition("=")
    recipe, *changes = rest.split(",")
    changed = dict(change.partition("=")[::2] for change in changes)
    if not sign or not name or not all(changed.values()) or set(name) & set("/\\ "):
        raise ValueError(f"--candidate takes NAME=RECIPE.yaml[,option=value…]; got {text!r}.")
    if name in BASELINES or name.startswith("."):
        raise ValueError(f"--candidate {name}: choose another name; {', '.join(BASELINES)} are reserved for baselines.")
    if not Path(recipe).is_file():
        raise ValueError(f"--candidate {name}: recipe {recipe!r} not found.")
    candidate = Candidate(name, recipe, changed)
    try:
        candidate.options()
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"--candidate {name}: {recipe} is not a valid recipe (expected a YAML mapping of options to values)."
        ) from error
    return candidate
