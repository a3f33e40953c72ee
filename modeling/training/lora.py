"""LoRA (Hu et al. 2021): train low-rank adapters in the encoder's linear layers in place of its weights.

    add_adapters(model, rank=16)
    WeightedTrainer(model=model, …).train()
    merge_adapters(model)

A state dict, and so a checkpoint, holds the merged weights under the names that they have without adapters, and the
adapters beside them. It can be loaded as any other model, without peft; to resume, the frozen weights are those of the
encoder that the run started from. I inputs, O outputs, R rank.
"""

import importlib
from typing import Any

import torch
from torch import nn

from ..hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from ..hierarchical_roberta.precision import full_precision

# α as a multiple of the rank: the update is scaled by α/R (as for RoBERTa in https://github.com/microsoft/LoRA).
ALPHA_PER_RANK = 2


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained, with a copy of its weights in the dtype of autocast.

    autocast reuses its copies of trained weights only: of frozen ones, every encoder batch would keep another.

    Args:
        linear: whose parameters are used.
        dtype: of the copy (None: no copy).
    """

    cast_weight: torch.Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("cast_weight", None if dtype is None else linear.weight.to(dtype), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        cast_weight = self.cast_weight if torch.is_autocast_enabled(inputs.device.type) else None
        return nn.functional.linear(inputs, self.weight if cast_weight is None else cast_weight, self.bias)


def add_adapters(
    model: HierarchicalRobertaForSequenceClassification, rank: int, autocast_dtype: torch.dtype | None = None
) -> None:
    """Add an adapter to each linear layer of the encoder that is trained, and freeze the encoder's own weights.

    The encoder's dropouts stay as they are; adapters have none of their own.

    Args:
        rank: of the adapters, R. Their α is 2 R.
        autocast_dtype: dtype of autocast in training (None: fp32).

    Raises:
        ValueError: peft is not installed, or no linear layer of the encoder is trained.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise ValueError(
            f"--lora_rank needs peft, which comes with the extra `lora`: pip install -e '.[lora]' ({error})."
        ) from error
    encoder: nn.Module = model.encoder
    linear = {
        name: part
        for name, part in encoder.named_modules()
        if type(part) is nn.Linear and part.weight.requires_grad  # of a subclass, something else may read the weights
    }
    if not linear:
        kind = model.config.encoder_config.model_type
        raise ValueError(
            f"--lora_rank adapts linear layers, and none of the encoder's ({kind}) is trained: remove it, or lower "
            "--freeze_layers."
        )
    model.adapted_parts = {
        part
        for part in encoder.modules()
        if part not in linear.values() and any(weight.requires_grad for weight in part.parameters())
    }
    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA_PER_RANK * rank, lora_dropout=0.0, bias="none", target_modules=list(linear)
    )
    peft.inject_adapter_in_model(config, encoder)  # freezes the rest
    for name, part in linear.items():
        layer: Any = encoder.get_submodule(name)
        layer.base_layer = FrozenLinear(part, autocast_dtype)
        layer.cast_input_dtype_enabled = False  # peft would keep a second copy of bf16 inputs for the backward pass
        layer.register_state_dict_post_hook(_save_merged)
        layer.register_load_state_dict_pre_hook(_load_adapter)
    model.config.lora_rank = rank


@torch.no_grad()
def merge_adapters(model: HierarchicalRobertaForSequenceClassification) -> None:
    """Replace the encoder's layers that have adapters by plain ones with the merged weights, which are frozen."""
    names = [
        name.removesuffix(".base_layer")
        for name, part in model.encoder.named_modules()
        if isinstance(part, FrozenLinear)
    ]
    for name in names:
        layer: Any = model.encoder.get_submodule(name)
        weight_OI = merged(layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight)
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight_OI, requires_grad=False), layer.base_layer.bias
        model.encoder.set_submodule(name, plain)
    if names:
        model.adapted_parts = set()
        del model.config.lora_rank


def merged(weight_OI: torch.Tensor, down_RI: torch.Tensor, up_OR: torch.Tensor) -> torch.Tensor:
    """The weights that compute what a layer and its adapter do, (O, I), in full fp32."""
    with full_precision(weight_OI.device):
        return weight_OI + ALPHA_PER_RANK * (up_OR @ down_RI)


@torch.no_grad()
def _save_merged(layer: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict of a layer with adapter: merged weights, on the CPU, as there may be no room for all of them elsewhere."""
    weight_OI = state.pop(f"{prefix}base_layer.weight")
    adapter = (state[f"{prefix}lora_{part}.default.weight"] for part in "AB")
    state[f"{prefix}weight"] = merged(weight_OI, *adapter).cpu()
    if layer.base_layer.bias is not None:
        state[f"{prefix}bias"] = state.pop(f"{prefix}base_layer.bias")


@torch.no_grad()
def _load_adapter(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load the adapter of a state dict of `_save_merged` only: its frozen weights are there already, and exact.

    Raises:
        ValueError: there is no adapter for the layer, or one of other frozen weights.
    """
    weight_OI, bias_O = layer.base_layer.weight, layer.base_layer.bias
    names = [f"{prefix}{part}" for part in ("weight", "lora_A.default.weight", "lora_B.default.weight")]
    saved = [state[name].to(weight_OI.device) for name in names if name in state]
    if len(saved) < 3 or not torch.allclose(merged(weight_OI, *saved[1:]), saved[0], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"The checkpoint's adapters are of another encoder, or of other layers of it ({names[0]} differs): resume "
            "with --encoder and --freeze_layers as the run started."
        )
    del state[names[0]]
    state[f"{prefix}base_layer.weight"] = weight_OI
    if bias_O is not None:
        del state[f"{prefix}bias"]
        state[f"{prefix}base_layer.bias"] = bias_O
