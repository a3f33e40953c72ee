"""Class weights, and the weighted loss whose parts add up to the loss of the whole step."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn


def balanced_class_weights(
    labels: Sequence[int] | torch.Tensor | Mapping[str, int], num_labels: int | None = None
) -> torch.Tensor:
    """Weights `total / (K × count)` (scikit-learn's "balanced"; King & Zeng 2001), so that classes count alike.

    Args:
        labels: class ids of the training documents, or the documents a class (a mapping, or numbers none of which
            is 0). Ids always hold a 0 and counts never do, which is how the two are told apart.
        num_labels: K; needed for ids where the highest class may be absent.

    Returns:
        (K,) float32.

    Raises:
        ValueError: a class without documents has no weight.

    >>> balanced_class_weights([3000, 1350, 550])
    tensor([0.5444, 1.2099, 2.9697])
    """
    names = list(labels) if isinstance(labels, Mapping) else None
    values = torch.as_tensor(list(labels.values()) if isinstance(labels, Mapping) else labels, dtype=torch.long)
    are_counts = names is not None or (num_labels is None and values.numel() > 0 and bool((values > 0).all()))
    counts = values if are_counts else torch.bincount(values, minlength=num_labels or 0)
    absent = [names[i] if names else str(i) for i, count in enumerate(counts.tolist()) if count <= 0]
    if absent or counts.numel() == 0:
        raise ValueError(
            f"No training document of class {', '.join(absent[:5]) or '(any)'}{' and others' * (len(absent) > 5)}: balanced weights need one of each at "
            "least. Give documents of that class, leave it out of the labels, or set class_weights to none."
        )
    return (counts.sum() / (len(counts) * counts)).to(torch.float32)


def weighted_loss_sum(
    logits_BK: torch.Tensor, labels_B: torch.Tensor, class_weights_K: torch.Tensor | None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum of weight × loss over the documents, (): the numerator of `cross_entropy(weight=class_weights_K)`.

    Divide by `weight_sum` over all documents of the step. Labels of -100 do not count.
    """
    return nn.functional.cross_entropy(
        logits_BK.float(), labels_B, class_weights_K, label_smoothing=label_smoothing, reduction="sum"
    )


def weight_sum(labels_B: torch.Tensor, class_weights_K: torch.Tensor | None) -> torch.Tensor:
    """Sum of the documents' class weights, (): the denominator of the weighted loss. Labels of -100 do not count."""
    # Products in place of a selection, whose size the host would have to wait for.
    counts_B = labels_B != -100
    if class_weights_K is None:
        return counts_B.sum(dtype=torch.float32)
    return (class_weights_K.to(labels_B.device)[labels_B.clamp(min=0)] * counts_B).sum()
