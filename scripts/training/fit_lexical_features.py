"""Fit the model's lexical features (modeling/hierarchical_roberta/lexical_features.py) to the training documents.

B documents, V vocabulary, M features, K labels.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from sklearn.linear_model import LogisticRegression

from data.chunk_dataset import ChunkedDocuments
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures

logger = logging.getLogger("train_hf")

# Minimum document frequency of a feature (or a twentieth of the documents, if there are few).
MIN_DOCUMENTS = 8
# C of the regression: from 0.1 to 1 made little difference on three sets of documents (docs/log.md, 2026-11-25).
INVERSE_PENALTY = 0.3
# Above this number, the regression uses a sample; features are chosen on all documents.
MAX_DOCUMENTS = 20_000


def fit_lexical_features(
    lexical: LexicalFeatures, train: ChunkedDocuments, class_weights_K: torch.Tensor | None, process_index: int = 0
) -> None:
    """Choose the M tokens whose log counts differ most between the classes, and weigh them by logistic regression.

    Of each token's `log(1 + count)` the classes explain a share of the variance (eta squared of a one-way analysis). The
    log counts of the M tokens with most of it are standardised and multiplied by share / largest share before an
    L2-regularised regression, so that a token may weigh more the better it tells the classes apart: what the adaptive
    lasso (Zou 2006) is to the lasso, for ridge. Without it a thousand tokens overfit a few hundred documents (docs/log.md,
    2026-11-25).

    Rank 0 fits; the other ranks receive its weights.

    Raises:
        ValueError: no token tells the classes apart.
    """
    fitted: list[Any] = [None, None]
    if process_index == 0:
        try:
            num_labels, num_features = lexical.weight.shape
            vocab_size = len(lexical.feature_of_token)
            fitted[0] = lexical_weights(train, num_labels, num_features, vocab_size, class_weights_K)
        except ValueError as error:
            fitted[1] = error
    tensors, problem = broadcast_object_list(fitted)
    if problem is not None:
        raise problem
    lexical.set_weights(*(torch.from_numpy(array) for array in tensors))
    logger.info(f"Lexical features: {len(tensors[0]):,} of {len(lexical.feature_of_token):,} tokens.")


def lexical_weights(
    train: ChunkedDocuments,
    num_labels: int,
    num_features: int,
    vocab_size: int,
    class_weights_K: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids (m,), weights (K, m) and bias (K,) of the features, m ≤ M; see `fit_lexical_features`."""
    labels_B = np.asarray(train.documents["label"], dtype=np.int64)
    tokens_m, share_m = choose_tokens(train, labels_B, num_labels, num_features, vocab_size)
    drawn = np.arange(len(labels_B))
    if len(drawn) > MAX_DOCUMENTS:
        # At least one document per class, the rest at random.
        order = np.random.default_rng(train.seed).permutation(len(drawn))
        firsts = [order[np.flatnonzero(labels_B[order] == label)[0]] for label in range(num_labels)]
        drawn = np.unique([*firsts, *order[:MAX_DOCUMENTS]])
    feature_of_token = np.full(vocab_size, -1)
    feature_of_token[tokens_m] = np.arange(len(tokens_m))
    log_count_Bm = np.zeros((len(drawn), len(tokens_m)), dtype=np.float32)
    for row, (tokens, counts) in enumerate(token_counts(train, drawn)):
        features = feature_of_token[tokens]
        log_count_Bm[row, features[features >= 0]] = np.log1p(counts[features >= 0])
    mean_m, deviation_m = log_count_Bm.mean(axis=0), log_count_Bm.std(axis=0)
    scale_m = (share_m / share_m.max()) / np.where(deviation_m > 0, deviation_m, np.inf)
    weights_B = None if class_weights_K is None else class_weights_K.cpu().numpy()[labels_B[drawn]]
    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000)
    regression.fit((log_count_Bm - mean_m) * scale_m, labels_B[drawn], weights_B)
    coefficient_Km, bias_K = regression.coef_, regression.intercept_
    if num_labels == 2:
        coefficient_Km, bias_K = (np.concatenate([-part / 2, part / 2]) for part in (coefficient_Km, bias_K))
    weight_Km = coefficient_Km * scale_m
    return tokens_m, weight_Km.astype(np.float32), (bias_K - weight_Km @ mean_m).astype(np.float32)


def lexical_logits(
    documents: ChunkedDocuments, tokens_m: np.ndarray, weight_Km: np.ndarray, bias_K: np.ndarray, vocab_size: int
) -> np.ndarray:
    """Logits of the lexical features alone, (B, K)."""
    weight_KV = np.zeros((len(bias_K), vocab_size), dtype=np.float32)
    weight_KV[:, tokens_m] = weight_Km
    counted = token_counts(documents, np.arange(len(documents)))
    return np.stack([bias_K + weight_KV[:, tokens] @ np.log1p(counts) for tokens, counts in counted])


def choose_tokens(
    train: ChunkedDocuments, labels_B: np.ndarray, num_labels: int, num_features: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens whose log counts are best explained by the class, strongest first: ids (m,) and the share of the variance
    explained (m,).

    It only needs sums per class, so memory does not grow with the number of documents.
    """
    count_K = np.bincount(labels_B, minlength=num_labels).astype(np.float64)
    sum_KV, squares_V = np.zeros((num_labels, vocab_size)), np.zeros(vocab_size)
    documents_V = np.zeros(vocab_size, dtype=np.int64)
    for label, (tokens, counts) in zip(labels_B, token_counts(train, np.arange(len(labels_B))), strict=True):
        value = np.log1p(counts)
        sum_KV[label, tokens] += value
        squares_V[tokens] += value**2
        documents_V[tokens] += 1
    total = count_K.sum()
    explained_V = (sum_KV**2 / count_K[:, None]).sum(axis=0)
    between_V = explained_V - sum_KV.sum(axis=0) ** 2 / total
    total_V = between_V + squares_V - explained_V
    varies_V = total_V > 1e-9 * squares_V  # the rest is rounding
    share_V = np.where(varies_V, between_V / np.where(varies_V, total_V, 1.0), 0.0)
    share_V[train.tokenizer.all_special_ids] = 0  # every chunk has some, whatever its text
    share_V[documents_V < min(MIN_DOCUMENTS, max(2, len(labels_B) // 20))] = 0
    chosen = np.argsort(-share_V, kind="stable")[:num_features]
    chosen = chosen[share_V[chosen] > 0]
    if not len(chosen):
        raise ValueError("No token tells the classes apart in the training documents: leave --lexical_features out.")
    return chosen, share_V[chosen]


def token_counts(documents: ChunkedDocuments, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Distinct tokens and their counts in the chunks of each document that are read at evaluation."""
    training, documents.training = documents.training, False
    num_before, num_after = len(documents.chunker.prefix), len(documents.chunker.suffix)
    try:
        for row in rows.tolist():
            chunks = documents[row]["input_ids"]
            tokens = np.concatenate([chunk[num_before : len(chunk) - num_after] for chunk in chunks])
            yield np.unique(tokens[tokens != documents.tokenizer.pad_token_id], return_counts=True)
    finally:
        documents.training = training
