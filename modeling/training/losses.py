"""Class weights, and a weighted loss that can be summed over the micro-batches of a step."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.special import entr
from torch import nn

MAX_POSITIVE_WEIGHT = 100.0


def balanced_class_weights(
    labels: Sequence[int] | torch.Tensor | Mapping[str, int], num_labels: int | None = None
) -> torch.Tensor:
    """Class weights `total / (K × count)` (scikit-learn's "balanced"; King & Zeng 2001).

    Args:
        labels: class ids of the training documents, or document counts per class (a mapping, or integers without a 0;
            ids always include 0, which distinguishes the two).
        num_labels: K; required for ids if the highest class may be absent.

    Returns:
        (K,) float32.

    Raises:
        ValueError: a class has no documents.

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
            f"No training document of class {', '.join(absent[:5]) or '(any)'}{' and others' * (len(absent) > 5)}: "
            "balanced weights need at least one per class. Add documents, remove the label, or set `class_weights` to "
            "none."
        )
    return (counts.sum() / (len(counts) * counts)).to(torch.float32)


def balanced_positive_weights(counts_K: Sequence[int] | np.ndarray, num_documents: int) -> torch.Tensor:
    """Weights of a label's documents, for several labels a document: those without it ÷ those with it, at most
    `MAX_POSITIVE_WEIGHT`.

    >>> balanced_positive_weights([50, 10, 0], 100)
    tensor([  1.,   9., 100.])
    """
    counts = torch.as_tensor(np.asarray(counts_K), dtype=torch.float64)
    return ((num_documents - counts) / counts.clamp(min=1)).clamp(max=MAX_POSITIVE_WEIGHT).float()


def weighted_loss_sum(
    logits_BK: torch.Tensor, labels: torch.Tensor, class_weights_K: torch.Tensor | None, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Sum of weight × loss over the documents, (): the numerator of `cross_entropy(weight=class_weights_K)` for class ids
    (B,), and of `binary_cross_entropy_with_logits(pos_weight=class_weights_K)` for labels (B, K) of 0 and 1.

    Divide by `weight_sum` over all documents of the step. Labels of -100 are ignored. With smoothing ε, targets of 0 and 1
    are ε / 2 and 1 − ε / 2.
    """
    logits_BK = logits_BK.float()
    if labels.dim() == 1:
        return nn.functional.cross_entropy(
            logits_BK, labels, class_weights_K, label_smoothing=label_smoothing, reduction="sum"
        )
    known_BK = (labels != -100).float()
    target_BK = (labels * known_BK) * (1 - label_smoothing) + label_smoothing / 2
    return nn.functional.binary_cross_entropy_with_logits(
        logits_BK, target_BK, known_BK, pos_weight=class_weights_K, reduction="sum"
    )


def weight_sum(labels: torch.Tensor, class_weights_K: torch.Tensor | None) -> torch.Tensor:
    """The denominator of the weighted loss, (): the sum of the documents' class weights, or for labels (B, K) their number.
    Labels of -100 are ignored."""
    # Multiplies rather than indexes with a mask, which would synchronize with the device.
    counts = labels != -100
    if class_weights_K is None or labels.dim() == 2:
        return counts.sum(dtype=torch.float32)
    return (class_weights_K.to(labels.device)[labels.clamp(min=0)] * counts).sum()


def chance_loss(
    count_K: Sequence[int] | np.ndarray,
    num_documents: int,
    class_weights_K: torch.Tensor | None,
    is_multi_label: bool,
    label_smoothing: float = 0.0,
) -> tuple[float, float]:
    """The weighted loss of the best scores that are the same for every document, which know only how frequent the labels are;
    and that of perfect scores, above 0 with label smoothing.

    >>> chance_loss([50, 50], 100, None, False), chance_loss([90, 10], 100, torch.tensor([1.0, 9.0]), False)
    ((0.6931471805599453, 0.0), (0.6931471805599453, 0.0))
    """
    num_labels, count_K = len(count_K), np.asarray(count_K, dtype=np.float64)
    weight_K = np.ones(num_labels) if class_weights_K is None else class_weights_K.cpu().double().numpy()
    # Of L decisions with Y answers each, the number of documents by the right answer (L, Y), and their weights (L, Y, Y).
    if is_multi_label:
        count_LY = np.stack([count_K, num_documents - count_K], axis=1)
        target_YY = np.eye(2) * (1 - label_smoothing) + label_smoothing / 2
        weight_LYY = target_YY * np.stack([weight_K, np.ones(num_labels)], axis=1)[:, None]
        total = num_documents * num_labels
    else:
        count_LY = count_K[None]
        weight_LYY = ((np.eye(num_labels) * (1 - label_smoothing) + label_smoothing / num_labels) * weight_K)[None]
        total = count_K @ weight_K
    chance = _lowest((count_LY[:, :, None] * weight_LYY).sum(axis=1)).sum() / total
    return float(chance), float((count_LY * _lowest(weight_LYY)).sum() / total)


def _lowest(weight_Y: np.ndarray) -> np.ndarray:
    """Minimum of −Σ weight · log p over distributions p, along the last axis."""
    total = weight_Y.sum(axis=-1)
    return total * entr(weight_Y / total[..., None]).sum(axis=-1)
