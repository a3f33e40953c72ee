"""The optimizer: which `--optim` can be used, and parameter groups with a learning rate per model part."""

from collections.abc import Collection, Mapping
from copy import copy
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

# Part → first components of parameter names, in the order of the optimizer's groups.
PARTS = {
    "encoder": ("encoder",),
    "chunk_attention": ("pooling", "chunk_transformer"),
    "head": ("classifier",),
}


# Part of an optimizer's name → why it cannot be used.
REFUSED = {
    "layerwise": "updates weights during the backward pass, so a step could neither accumulate gradients nor be skipped",
    "lomo": "updates weights during the backward pass, so a step could neither accumulate gradients nor be skipped",
    "galore": "saves its projections as Python objects, which could run code and are not loaded when a run is resumed",
    "apollo": "saves its projections as Python objects, which could run code and are not loaded when a run is resumed",
    "grokadamw": "does not restore its moments when a run is resumed",
    "schedule_free": "evaluates other weights than it trains, and a checkpoint could hold either",
}


def optimizer_class_and_kwargs(args: TrainingArguments) -> tuple[type, dict[str, Any]]:
    """The class of `args.optim`, and its arguments without the parameters.

    Raises:
        ValueError: the optimizer cannot be used here, its package is missing, or `optim_args` do not suit it.
    """
    name = str(getattr(args.optim, "value", args.optim))
    for part, reason in REFUSED.items():
        if part in name:
            raise ValueError(f"`optim` {name} {reason}: use adamw_torch_fused or, for less memory, adafactor.")
    if args.optim_args and not all(part.count("=") == 1 for part in args.optim_args.split(",")):
        raise ValueError(f"`optim_args` must be name=value,name=value,…, got {args.optim_args!r}.")
    without = copy(args)
    without.optim_args = None
    try:
        (optimizer_class, kwargs), (_, defaults) = map(Trainer.get_optimizer_cls_and_kwargs, (args, without))
        for settings in (kwargs, defaults):
            settings.pop("weight_decay", None)  # the groups have theirs
        optimizer_class(nn.Linear(1, 1).parameters(), **kwargs)
    except (ImportError, TypeError, ValueError, AttributeError) as error:
        given = f" with `optim_args` {args.optim_args}" if args.optim_args else ""
        raise ValueError(f"`optim` {name}{given} cannot be used: {error}") from error
    if args.optim_args and kwargs == defaults:
        raise ValueError(f"`optim_args` {args.optim_args} has no effect on `optim` {name}: remove it.")
    return optimizer_class, kwargs


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Parameter groups `encoder`, `chunk_attention` and `head`, each with weight decay and without (`_no_decay`).

    Args:
        learning_rates: learning rate of each part.
        decayed: names of parameters with weight decay (not biases and norms).

    Raises:
        ValueError: no trainable parameters, a parameter outside all parts, or an empty part.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "The model has no trainable parameters (frozen_model): unfreeze the head or remove --freeze_encoder."
        )
    parts_of = {name: [part for part, roots in PARTS.items() if name.split(".")[0] in roots] for name in trainable}
    if unassigned := [name for name, parts in parts_of.items() if len(parts) != 1]:
        raise ValueError(f"Parameters must be in exactly one optimizer group; check {', '.join(unassigned)}.")
    groups = []
    for part, roots in PARTS.items():
        selected = [name for name in trainable if parts_of[name] == [part]]
        owned = [name for name, _ in model.named_parameters() if name.split(".")[0] in roots]
        if not selected and (part == "head" or (part == "chunk_attention" and owned)):
            raise ValueError(f"Optimizer group {part} is empty: all its parameters are frozen.")
        for suffix, names, decay in (
            ("", [name for name in selected if name in decayed], weight_decay),
            ("_no_decay", [name for name in selected if name not in decayed], 0.0),
        ):
            if names:
                parameters = [trainable[name] for name in names]
                groups.append(
                    {"name": part + suffix, "params": parameters, "lr": learning_rates[part], "weight_decay": decay}
                )
    return groups
