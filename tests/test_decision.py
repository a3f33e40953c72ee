"""Class biases: the best decisions by a metric of the confusion matrix, and none without need."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from modeling.training import decision
from modeling.training.decision import fit_averaged_biases, fit_class_biases, macro_f1_of

FITS = (fit_class_biases, fit_averaged_biases)


def confusion_of(labels_B: np.ndarray, predicted_B: np.ndarray, num_labels: int) -> np.ndarray:
    return np.bincount(labels_B * num_labels + predicted_B, minlength=num_labels**2).reshape(num_labels, num_labels)


def f1_with(scores_BK: np.ndarray, biases_K: np.ndarray, labels_B: np.ndarray) -> float:
    ids = list(range(scores_BK.shape[1]))
    return f1_score(labels_B, (scores_BK + biases_K).argmax(axis=1), labels=ids, average="macro", zero_division=0)


def skewed(num_documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores that tell three classes apart, of which the last is always preferred."""
    rng = np.random.default_rng(seed)
    labels_B = rng.choice(3, size=num_documents, p=[0.15, 0.25, 0.6])
    return 2.0 * np.eye(3)[labels_B] + rng.normal(size=(num_documents, 3)) + [0.0, 1.0, 3.0], labels_B


def test_macro_f1_is_scikit_learns_for_many_matrices_at_once():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(3, size=40), rng.integers(k, size=40)) for k in (1, 2, 3, 3)]
    confusion = np.stack([confusion_of(*pair, 4) for pair in pairs]).reshape(2, 2, 4, 4)
    expected = [f1_score(*pair, labels=[0, 1, 2, 3], average="macro", zero_division=0) for pair in pairs]
    assert macro_f1_of(confusion) == pytest.approx(np.reshape(expected, (2, 2)))


def test_biases_undo_a_skew_also_on_other_documents():
    scores, labels = skewed(600)
    biases = fit_class_biases(scores, labels, macro_f1_of)
    assert biases.shape == (3,)
    assert biases.mean() == pytest.approx(0)
    assert np.diff(biases) == pytest.approx([-1, -2], abs=0.7)
    other_scores, other_labels = skewed(600, seed=1)
    assert f1_with(other_scores, biases, other_labels) > f1_with(other_scores, np.zeros(3), other_labels) + 0.1


def test_two_classes_get_the_best_of_all_thresholds():
    rng = np.random.default_rng(0)
    labels = rng.choice(2, size=60, p=[0.8, 0.2])
    scores = np.stack([np.zeros(60), labels + rng.normal(size=60) - 1.5], axis=1)
    biases = fit_class_biases(scores, labels, macro_f1_of)
    edges = np.sort(-scores[:, 1])
    best = max(f1_with(scores, np.array([0.0, bias]), labels) for bias in (edges[1:] + edges[:-1]) / 2)
    assert f1_with(scores, biases, labels) == pytest.approx(best)


def test_the_middle_of_the_plateau_is_taken():
    # Class 1 is right above -1 and below -0.2, between which no document decides.
    scores = np.array([[0.0, 0.2], [0.0, 1.0], [0.0, 2.0], [0.0, -3.0]])
    biases = fit_class_biases(scores, np.array([0, 1, 1, 0]), macro_f1_of)
    assert biases == pytest.approx([0.3, -0.3])


def test_biases_that_do_not_help_are_zero():
    scores = np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert fit_class_biases(scores, np.array([0, 0, 1]), macro_f1_of).tolist() == [0, 0]
    same = np.zeros((6, 3))
    assert fit_class_biases(same, np.zeros(6, dtype=int), macro_f1_of).tolist() == [0, 0, 0]


def test_averaged_biases_vary_less_on_few_documents():
    fitted = {fit: np.stack([fit(*skewed(60, seed), macro_f1_of) for seed in range(8)]) for fit in FITS}
    spread = {fit: biases.std(axis=0).mean() for fit, biases in fitted.items()}
    assert spread[fit_averaged_biases] < 0.9 * spread[fit_class_biases]
    other_scores, other_labels = skewed(600, seed=100)
    biases = fitted[fit_averaged_biases].mean(axis=0)
    assert f1_with(other_scores, biases, other_labels) > f1_with(other_scores, np.zeros(3), other_labels) + 0.1


def test_averaged_biases_repeat_themselves_and_are_zero_if_they_do_not_help():
    scores, labels = skewed(60)
    biases = fit_averaged_biases(scores, labels, macro_f1_of)
    np.testing.assert_array_equal(biases, fit_averaged_biases(scores, labels, macro_f1_of))
    assert biases.mean() == pytest.approx(0)
    assert fit_averaged_biases(3.0 * np.eye(3)[labels], labels, macro_f1_of).tolist() == [0, 0, 0]


def test_another_metric_gives_other_decisions():
    scores, labels = skewed(300)

    def recall_of_first(confusion: np.ndarray) -> np.ndarray:
        return confusion[..., 0, 0] / np.maximum(confusion[..., 0, :].sum(axis=-1), 1)

    biases = fit_class_biases(scores, labels, recall_of_first)
    assert ((scores + biases).argmax(axis=1) == 0)[labels == 0].all()


def test_a_class_that_is_ruled_out_stays_so():
    scores, labels = skewed(100)
    scores[:, 1] = -np.inf
    scores[:5, [0, 2]] = -np.inf
    scores[:5, 1] = 0.0
    biases = fit_class_biases(scores, labels, macro_f1_of)
    assert np.isfinite(biases).all()
    assert ((scores + biases).argmax(axis=1) == 1).tolist() == [True] * 5 + [False] * 95


def test_fewer_candidates_are_tried_beyond_the_memory_limit(monkeypatch):
    scores, labels = skewed(600)
    monkeypatch.setattr(decision, "MAX_CELLS", 100 * 9)
    biases = fit_class_biases(scores, labels, macro_f1_of)
    assert f1_with(scores, biases, labels) > f1_with(scores, np.zeros(3), labels) + 0.1


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 3), (5, 1)])
def test_few_documents_or_labels(shape):
    for fit in FITS:
        assert fit(np.zeros(shape), np.zeros(shape[0], dtype=int), macro_f1_of).tolist() == [0.0] * shape[1]


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([[0.0, 1.0]], [0, 1]),
        ([0.0, 1.0], [0, 1]),
        ([[0.0, np.nan]], [0]),
        ([[0.0, np.inf]], [0]),
        ([[0.0, 1.0]], [2]),
        ([[0.0, 1.0]], [-1]),
    ],
)
def test_impossible_input_is_refused(scores, labels):
    for fit in FITS:
        with pytest.raises(ValueError, match=r"scores|Labels"):
            fit(np.array(scores), np.array(labels), macro_f1_of)
