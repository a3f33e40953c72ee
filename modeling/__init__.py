"""The model and its training; works on tensors, never on document files. Exports the main names."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
    from .hierarchical_roberta.modeling_hierarchical_roberta import (
        HierarchicalOutput,
        HierarchicalRobertaForSequenceClassification,
    )
    from .training.losses import balanced_class_weights
    from .training.trainer import WeightedTrainer
    from .training.training_args import HierarchicalTrainingArguments

_MODULE_OF = {
    "HierarchicalRobertaConfig": "hierarchical_roberta.configuration_hierarchical_roberta",
    "HierarchicalOutput": "hierarchical_roberta.modeling_hierarchical_roberta",
    "HierarchicalRobertaForSequenceClassification": "hierarchical_roberta.modeling_hierarchical_roberta",
    "WeightedTrainer": "training.trainer",
    "HierarchicalTrainingArguments": "training.training_args",
    "balanced_class_weights": "training.losses",
}
__all__ = [
    "HierarchicalOutput",
    "HierarchicalRobertaConfig",
    "HierarchicalRobertaForSequenceClassification",
    "HierarchicalTrainingArguments",
    "WeightedTrainer",
    "balanced_class_weights",
]


def __getattr__(name: str) -> Any:
    # Imported lazily: preparing documents needs no torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
