"""Baselines on the same split."""

from typing import Any

import datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling.training.metrics import classification_metrics
from modeling.training.training_args import parse_severity_weights


def tfidf_scores(train: datasets.Dataset, test: datasets.Dataset) -> np.ndarray:
    """Class-balanced logistic regression on unigram TF-IDF of the full text: probabilities of `test`, (B, K)."""
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(class_weight="balanced", max_iter=2000, C=10.0)
    )
    model.fit(train["text"], np.asarray(train["label"]))
    return predict_all_classes(model, test["text"], train.features["label"].num_classes)


def majority_predictions(train: datasets.Dataset, test: datasets.Dataset) -> np.ndarray:
    """The most frequent training label for every document, (B,)."""
    return np.full(len(test), np.bincount(np.asarray(train["label"])).argmax())


def baseline_metrics(train: datasets.Dataset, test: datasets.Dataset) -> dict[str, dict[str, float]]:
    """Metrics on `test` of TF-IDF (`tfidf`) and of the most frequent class (`majority`)."""
    names = train.features["label"].names
    predictions = {"tfidf": tfidf_scores(train, test).argmax(axis=1), "majority": majority_predictions(train, test)}
    options = (list(test["label"]), names, parse_severity_weights(None, len(names)))
    return {name: classification_metrics(predicted.tolist(), *options) for name, predicted in predictions.items()}


def vector_scores(train_BD: np.ndarray, labels_B: np.ndarray, test_BD: np.ndarray, num_labels: int) -> np.ndarray:
    """Class-balanced logistic regression on standardized document vectors: probabilities of `test_BD`, (B, K)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, C=0.1))
    model.fit(train_BD, labels_B)
    return predict_all_classes(model, test_BD, num_labels)


def predict_all_classes(model: Any, documents: Any, num_labels: int) -> np.ndarray:
    """Probabilities (B, K), 0 for a class without training documents."""
    scores_BK = np.zeros((len(documents), num_labels))
    scores_BK[:, model.classes_] = model.predict_proba(documents)
    return scores_BK
