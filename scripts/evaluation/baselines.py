"""Baselines on the same split.

B documents, V words and word pairs, D dimensions of document vectors, K labels.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import softmax
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling.training.decision import fit_averaged_biases, macro_f1_of

# C of the tuned TF-IDF's logistic regression.
INVERSE_PENALTIES = (10.0, 30.0, 100.0)
NUM_FOLDS = 5
# Above this number, the vocabulary and all choices are those of a sample; the final regression uses all documents.
MAX_TUNING_DOCUMENTS = 5_000
# Weights of a regression, features times labels: the most frequent words and pairs are kept.
MAX_WEIGHTS = 2_000_000
# Texts with a smaller share of whitespace (Chinese, Japanese, Thai) are counted by characters; English has 0.17.
MIN_WHITESPACE = 0.06


def tfidf_scores(train: datasets.Dataset, test: datasets.Dataset) -> np.ndarray:
    """Class-balanced logistic regression on unigram TF-IDF of the full text, untuned: probabilities of `test`, (B, K).

    The shares of the classes in `train` for every document if it has one class only, or no words.
    """
    texts, labels_B = list(train["text"]), np.asarray(train["label"])
    num_labels = train.features["label"].num_classes
    counter = TfidfVectorizer(sublinear_tf=True)
    train_BV = count(counter, texts)
    if train_BV is None or len(np.unique(labels_B)) < 2:
        shares_K = np.bincount(labels_B, minlength=num_labels) / len(labels_B)
        return np.tile(shares_K, (len(test), 1))
    model = LogisticRegression(class_weight="balanced", max_iter=2000, C=10.0).fit(train_BV, labels_B)
    return predict_all_classes(model, counter.transform(test["text"]), num_labels)


def tuned_tfidf_scores(train: datasets.Dataset, test: datasets.Dataset) -> tuple[np.ndarray, str]:
    """Logistic regression on TF-IDF of words, or of words and word pairs (up to three characters in texts without
    spaces), tuned by stratified inner folds of `train`.

    Whether to use pairs, and the penalty, are chosen by the likelihood of the labels out of fold. To the log-probabilities
    of that choice, class biases are added that are best for its macro-F1 out of fold (Lin, Chen, Wu & Lin 2023, "Linear
    Classifier: An Often-Forgotten Baseline for Text Classification": linear models are strong where their decisions are
    tuned for the metric). The inner folds do not keep near-duplicates together.

    Returns:
        Probabilities of `test` with the biases, (B, K), whose argmax are the decisions; and what was chosen, in words.
        Those of `tfidf_scores` if a class has fewer than two training documents, or nothing occurs in two documents.
    """
    names, labels_B = train.features["label"].names, np.asarray(train["label"])
    texts, rows = list(train["text"]), tuning_rows(labels_B)
    class_sizes = np.unique(labels_B, return_counts=True)[1]
    counter = ngram_counter([texts[row] for row in rows], MAX_WEIGHTS // len(names))
    tuning_BV = count(counter, [texts[row] for row in rows])
    if tuning_BV is None or len(class_sizes) < 2 or class_sizes.min() < 2:
        return tfidf_scores(train, test), "as tfidf, for want of documents"
    kept_V = features_of(counter)
    log_scores = {
        (features, penalty): np.empty((len(rows), len(names))) for features in kept_V for penalty in INVERSE_PENALTIES
    }
    folds = StratifiedKFold(min(NUM_FOLDS, class_sizes.min()), shuffle=True, random_state=0)
    for fit, held_out in folds.split(rows, labels_B[rows]):
        for features, kept in kept_V.items():
            weighed = weigh(tuning_BV[fit][:, kept], tuning_BV[held_out][:, kept])
            for penalty in INVERSE_PENALTIES:
                log_probabilities_BK = log_probabilities(penalty, labels_B[rows[fit]], *weighed, len(names))
                log_scores[features, penalty][held_out] = log_probabilities_BK
    likelihoods = {
        choice: scores_BK[np.arange(len(rows)), labels_B[rows]].mean() for choice, scores_BK in log_scores.items()
    }
    features, penalty = best = max(likelihoods, key=likelihoods.__getitem__)
    num_resamples = max(1, min(20, 200 // len(names)))  # the time of each grows with the square of the labels
    biases_K = fit_averaged_biases(log_scores[best], labels_B[rows], macro_f1_of, num_resamples)
    train_BV = tuning_BV if len(rows) == len(texts) else counter.transform(texts)
    kept = kept_V[features]
    weighed = weigh(train_BV[:, kept], counter.transform(test["text"])[:, kept])
    scores_BK = softmax(log_probabilities(penalty, labels_B, *weighed, len(names)) + biases_K, axis=1)
    biases = ", ".join(f"{name} {bias:+.2f}" for name, bias in zip(names, biases_K, strict=True))
    return scores_BK, f"{weighed[0].shape[1]:,} {features}, C {penalty:g}, biases {biases}"


def features_of(counter: CountVectorizer) -> dict[str, np.ndarray]:
    """Name → mask (V,) of the sets of features to choose from."""
    everything_V = np.ones(len(counter.vocabulary_), dtype=bool)
    if counter.analyzer == "char":
        return {"runs of characters": everything_V}
    is_word_V = np.array([" " not in feature for feature in counter.get_feature_names_out()])
    return {"words": is_word_V, "words and pairs": everything_V}


def tuning_rows(labels_B: np.ndarray) -> np.ndarray:
    """Rows of at most about `MAX_TUNING_DOCUMENTS` training documents, a random share of each class, but at least as many
    as there are folds (or all it has)."""
    share = min(1.0, MAX_TUNING_DOCUMENTS / len(labels_B))
    shuffled = np.random.default_rng(0).permutation(len(labels_B))
    by_class = [shuffled[labels_B[shuffled] == label] for label in np.unique(labels_B)]
    return np.sort(np.concatenate([rows[: max(NUM_FOLDS, round(share * len(rows)))] for rows in by_class]))


def ngram_counter(texts: Sequence[str], max_features: int) -> CountVectorizer:
    """Counts words and word pairs; in texts without spaces, characters and runs of two and three. Those in one document
    only are left out, and the rarest if there are too many."""
    num_gaps = sum(max(0, len(text.split()) - 1) for text in texts)
    has_spaces = num_gaps > MIN_WHITESPACE * sum(map(len, texts))
    analyzer, lengths = ("word", (1, 2)) if has_spaces else ("char", (1, 3))
    return CountVectorizer(
        analyzer=analyzer, ngram_range=lengths, min_df=2, max_features=max_features, dtype=np.float64
    )


def count(counter: CountVectorizer, texts: Sequence[str]) -> csr_matrix | None:
    """Fit a vocabulary and count, (B, V); None if there is nothing to count."""
    try:
        return counter.fit_transform(texts)
    except ValueError:  # what scikit-learn raises if no word is left
        return None


def weigh(fit_BV: csr_matrix, other_BV: csr_matrix) -> tuple[csr_matrix, csr_matrix]:
    """TF-IDF of counts, with the document frequencies of the first and without what fewer than two of it have."""
    num_documents_V = fit_BV.getnnz(axis=0)
    kept_V = num_documents_V >= min(2, num_documents_V.max())
    weights = TfidfTransformer(sublinear_tf=True).fit(fit_BV[:, kept_V])
    return weights.transform(fit_BV[:, kept_V]), weights.transform(other_BV[:, kept_V])


def log_probabilities(
    inverse_penalty: float, labels_B: np.ndarray, train_BV: csr_matrix, test_BV: csr_matrix, num_labels: int
) -> np.ndarray:
    """Log-probabilities of `test_BV`, (B, K), -inf for a class without training documents."""
    model = LogisticRegression(C=inverse_penalty, max_iter=1000, tol=1e-3).fit(train_BV, labels_B)
    with np.errstate(divide="ignore"):
        return np.log(predict_all_classes(model, test_BV, num_labels))


def majority_predictions(train: datasets.Dataset, test: datasets.Dataset) -> np.ndarray:
    """The most frequent training label for every document, (B,)."""
    return np.full(len(test), np.bincount(np.asarray(train["label"])).argmax())


def vector_scores(train_BD: np.ndarray, labels_B: np.ndarray, test_BD: np.ndarray, num_labels: int) -> np.ndarray:
    """Class-balanced logistic regression on standardized document vectors: probabilities of `test_BD`, (B, K)."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, C=0.1))
    model.fit(train_BD, labels_B)
    return predict_all_classes(model, test_BD, num_labels)


def predict_all_classes(model: Any, documents: np.ndarray | csr_matrix, num_labels: int) -> np.ndarray:
    """Probabilities (B, K), 0 for a class without training documents."""
    scores_BK = np.zeros((documents.shape[0], num_labels))
    scores_BK[:, model.classes_] = model.predict_proba(documents)
    return scores_BK
