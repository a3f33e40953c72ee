"""Baselines for several labels a document: a logistic regression for each label, on the same split.

B documents, V words and word pairs, D dimensions of document vectors, K labels.
"""

from typing import Any

import datasets
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from data.labels import label_array
from modeling.hierarchical_roberta.decision import THRESHOLD, MultiLabelDecision, sigmoid
from modeling.training.thresholds import best_threshold, fit_multi_label_decision, fit_thresholds
from scripts.evaluation.baselines import INVERSE_PENALTIES, MAX_WEIGHTS, count, features_of, ngram_counter, weigh
from scripts.evaluation.statistics import Prediction

NUM_FOLDS = 3
# Words and pairs that are kept however many labels there are: words that indicate rare labels are rare themselves.
MIN_FEATURES = 20_000
# Features, class weights and penalty are chosen on labels of all frequencies; those after the second number share a threshold.
# Above that many documents, all are chosen on a sample.
COMPARED_LABELS, THRESHOLD_LABELS, MAX_TUNING_DOCUMENTS = 30, 200, 5_000


def tfidf(train: datasets.Dataset, test: datasets.Dataset) -> Prediction:
    """Balanced logistic regressions on unigram TF-IDF of the full text, untuned: labels with a score of at least 0.5. The
    shares of the labels in `train` for every document if it has no words."""
    counter, labels_BK = TfidfVectorizer(sublinear_tf=True), label_array(train)
    train_BV = count(counter, list(train["text"]))
    if train_BV is None:
        return most_frequent(train, test)
    return decided(fit_predict(train_BV, labels_BK, counter.transform(test["text"]), 10.0, "balanced"))


def tuned_tfidf(train: datasets.Dataset, test: datasets.Dataset) -> Prediction:
    """Logistic regressions on TF-IDF of words, or of words and word pairs, tuned by inner folds of `train` (Lin, Chen, Wu & Lin
    2023, "Linear Classifier: An Often-Forgotten Baseline for Text Classification").

    Features, class weights (balanced or none, which decides for rare labels) and penalty are chosen by the mean average precision
    out of fold, and each label's threshold by its F1 there.
    The prediction of `tfidf` if nothing occurs in two documents, or there are fewer than six.
    """
    labels_BK, texts = label_array(train), list(train["text"])
    num_labels = labels_BK.shape[1]
    rows = np.sort(np.random.default_rng(0).permutation(len(texts))[:MAX_TUNING_DOCUMENTS])
    counter = ngram_counter([texts[row] for row in rows], max(MIN_FEATURES, MAX_WEIGHTS // num_labels))
    tuning_BV = count(counter, [texts[row] for row in rows])
    if tuning_BV is None or len(rows) < 2 * NUM_FOLDS:
        return tfidf(train, test)._replace(options="as tfidf, for want of documents")
    kept_V, tuning_BK = features_of(counter), labels_BK[rows]
    frequent = np.argsort(-tuning_BK.sum(axis=0), kind="stable")
    learnable = frequent[: max(1, int((tuning_BK.sum(axis=0) >= NUM_FOLDS).sum()))]
    compared_BK = tuning_BK[:, learnable[:: -(-len(learnable) // COMPARED_LABELS)]]
    precision = {
        (features, penalty, class_weight): mean_average_precision(
            compared_BK, out_of_fold(tuning_BV[:, kept], compared_BK, penalty, class_weight)
        )
        for features, kept in kept_V.items()
        for class_weight in (None, "balanced")
        for penalty in INVERSE_PENALTIES
    }
    features, penalty, class_weight = max(precision, key=precision.__getitem__)
    own = frequent[:THRESHOLD_LABELS]
    own_BK = tuning_BK[:, own]
    scores_BK = sigmoid(out_of_fold(tuning_BV[:, kept_V[features]], own_BK, penalty, class_weight))
    thresholds_K = np.full(num_labels, best_threshold(scores_BK.ravel(), own_BK.ravel() == 1))
    thresholds_K[own] = fit_thresholds(scores_BK, own_BK, "f1_macro", {})
    train_BV = tuning_BV if len(rows) == len(texts) else counter.transform(texts)
    kept = kept_V[features]
    weighed = weigh(train_BV[:, kept], counter.transform(test["text"])[:, kept])
    prediction = decided(fit_predict(weighed[0], labels_BK, weighed[1], penalty, class_weight), thresholds_K)
    low, middle, high = np.quantile(thresholds_K, [0, 0.5, 1])
    thresholds = f"thresholds from {low:.3f} to {high:.3f}, median {middle:.3f}"
    return prediction._replace(
        options=f"{weighed[0].shape[1]:,} {features}, C {penalty:g}, class weights {class_weight or 'none'}, {thresholds}"
    )


def mean_average_precision(labels_BK: np.ndarray, scores_BK: np.ndarray) -> float:
    """Mean over the labels, 0 where no document has any."""
    return float(average_precision_score(labels_BK, scores_BK, average="macro")) if labels_BK.any() else 0.0


def out_of_fold(
    count_BV: Any, labels_BK: np.ndarray, inverse_penalty: float, class_weight: str | None = None
) -> np.ndarray:
    """Logits (B, K) of each document by regressions that were fitted to the other folds."""
    logits_BK = np.empty(labels_BK.shape)
    for fit, held_out in KFold(NUM_FOLDS, shuffle=True, random_state=0).split(labels_BK):
        weighed = weigh(count_BV[fit], count_BV[held_out])
        logits_BK[held_out] = fit_predict(weighed[0], labels_BK[fit], weighed[1], inverse_penalty, class_weight)
    return logits_BK


def fit_predict(
    train: Any, labels_BK: np.ndarray, test: Any, inverse_penalty: float, class_weight: str | None = None
) -> np.ndarray:
    """Logits of `test`, (B, K), by a logistic regression for each label; of a label that all documents of `train` have, or
    none, the log-odds of its smoothed share."""
    logits_BK = np.empty((test.shape[0], labels_BK.shape[1]))
    # On dense vectors, one BLAS thread is ten times as fast as two: the products are small.
    with threadpool_limits(1, user_api="blas"):
        for k, label_B in enumerate(labels_BK.T):
            num, rest = int(label_B.sum()), int((1 - label_B).sum())
            if num == 0 or rest == 0:
                logits_BK[:, k] = np.log((num + 0.5) / (rest + 0.5))
                continue
            model = LogisticRegression(C=inverse_penalty, class_weight=class_weight, max_iter=2000, tol=1e-3)
            logits_BK[:, k] = model.fit(train, label_B).decision_function(test)
    return logits_BK


def decided(logits_BK: np.ndarray, thresholds_K: np.ndarray | float = THRESHOLD) -> Prediction:
    scores_BK = sigmoid(logits_BK)
    return Prediction(scores_BK >= thresholds_K, scores_BK)


def most_frequent(train: datasets.Dataset, test: datasets.Dataset) -> Prediction:
    """For every document the most frequent training labels, as many as a document has on average, at least one; the scores are
    the labels' shares."""
    labels_BK = label_array(train)
    share_K = labels_BK.mean(axis=0)
    most = np.argsort(-share_K, kind="stable")[: max(1, round(labels_BK.sum(axis=1).mean()))]
    predicted_BK = np.zeros((len(test), len(share_K)), dtype=bool)
    predicted_BK[:, most] = True
    return Prediction(predicted_BK, np.tile(share_K, (len(test), 1)))


def vectors(train_BD: np.ndarray, labels_BK: np.ndarray, test_BD: np.ndarray) -> Prediction:
    """Balanced logistic regressions on standardized document vectors: labels with a score of at least 0.5."""
    scaler = StandardScaler().fit(train_BD)
    return decided(fit_predict(scaler.transform(train_BD), labels_BK, scaler.transform(test_BD), 0.1, "balanced"))


def lexical(validation_BK: np.ndarray, validation_labels_BK: np.ndarray, logits_BK: np.ndarray) -> Prediction:
    """Logits of lexical features alone, with calibration and thresholds for macro-F1 from validation."""
    decision = MultiLabelDecision(*fit_multi_label_decision(validation_BK, validation_labels_BK))
    return Prediction(decision.decide(logits_BK), decision.scores(logits_BK))
