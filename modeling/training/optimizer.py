"""The optimizer's groups: which parameter learns at which rate."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

# Where a parameter belongs, by the first part of its name, in the order of the optimizer's groups.
PARTS = {
    "encoder": ("encoder",),
    "chunk_attention": ("pooling", "chunk_transformer"),
    "head": ("classifier",),
}


def parameter_groups(
    model: nn.Module, rates: Mapping[str, float], weight_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Groups `encoder`, `chunk_attention`, `head`, each with decay and (`_no_decay`) without: biases and norms.

    Args:
        rates: the learning rate of each part.
        decayed: names of the parameters that weight decay is for.

    Raises:
        ValueError: nothing to train; a parameter that belongs to no part; a part without parameters.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError(
            "The model has no trainable parameters (frozen_model): unfreeze the head, or leave --freeze_encoder out."
        )
    part_of = {name: [part for part, heads in PARTS.items() if name.split(".")[0] in heads] for name in trainable}
    if strays := [name for name, parts in part_of.items() if len(parts) != 1]:
        raise ValueError(f"These parameters are in no optimizer group or in two: {', '.join(strays)}.")
    groups = []
    for part, heads in PARTS.items():
        of_part = [name for name in trainable if part_of[name] == [part]]
        owned = [name for name, _ in model.named_parameters() if name.split(".")[0] in heads]
        if not of_part and (part == "head" or (part == "chunk_attention" and owned)):
            raise ValueError(f"The optimizer group {part} is empty: all its parameters are frozen.")
        for suffix, names, decay in (
            ("", [name for name in of_part if name in decayed], weight_decay),
            ("_no_decay", [name for name in of_part if name not in decayed], 0.0),
        ):
            if names:
                parameters = [trainable[name] for name in names]
                groups.append({"name": part + suffix, "params": parameters, "lr": rates[part], "weight_decay": decay})
    return groups
