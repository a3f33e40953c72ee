"""Parse a recipe and the command line, which overrides it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from scripts.common.cli import UserParser

# Options that earlier versions of transformers or of this project had: name → the option that replaces it, or why none
# does. (Some versions of transformers in range still have some of them, with a warning.)
RENAMED = {
    "evaluation_strategy": "use --eval_strategy",
    "warmup_ratio": "use --warmup_steps, where a value below 1 is a fraction of the run",
    "no_cuda": "use --use_cpu",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "logging_dir": "TensorBoard files are in runs/ in --output_dir",
    "group_by_length": "encoder batches group chunks by length already",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id ORGANIZATION/NAME",
    "push_to_hub_token": "use --hub_token, or HF_TOKEN in the environment",
    "include_inputs_for_metrics": "metrics are computed from logits and labels",
    "include_tokens_per_second": "use --include_num_input_tokens_seen",
    "adafactor": "use --optim adafactor",
    "half_precision_backend": "use --bf16 or --fp16",
    "fp16_backend": "use --bf16 or --fp16",
    "fp16_opt_level": "use --bf16 or --fp16",
    "use_mps_device": "the device is selected automatically",
    "use_ipex": "the device is selected automatically",
    "xpu_backend": "use --ddp_backend",
    "sharded_ddp": "use accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml",
    "fsdp_min_num_params": "use accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml",
    "fsdp_transformer_layer_cls_to_wrap": "use accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml",
    "torchdynamo": "use --compile_layers",
    "jit_mode_eval": "use --compile_layers",
    "save_safetensors": "weights are always saved as safetensors",
    "tpu_num_cores": "TPUs are not supported",
    "tpu_metrics_debug": "TPUs are not supported",
    "past_index": "an encoder has no past states",
    "split_batches": "it would separate documents from their chunks",
    "dispatch_batches": "it would separate documents from their chunks",
    "ray_scope": "use python -m scripts.search",
    "mp_parameters": "SageMaker's model parallelism is not supported",
}


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
    for word in rest:
        refuse_renamed(word.partition("=")[0])
    known = {action.dest for action in parser._actions} - {"help", "config"}
    *parsed, _remaining, unknown = parser.parse_args_into_dataclasses(
        [*_recipe_options(recipe, known, parser), *rest], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"Unknown option {' '.join(unknown)}. ({parser.prog} --help lists every option.)")
    return tuple(parsed)


def refuse_renamed(word: str, where: str = "") -> None:
    """Raise ValueError if the word is the old name of an option, and say what replaces it."""
    if word.startswith("--") and (replacement := RENAMED.get(word.removeprefix("--").replace("-", "_"))):
        raise ValueError(f"{where}{word} is no longer an option: {replacement}.")


def split_off_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split --config from the other arguments."""
    reader = UserParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config")
    known, rest = reader.parse_known_args(argv)
    return known.config, rest


def _recipe_options(recipe: str | None, known: set[str], parser: HfArgumentParser) -> list[str]:
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
    for key in content:
        refuse_renamed(f"--{key}", f"{recipe}: ")
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"{recipe}: unknown key {', '.join(unknown)}.")
    options = []
    for key, value in content.items():
        if value is None or value == []:
            if parser.get_default(key):
                raise ValueError(
                    f"{recipe}: {key} is empty, and its default ({parser.get_default(key)}) would be used: leave it out, or "
                    "name the value that turns it off (none, False or 0)."
                )
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        options += [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *map(str, values)]
    return options
