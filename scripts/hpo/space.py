"""Search space: reading and sampling. Used by scripts/search.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import yaml

from scripts.training.arguments import MODEL_OPTIONS

# Searchable options besides MODEL_OPTIONS: nothing that changes the documents or a frozen encoder's embeddings, and no
# batch size, since pruning compares trials after the same number of steps.
TRAINING_OPTIONS: tuple[str, ...] = (
    "learning_rate",
    "head_lr_multiplier",
    "weight_decay",
    "label_smoothing_factor",
    "max_grad_norm",
)
TRAINING_OPTIONS += (
    "num_train_epochs",
    "warmup_steps",
    "lr_scheduler_type",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def read_space(path: str) -> dict[str, Callable[[optuna.Trial], Any]]:
    """Option → sampler.

    Raises:
        ValueError: not such a file; an option that cannot be searched for; a range that is none.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected a mapping of options to their choices.")
    if unknown := sorted(set(map(str, content)) - set(MODEL_OPTIONS) - set(TRAINING_OPTIONS)):
        raise ValueError(
            f"{path}: {', '.join(unknown)} cannot be searched; allowed: {', '.join((*MODEL_OPTIONS, *TRAINING_OPTIONS))}."
        )
    return {name: _sampler(name, choices, path) for name, choices in content.items()}


def _number(value: Any) -> Any:
    """YAML parses 1e-5 as a string; convert it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _sampler(name: str, choices: Any, path: str) -> Callable[[optuna.Trial], Any]:
    if isinstance(choices, list) and choices:
        values = [_number(value) for value in choices]
        return lambda trial: trial.suggest_categorical(name, values)
    if isinstance(choices, dict):
        choices = {option: _number(value) for option, value in choices.items()}
    bounds: list[Any] = [choices.get("low"), choices.get("high")] if isinstance(choices, dict) else [None, None]
    is_range = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in bounds)
    if not is_range or bounds[0] >= bounds[1] or set(choices) - {"low", "high", "log", "step"}:
        raise ValueError(
            f"{path}: {name} must be a list of choices, or {{low: …, high: …, log: true}}; got {choices!r}."
        )
    low, high = bounds
    options = {option: choices[option] for option in ("log", "step") if option in choices}
    if isinstance(low, int) and isinstance(high, int):
        return lambda trial: trial.suggest_int(name, low, high, **options)
    return lambda trial: trial.suggest_float(name, low, high, **options)


class NumberedSampler(optuna.samplers.TPESampler):
    """TPE (Bergstra et al. 2011) seeded by seed + trial number, so that neither a resumed search nor processes that share a
    study repeat samples.

    Optuna seeds a sampler once: a second process, or a resumed one, would start with the first one's samples again.
    """

    def __init__(self, seed: int):
        super().__init__(seed=seed)
        self.seed = seed

    def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        super().__init__(seed=self.seed + trial.number)
