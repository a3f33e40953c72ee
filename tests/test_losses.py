"""Class weights and the parts of the weighted loss."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from modeling.training.losses import balanced_class_weights, chance_loss, weight_sum, weighted_loss_sum


def test_balanced_weights_of_the_case_it_was_made_for():
    assert [round(w, 2) for w in balanced_class_weights([3000, 1350, 550]).tolist()] == [0.54, 1.21, 2.97]


def test_labels_counts_and_mappings_agree_with_scikit_learn():
    labels = [0] * 7 + [1] * 2 + [2] * 3
    expected = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=labels), dtype=torch.float32)
    for given in (labels, torch.tensor(labels), [7, 2, 3], {"General": 7, "Teen": 2, "Mature": 3}):
        torch.testing.assert_close(balanced_class_weights(given), expected)


def test_an_absent_class_is_an_error():
    with pytest.raises(ValueError, match=r"class\b.*\b2\b"):
        balanced_class_weights([0, 0, 1], num_labels=3)
    with pytest.raises(ValueError, match="Teen"):
        balanced_class_weights({"General": 3, "Teen": 0})


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_parts_add_up_to_torchs_weighted_cross_entropy(label_smoothing):
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(16, 3), torch.randint(3, (16,)), torch.tensor([0.5, 1.2, 3.0])
    labels[3] = -100
    parts = [weighted_loss_sum(logits[i : i + 1], labels[i : i + 1], weights, label_smoothing) for i in range(16)]
    whole = torch.nn.functional.cross_entropy(logits, labels, weights, label_smoothing=label_smoothing)
    torch.testing.assert_close(sum(parts) / weight_sum(labels, weights), whole)
    assert weight_sum(labels, None) == 15


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("is_multi_label", [False, True])
def test_chance_loss_is_the_lowest_of_the_same_logits_for_every_document(is_multi_label, weighted, label_smoothing):
    rng = np.random.default_rng(0)
    ids = torch.as_tensor(rng.choice(3, size=200, p=[0.6, 0.3, 0.1]))
    labels = torch.as_tensor(rng.random((200, 3)) < [0.02, 0.3, 0.9]).long() if is_multi_label else ids
    counts = labels.sum(dim=0) if is_multi_label else torch.bincount(ids)
    weights = torch.tensor([5.0, 1.0, 0.3]) if weighted else None

    def lowest(logits):
        optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = weighted_loss_sum(logits.expand(200, 3), labels, weights, label_smoothing)
            value = value / weight_sum(labels, weights)
            value.backward()
            return value

        optimizer.step(loss)
        return loss().item()

    found = chance_loss(counts.numpy(), 200, weights, is_multi_label, label_smoothing)
    assert found[0] == pytest.approx(lowest(torch.zeros(3, requires_grad=True)), rel=1e-5)
    assert found[1] == pytest.approx(lowest(torch.zeros(200, 3, requires_grad=True)), rel=1e-3, abs=1e-3)
