"""Near-duplicate detection, and grouping of documents by duplicates and a group column."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from datasets.utils import tqdm
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

# A word; each character counts as one in Thai, Lao, Burmese, Khmer, Japanese and Chinese, which have no spaces.
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{SPACELESS}]+|[{SPACELESS}]")
# Words of a shingle, and the factors that make a hash of theirs.
SHINGLE = np.uint64(0x9E3779B97F4A7C15) ** np.arange(5, dtype=np.uint64)
MAX_SHINGLES = 10_000_000
MAX_CHARACTERS = 2**20  # read at once
MAX_COMPARED = 8


def near_duplicates(texts: Iterable[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """Find pairs (i, j), i < j, of near-duplicate texts.

    Near-duplicates are equal up to case, punctuation and whitespace, or have a Jaccard similarity of their five-word
    shingles of at least `threshold` (Broder 1997). A cluster of near-duplicates yields only as many pairs as connect
    it. Beyond `MAX_SHINGLES`, shingles are subsampled consistently across texts to bound memory.

    Raises:
        ValueError: `threshold` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"The threshold of near-duplicates must be above 0 and at most 1, got {threshold}.")
    pairs: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    shingles: list[np.ndarray] = []
    num_shingles, sampling = 0, np.uint64(1)
    for index, text in enumerate(tqdm(texts, desc="Comparing", unit=" documents", delay=3, disable=None)):
        words = _hashed_words(text)
        original = first.setdefault(hashlib.sha256(words.tobytes()).digest(), index)
        if original != index:
            pairs.append((original, index))
            words = words[:0]  # its other near-duplicates are found through the first copy
        kept = _shingles_of(words)
        shingles.append(kept[_is_sampled(kept, sampling)])
        num_shingles += len(shingles[-1])
        while num_shingles > MAX_SHINGLES:
            sampling *= np.uint64(2)
            shingles = [kept[_is_sampled(kept, sampling)] for kept in shingles]
            num_shingles = sum(map(len, shingles))
    similar = _similar_pairs(shingles, threshold)
    return sorted(_spanning_edges(np.concatenate([np.array(pairs, dtype=np.int64).reshape(-1, 2), similar])))


def _hashed_words(text: str) -> np.ndarray:
    """uint64 per word. A piece of a long text at a time; that a word is cut in two between them does not matter."""
    text = text.casefold()
    pieces = [text[start : start + MAX_CHARACTERS] for start in range(0, len(text), MAX_CHARACTERS)]
    words = (WORD.findall(piece) or piece.split() for piece in pieces)
    hashed = [pd.util.hash_array(np.array(part, dtype=object), categorize=False) for part in words if part]
    return np.concatenate([np.empty(0, np.uint64), *hashed])


def _shingles_of(words: np.ndarray) -> np.ndarray:
    """Hashes of the different shingles."""
    size = max(0, len(words) - len(SHINGLE) + 1)
    shingles = np.zeros(size, np.uint64)
    for place, factor in enumerate(SHINGLE):
        shingles += words[place : place + size] * factor
    shingles.sort()
    return shingles[np.diff(shingles, prepend=~shingles[:1]) != 0]


def _is_sampled(shingles: np.ndarray, sampling: np.uint64) -> np.ndarray:
    return (shingles >> np.uint64(7)) % sampling == 0


def _similar_pairs(shingles: list[np.ndarray], threshold: float) -> np.ndarray:
    """Pairs of T texts, (P, 2), whose shingles have a Jaccard similarity of at least `threshold`."""
    size_T = np.array([len(kept) for kept in shingles], dtype=np.int64)
    matrix = _shared_shingles(shingles, size_T)
    first_P, second_P = _candidate_pairs(matrix, size_T, threshold)
    similar = [np.empty((0, 2), np.int64)]
    shared_T = np.diff(matrix.indptr)
    batch_of_P = np.cumsum(shared_T[first_P] + shared_T[second_P]) // MAX_CHARACTERS
    limits = np.flatnonzero(np.diff(batch_of_P)) + 1
    for i, j in zip(np.split(first_P, limits), np.split(second_P, limits), strict=True):
        shared = np.asarray(matrix[i].multiply(matrix[j]).sum(axis=1)).ravel()
        similar.append(np.stack([i, j], axis=1)[shared >= threshold * (size_T[i] + size_T[j] - shared)])
    return np.concatenate(similar)


def _shared_shingles(shingles: list[np.ndarray], size_T: np.ndarray) -> csr_matrix:
    """Which texts have which of the S shingles that several texts have, (T, S), the rarest first."""
    ordered = np.sort(np.concatenate([np.empty(0, np.uint64), *shingles]))
    repeated_S = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    frequency_S = np.searchsorted(ordered, repeated_S, side="right") - np.searchsorted(ordered, repeated_S)
    del ordered
    rank_S = np.empty_like(frequency_S)
    rank_S[np.argsort(frequency_S, kind="stable")] = np.arange(len(rank_S))
    flat = np.concatenate([np.empty(0, np.uint64), *shingles])
    column = np.searchsorted(repeated_S, flat)
    is_shared = np.append(repeated_S, 0)[column] == flat
    del flat
    rows, column = np.repeat(np.arange(len(size_T)), size_T)[is_shared], rank_S[column[is_shared]]
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(size_T)))])
    matrix = csr_matrix((np.ones(len(rows), np.int32), column, starts), shape=(len(size_T), len(rank_S)))
    matrix.sort_indices()
    return matrix


def _candidate_pairs(matrix: csr_matrix, size_T: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The first and the second of each pair of texts worth comparing.

    Similar texts share one of the rarest of their shingles, a share of `1 - threshold` of them (prefix filtering:
    Chaudhuri, Ganti & Kaushik 2006). Where many texts share one, as filled-in forms do, each is compared only with the
    next `MAX_COMPARED`: that connects them, and the time stays linear.
    """
    shared_T = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(len(size_T)), shared_T)
    place = np.arange(matrix.nnz) - matrix.indptr[rows] + (size_T - shared_T)[rows]
    is_rare = place <= size_T[rows] - np.ceil(threshold * size_T[rows] - 1e-6)
    rows, column = rows[is_rare], matrix.indices[is_rare]
    order = np.argsort(column, kind="stable")
    rows, column = rows[order], column[order]
    pairs = [np.empty(0, np.int64)]
    for step in range(1, MAX_COMPARED + 1):
        first, second = rows[:-step], rows[step:]
        smaller, larger = np.minimum(size_T[first], size_T[second]), np.maximum(size_T[first], size_T[second])
        is_candidate = (column[:-step] == column[step:]) & (smaller >= threshold * larger)
        pairs.append(np.unique(first[is_candidate] * len(size_T) + second[is_candidate]))
    first, second = np.divmod(np.unique(np.concatenate(pairs)), max(1, len(size_T)))
    return first, second


def _spanning_edges(pairs_P2: np.ndarray) -> list[tuple[int, int]]:
    """A spanning forest of P pairs: fewer edges than texts, instead of up to their square."""
    texts, indices = np.unique(pairs_P2, return_inverse=True)
    first, second = indices.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(len(texts),) * 2)
    tree = minimum_spanning_tree(graph).tocoo()
    return list(zip(texts[tree.row].tolist(), texts[tree.col].tolist(), strict=True))


def join_groups(groups: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Group index of each document; documents with the same group or connected by `pairs` share one."""
    first: dict[str, int] = {}
    edges = list(pairs) + [(first.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = len(groups)
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist()
