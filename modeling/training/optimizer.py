"""Optimizer parameter groups with a learning rate per model part."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

# Part → first components of parameter names, in the order of the optimizer's groups.
PARTS = {
    "encoder": ("encoder",),
    "chunk_attention": ("pooling", "chunk_transformer"),
    "head": ("classifier",),
}


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
