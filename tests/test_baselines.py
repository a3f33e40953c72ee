"""The tuned TF-IDF: chosen on the training documents alone, and sane on any of them."""

import datasets
import numpy as np
import pytest
from sklearn.metrics import f1_score

from scripts.evaluation import baselines
from scripts.evaluation.baselines import tfidf_scores, tuned_tfidf_scores, tuning_rows

NAMES = ["a", "b", "c"]


def documents(texts: list[str], labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def uneven(count: int, seed: int) -> datasets.Dataset:
    """Three classes in shares of 0.15, 0.25 and 0.6, each with twenty words of two thousand that are likelier in it."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=count, p=[0.15, 0.25, 0.6])
    shares = np.ones((3, 2000))
    for label in range(3):
        shares[label, label * 20 : label * 20 + 20] = 4
    shares /= shares.sum(axis=1, keepdims=True)
    words = np.array([f"w{number}" for number in range(2000)])
    return documents([" ".join(rng.choice(words, size=200, p=shares[label])) for label in labels], labels.tolist())


def f1_of(scores_BK: np.ndarray, test: datasets.Dataset) -> float:
    return f1_score(test["label"], scores_BK.argmax(axis=1), labels=[0, 1, 2], average="macro", zero_division=0)


def test_tuning_pays_on_uneven_classes_and_repeats_itself():
    train, test = uneven(150, 0), uneven(200, 1)
    scores, chosen = tuned_tfidf_scores(train, test)
    assert f1_of(scores, test) > f1_of(tfidf_scores(train, test), test) + 0.1
    assert scores.sum(axis=1) == pytest.approx(1)
    again, chosen_again = tuned_tfidf_scores(train, test)
    np.testing.assert_array_equal(scores, again)
    assert chosen == chosen_again


def test_the_order_of_words_is_seen():
    texts = ["not good but bad"] * 10 + ["not bad but good"] * 10
    train = documents(texts, [0] * 10 + [1] * 10)
    scores, _ = tuned_tfidf_scores(train, documents(["not good", "not bad"], [0, 1]))
    assert scores.argmax(axis=1).tolist() == [0, 1]


def test_texts_without_spaces_are_told_apart_by_their_characters():
    rng = np.random.default_rng(0)
    texts = [
        "".join(rng.permutation(list("天地玄黃宇宙洪荒" if label else "日月盈昃辰宿列張"))) for label in [0, 1] * 10
    ]
    train = documents(texts, [0, 1] * 10)
    scores, chosen = tuned_tfidf_scores(train, documents(["日張月盈昃", "荒天地玄"], [0, 1]))
    assert scores.argmax(axis=1).tolist() == [0, 1]
    assert "characters" in chosen


def test_held_out_documents_change_nothing():
    train, test = uneven(100, 0), uneven(20, 1)
    scores, chosen = tuned_tfidf_scores(train, test)
    some, chosen_again = tuned_tfidf_scores(train, test.select([3]))
    assert chosen == chosen_again
    assert some[0] == pytest.approx(scores[3])


@pytest.mark.parametrize(
    ("texts", "labels", "likely"),
    [
        (["one story"], [1], 1),
        ([""], [2], 2),
        (["", "", ""], [0, 2, 2], 2),
        (["!!!", "?", "…"], [0, 2, 2], 2),
        (["a word here", "other word", "word"], [1, 1, 1], 1),
        (["wolf night"] * 3 + ["bread milk"], [0, 0, 0, 1], 0),  # a class of one document
        (["wolf night"] * 3 + ["bread milk"] * 2, [0, 0, 0, 1, 1], 0),  # of two
        (["wolf night"] * 3 + ["", ""], [0, 0, 0, 1, 1], 0),
        (["alpha", "beta", "gamma", "wolf"], [0, 1, 1, 0], 0),  # nothing occurs twice
    ],
)
def test_few_documents_get_a_sane_answer(texts, labels, likely):
    scores, _ = tuned_tfidf_scores(documents(texts, labels), documents(["the wolf at night", ""], [0, 0]))
    assert scores.sum(axis=1) == pytest.approx(1)
    assert scores.argmax(axis=1)[0] == likely
    assert not scores[:, [label for label in range(3) if label not in labels]].any()


def test_tuning_takes_a_share_of_each_class_of_many_documents(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_TUNING_DOCUMENTS", 100)
    labels = np.repeat([0, 1, 2], [900, 97, 3])
    rows = tuning_rows(labels)
    assert np.bincount(labels[rows]).tolist() == [90, 10, 3]
    assert len(set(rows.tolist())) == 103
    train, test = uneven(150, 0), uneven(200, 1)
    scores, _ = tuned_tfidf_scores(train, test)
    assert f1_of(scores, test) > f1_of(tfidf_scores(train, test), test) + 0.1
