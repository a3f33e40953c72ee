"""Fit the model's lexical features (modeling/hierarchical_roberta/lexical_features.py) to the training documents.

B documents, F tokens and pairs of tokens that occur, M features, V vocabulary, K labels.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.preprocessing import normalize

from data.chunk_dataset import ChunkedDocuments
from data.labels import label_array, label_counts
from modeling.hierarchical_roberta.chunking import special_token_frame
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures
from modeling.training.calibration import weighted_log_loss

logger = logging.getLogger("train_hf")

# C of the logistic regression, inverse to the strength of its L2 penalty: the candidates for each weighting.
CANDIDATES = {"log": (0.3,), "tfidf": (30.0, 100.0)}
NUM_FOLDS = 3
# Minimum document frequency of a feature (or a twentieth of the documents, if there are few).
MIN_DOCUMENTS = {"log": 8, "tfidf": 3}
# Beyond these, features are fitted to a sample of the documents, and compared on a smaller one.
MAX_DOCUMENTS, MAX_TOKENS, MAX_COMPARED, MAX_COMPARED_LABELS = 20_000, 20_000_000, 2_000, 20


class MultinomialRegression:
    """How features are fitted to labels that are ids (B,)."""

    folds: ClassVar[type[KFold] | type[StratifiedKFold]] = StratifiedKFold

    @staticmethod
    def has(labels_B: np.ndarray, label: int) -> np.ndarray:
        """Whether a document has a label, (B,)."""
        return labels_B == label

    @staticmethod
    def compared(labels_B: np.ndarray, num_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of which candidates are compared, as ids, and the documents' labels among them."""
        return np.arange(len(num_K)), labels_B

    @staticmethod
    def share_explained(value_BF: sparse.csr_matrix, labels_B: np.ndarray, num_labels: int) -> np.ndarray:
        """Share of each column's variance that the classes explain, (F,)."""
        is_of_KB = sparse.csr_matrix(np.eye(num_labels)[:, labels_B])
        count_K = np.maximum(np.bincount(labels_B, minlength=num_labels), 1)
        sum_KF = (is_of_KB @ value_BF).toarray()
        squares_F = np.asarray(value_BF.multiply(value_BF).sum(axis=0)).ravel()
        explained_F = (sum_KF**2 / count_K[:, None]).sum(axis=0)
        between_F = explained_F - sum_KF.sum(axis=0) ** 2 / len(labels_B)
        total_F = between_F + squares_F - explained_F
        varies_F = total_F > 1e-9 * squares_F  # the rest is rounding
        return np.where(varies_F, between_F / np.where(varies_F, total_F, 1.0), 0.0)

    @staticmethod
    def fit(value_Bm: Any, labels_B: np.ndarray, weight_K: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights (K, m) and bias (K,) of a class-weighted logistic regression."""
        regression = LogisticRegression(C=penalty, max_iter=2000).fit(value_Bm, labels_B, weight_K[labels_B])
        weight_Km, bias_K = regression.coef_, regression.intercept_
        if len(weight_K) == 2:
            weight_Km, bias_K = (np.concatenate([-part / 2, part / 2]) for part in (weight_Km, bias_K))
        return weight_Km, bias_K


class LabelRegressions:
    """How features are fitted to labels of 0 and 1, (B, K): each label against the rest."""

    folds: ClassVar[type[KFold] | type[StratifiedKFold]] = KFold

    @staticmethod
    def has(labels_BK: np.ndarray, label: int) -> np.ndarray:
        """Whether a document has a label, (B,)."""
        return labels_BK[:, label] == 1

    @staticmethod
    def compared(labels_BK: np.ndarray, num_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of which candidates are compared, the most frequent ones, as ids, and the documents' labels among them."""
        frequent = np.flatnonzero(num_K >= 2 * NUM_FOLDS)
        frequent = frequent[np.argsort(-num_K[frequent], kind="stable")[:MAX_COMPARED_LABELS]]
        return frequent, labels_BK[:, frequent]

    @staticmethod
    def share_explained(value_BF: sparse.csr_matrix, labels_BK: np.ndarray, num_labels: int) -> np.ndarray:
        """Share of each column's variance that the label that explains most explains, (F,)."""
        shares = (
            MultinomialRegression.share_explained(value_BF, label_B.astype(np.int64), 2) for label_B in labels_BK.T
        )
        return functools.reduce(np.maximum, shares)

    @staticmethod
    def fit(
        value_Bm: Any, labels_BK: np.ndarray, weight_K: np.ndarray, penalty: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weights (K, m) and bias (K,) of a logistic regression for each label, whose documents have the label's weight; only
        a bias if all documents or none have it."""
        weight_Km, bias_K = np.zeros((len(weight_K), value_Bm.shape[1])), np.zeros(len(weight_K))
        for k, (label_B, weight) in enumerate(zip(labels_BK.T, weight_K, strict=True)):
            num = int(label_B.sum())
            if num in (0, len(label_B)):
                bias_K[k] = np.log((num + 0.5) / (len(label_B) - num + 0.5))
                continue
            regression = LogisticRegression(C=penalty, max_iter=2000)
            regression.fit(value_Bm, label_B, np.where(label_B == 1, weight, 1.0))
            weight_Km[k], bias_K[k] = regression.coef_[0], regression.intercept_[0]
        return weight_Km, bias_K


def regression_of(labels: np.ndarray) -> type[MultinomialRegression] | type[LabelRegressions]:
    """What is fitted to labels: ids (B,), or with several labels a document 0 and 1 (B, K)."""
    return MultinomialRegression if labels.ndim == 1 else LabelRegressions


def fit_lexical_features(
    train: ChunkedDocuments,
    num_labels: int,
    num_features: int,
    vocab_size: int,
    class_weights_K: torch.Tensor | None = None,
    weighting: str = "auto",
    process_index: int = 0,
) -> LexicalFeatures:
    """Choose and weigh the M features that tell the classes apart best in the training documents.

    `log`: the M tokens whose log counts differ most between the classes. Of each token's `log(1 + count)` the classes
    explain a share of the variance (eta squared of a one-way analysis). The log counts are divided by their deviation and
    multiplied by share / largest share before an L2-regularised logistic regression, so that a token may weigh more the
    better it tells the classes apart: what the adaptive lasso (Zou 2006) is to the lasso, for ridge. Without it a thousand
    tokens overfit a few hundred documents (docs/log.md, 2026-11-25).

    `tfidf`: the M tokens and pairs of adjacent tokens that differ most, as TF-IDF of unit length, of which a few strong ones
    do not decide alone.

    `auto` takes the weighting and penalty with the lowest log loss on held-out folds of the training documents: `log` on
    films, `tfidf` on film reviews and news articles (docs/log.md, 2026-11-28). Where a class has fewer than two
    documents a fold, it takes `log`.

    Rank 0 fits; the other ranks receive its features.

    Raises:
        ValueError: no token tells the classes apart.
    """
    fitted: list[Any] = [None, None]
    if process_index == 0:
        try:
            fitted[0] = _fit(train, num_labels, num_features, vocab_size, class_weights_K, weighting)
        except ValueError as error:
            fitted[1] = error
    lexical, problem = broadcast_object_list(fitted)
    if problem is not None:
        raise problem
    sizes = [len(tokens) for tokens in lexical.tokens_of_features().values()]
    logger.info(
        f"Lexical features ({lexical.weighting}): {sizes.count(1):,} of {vocab_size:,} tokens"
        + (f" and {sizes.count(2):,} pairs of tokens." if 2 in sizes else ".")
    )
    return lexical


@torch.no_grad()
def lexical_logits(documents: ChunkedDocuments, lexical: LexicalFeatures) -> np.ndarray:
    """Logits (B, K) of the lexical features alone, in what is read of the documents at evaluation."""
    chunks_of = documents.texts_read(range(len(documents)))
    return torch.cat([lexical(lexical.count_chunks(chunks).sum(dim=0, keepdim=True)) for chunks in chunks_of]).numpy()


def _fit(
    train: ChunkedDocuments,
    num_labels: int,
    num_features: int,
    vocab_size: int,
    class_weights_K: torch.Tensor | None,
    weighting: str,
) -> LexicalFeatures:
    labels = label_array(train.documents)
    rows = sampled_rows(train, labels, num_labels)
    weight_K = np.ones(num_labels) if class_weights_K is None else class_weights_K.cpu().numpy().astype(np.float64)
    candidates = [
        (name, penalty)
        for name, penalties in CANDIDATES.items()
        if weighting in (name, "auto")
        for penalty in penalties
    ]
    features_F, count_BF = count_features(train, rows, vocab_size, any(name != "log" for name, _ in candidates))
    labels = labels[rows[: count_BF.shape[0]]]
    if len(candidates) > 1:
        compared = min(len(labels), MAX_COMPARED)
        candidates = [
            best_candidate(
                candidates, features_F, count_BF[:compared], labels[:compared], weight_K, num_features, vocab_size
            )
        ]
    [(name, penalty)] = candidates
    values = choose_features(name, features_F, count_BF, labels, num_labels, num_features, vocab_size)
    weight_Km, bias_K = regression_of(labels).fit(values(count_BF), labels, weight_K, penalty)
    idf_m = torch.from_numpy(values.scale_m) if name == "tfidf" else None
    if idf_m is None:
        weight_Km = weight_Km * values.scale_m
    lexical = LexicalFeatures(vocab_size, num_features, num_labels, name)
    lexical.set_weights(
        torch.from_numpy(features_F[values.chosen]), torch.from_numpy(weight_Km), torch.from_numpy(bias_K), idf_m
    )
    return lexical


@dataclass
class FeatureValues:
    """From counts to the values that are weighed: scaled log counts, with `tfidf` of unit length."""

    weighting: str
    chosen: np.ndarray
    scale_m: np.ndarray

    def __call__(self, count_BF: sparse.csr_matrix) -> sparse.csr_matrix:
        value_Bm = count_BF[:, self.chosen].log1p() @ sparse.diags(self.scale_m)
        return normalize(value_Bm) if self.weighting == "tfidf" else value_Bm


def choose_features(
    weighting: str,
    features_F: np.ndarray,
    count_BF: sparse.csr_matrix,
    labels: np.ndarray,
    num_labels: int,
    num_features: int,
    vocab_size: int,
) -> FeatureValues:
    """The columns (m,) of the features whose log counts are best explained by the class, strongest first, and their scales.

    Raises:
        ValueError: no token tells the classes apart.
    """
    num_documents = len(labels)
    log_BF = count_BF.log1p()
    frequency_F = np.bincount(log_BF.indices, minlength=len(features_F))
    share_F = regression_of(labels).share_explained(log_BF, labels, num_labels)
    share_F[frequency_F < min(MIN_DOCUMENTS[weighting], max(2, num_documents // 20))] = 0
    if weighting == "log":
        share_F[features_F >= vocab_size] = 0
    chosen = np.argsort(-share_F, kind="stable")[:num_features]
    chosen = chosen[share_F[chosen] > 0]
    if not len(chosen):
        raise ValueError(
            "No token tells the classes apart in the training documents: leave --lexical_features out (and use another "
            "--chunk_policy than lexical)."
        )
    if weighting == "tfidf":
        return FeatureValues(weighting, chosen, np.log((1 + num_documents) / (1 + frequency_F[chosen])) + 1)
    log_Bm = log_BF[:, chosen]
    mean_m, square_m = (np.asarray(part.mean(axis=0)).ravel() for part in (log_Bm, log_Bm.multiply(log_Bm)))
    deviation_m = np.sqrt(np.maximum(square_m - mean_m**2, 1e-12))
    return FeatureValues(weighting, chosen, share_F[chosen] / share_F.max() / deviation_m)


def best_candidate(
    candidates: Sequence[tuple[str, float]],
    features_F: np.ndarray,
    count_BF: sparse.csr_matrix,
    labels: np.ndarray,
    weight_K: np.ndarray,
    num_features: int,
    vocab_size: int,
) -> tuple[str, float]:
    """The weighting and penalty with the lowest weighted log loss on held-out folds; the first if a class is too rare."""
    kind, num_K = regression_of(labels), label_counts(labels, len(weight_K))
    compared, labels = kind.compared(labels, num_K)
    weight_K, num_labels = weight_K[compared], len(compared)
    if min(num_K[compared], default=0) < 2 * NUM_FOLDS:
        return candidates[0]
    losses = dict.fromkeys(candidates, 0.0)
    for fitted, held_out in kind.folds(NUM_FOLDS, shuffle=True, random_state=0).split(labels, labels):
        for name in dict(candidates):
            try:
                values = choose_features(
                    name, features_F, count_BF[fitted], labels[fitted], num_labels, num_features, vocab_size
                )
            except ValueError:
                losses |= {(name, penalty): np.inf for penalty in CANDIDATES[name]}
                continue
            value_Bm, test_Bm = values(count_BF[fitted]), values(count_BF[held_out])
            for penalty in CANDIDATES[name]:
                weight_Km, bias_K = kind.fit(value_Bm, labels[fitted], weight_K, penalty)
                logits_BK = test_Bm @ weight_Km.T + bias_K
                losses[name, penalty] += weighted_log_loss(logits_BK, labels[held_out], weight_K)
    return min(candidates, key=lambda candidate: losses[candidate])


def sampled_rows(train: ChunkedDocuments, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Rows of the documents that features are fitted to: all in a random order, up to the limits, and at least one of each
    class."""
    order = np.random.default_rng(train.seed).permutation(len(labels))
    firsts = [order[np.flatnonzero(regression_of(labels).has(labels[order], k))[0]] for k in range(num_labels)]
    return np.array(list(dict.fromkeys([*firsts, *order[:MAX_DOCUMENTS].tolist()])))


def count_features(
    train: ChunkedDocuments, rows: np.ndarray, vocab_size: int, with_pairs: bool
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """The tokens, and pairs of adjacent tokens, in the chunks of documents that are read at evaluation.

    Returns:
        `features_F`: token ids, or V plus a pair (`first · V + second`), and `count_BF`. Stops at `MAX_TOKENS`. Special
        tokens, which every chunk has whatever its text, are left out, and pairs that only one document has.
    """
    frame = special_token_frame(train.tokenizer)
    special = np.array([*train.tokenizer.all_special_ids, *frame[0], *frame[1]], dtype=np.int64)
    ids, counts, sizes, num_tokens = [], [], [], 0
    for chunks in train.texts_read(rows):
        tokens = np.concatenate(chunks)
        num_tokens += len(tokens)
        seen = [tokens]
        if with_pairs:
            pairs = [chunk[:-1] * vocab_size + chunk[1:] for chunk in chunks]
            is_text = [~np.isin(chunk[:-1], special) & ~np.isin(chunk[1:], special) for chunk in chunks]
            seen += [vocab_size + pair[kept] for pair, kept in zip(pairs, is_text, strict=True)]
        values, count = np.unique(np.concatenate(seen), return_counts=True)
        kept = ~np.isin(values, special)
        ids.append(values[kept])
        counts.append(count[kept].astype(np.float32))
        sizes.append(int(kept.sum()))
        if num_tokens > MAX_TOKENS:
            break
    features_F, column, frequency_F = np.unique(np.concatenate(ids), return_inverse=True, return_counts=True)
    shape = (len(sizes), len(features_F))
    count_BF = sparse.csr_matrix((np.concatenate(counts), column, np.cumsum([0, *sizes])), shape=shape)
    is_kept = (features_F < vocab_size) | (frequency_F > 1)
    return features_F[is_kept], count_BF[:, is_kept]
