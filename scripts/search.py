"""Search for better options of a recipe with Optuna, by way of `Trainer.hyperparameter_search`.

    python -m scripts.search --config scripts/recipes/films_cpu.yaml --space scripts/recipes/search/head.yaml \\
        --dataset_dir outputs/films --encoder outputs/minilm --output_dir outputs/search --num_trials 30

The study is a file, study.db (SQLite): an interrupted search resumes, and several processes with one output_dir may share
it. A trial that falls behind is pruned. Writes best.yaml, a recipe for train_hf.py, and search.md. Trials are compared on
the validation split; the test split is not used.
"""

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.common.cli import run_main
from scripts.common.recipe import parse_with_recipe, split_off_config
from scripts.training.arguments import DataArguments, ModelArguments, SearchArguments

# A trial saves nothing and reports nowhere.
TRIAL_OPTIONS = (
    "--save_strategy=no",
    "--load_best_model_at_end=False",
    "--report_to=none",
    "--log_level=warning",
    "--eval_on_start=False",
)
# Options of a search that are not part of the recipe it writes.
NOT_IN_A_RECIPE = {"config", "space", "num_trials", "dataset_dir", "encoder", "output_dir", "save_strategy"}
NOT_IN_A_RECIPE |= {"load_best_model_at_end", "report_to", "eval_on_start", "log_level"}


def plain(value: Any) -> Any:
    """A parsed option as YAML can hold it."""
    return value.value if isinstance(value, Enum) else value.to_dict() if hasattr(value, "to_dict") else value


def command() -> int:
    """The command line → `scripts.hpo.trials.search`."""
    kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments, SearchArguments)
    argv = sys.argv[1:]
    model_args, data_args, args, search_args = parse_with_recipe(kinds, [*argv, *TRIAL_OPTIONS], description=__doc__)
    recipe, options = split_off_config(argv)
    named = [word.split("=")[0].removeprefix("--").replace("-", "_") for word in options if word.startswith("--")]
    content: dict[str, Any] = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {} if recipe else {}
    parsed = {**vars(model_args), **vars(args)}
    chosen = [name for name in [*content, *named] if name in parsed and name not in NOT_IN_A_RECIPE]
    values = {name: plain(parsed[name]) for name in chosen}
    from scripts.hpo.trials import search  # the libraries are imported once the options are known to be right

    return search(model_args, data_args, args, search_args, values)


if __name__ == "__main__":
    sys.exit(run_main(command))
