"""The project's metric against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sk

from modeling.training.metrics import ClassificationMetrics

LABELS = ["General", "Teen", "Mature"]


@pytest.mark.parametrize("absent", [None, 1, 2])
def test_values_are_scikit_learns_an_absent_class_included(absent):
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(3, size=80), rng.integers(3, size=80)
    if absent is not None:
        truth[truth == absent] = 0
    metric = ClassificationMetrics(LABELS, [0.3, 0.3, 0.4])
    metric.add_batch(predictions=predicted[:50], references=truth[:50])
    metric.add_batch(predictions=predicted[50:], references=truth[50:])
    values = metric.compute()
    common = {"labels": [0, 1, 2], "zero_division": 0}
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    for name in ("macro", "weighted"):
        assert values[f"f1_{name}"] == pytest.approx(sk.f1_score(truth, predicted, average=name, **common))
    assert values["precision_macro"] == pytest.approx(sk.precision_score(truth, predicted, average="macro", **common))
    assert values["recall_macro"] == pytest.approx(sk.recall_score(truth, predicted, average="macro", **common))
    kappa = sk.cohen_kappa_score(truth, predicted, weights="quadratic", labels=[0, 1, 2])
    assert values["quadratic_kappa"] == pytest.approx(kappa)
    f1 = sk.f1_score(truth, predicted, average=None, **common)
    assert values["severity_f1"] == pytest.approx(f1 @ [0.3, 0.3, 0.4])
    for i, label in enumerate(LABELS):
        assert values[f"f1_{label}"] == pytest.approx(f1[i])
        assert values[f"support_{label}"] == (truth == i).sum()


def test_one_class_only_gives_numbers():
    values = ClassificationMetrics(LABELS).compute(predictions=[0, 0], references=[0, 0])
    assert values["quadratic_kappa"] == 0
    assert values["f1_macro"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("label", ["macro", "weighted"])
def test_a_label_whose_own_value_would_stand_for_that_of_all(label):
    with pytest.raises(ValueError, match=f"f1_{label}"):
        ClassificationMetrics(["micro", label])


def test_wrong_number_of_severity_weights():
    with pytest.raises(ValueError, match=r"\b2\b.*\b3\b|\b3\b.*\b2\b"):
        ClassificationMetrics(LABELS, [0.5, 0.5])
