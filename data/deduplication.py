"""Near-duplicate detection, and grouping of documents by duplicates and a group column."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

MAX_SHINGLES = 10_000_000


def near_duplicates(texts: Iterable[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """Find pairs (i, j), i < j, of near-duplicate texts.

    Near-duplicates are equal up to case, punctuation and whitespace, or have a Jaccard similarity of their five-word
    shingles of at least `threshold` (Broder 1997). A cluster of near-duplicates yields only as many pairs as connect
    it. Beyond `MAX_SHINGLES`, shingles are subsampled consistently across texts to bound memory.
    """
    pairs: set[tuple[int, int]] = set()
    first: dict[bytes, int] = {}
    shingles: list[np.ndarray] = []
    num_shingles, sampling = 0, np.uint64(1)
    for index, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        digest = hashlib.sha256(" ".join(words or text.split()).encode()).digest()
        if digest in first:
            pairs.add((first[digest], index))
            words = []  # its other near-duplicates are found through the first copy
        first.setdefault(digest, index)
        hashed = pd.util.hash_array(np.array(words or [""], dtype=object), categorize=False)
        views = np.lib.stride_tricks.sliding_window_view(hashed, 5) if len(words) >= 5 else np.empty((0, 5), np.uint64)
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(5, dtype=np.uint64)
        unique = np.unique((views * powers).sum(axis=1, dtype=np.uint64))
        shingles.append(unique[(unique >> np.uint64(7)) % sampling == 0])
        num_shingles += len(shingles[-1])
        if num_shingles > MAX_SHINGLES:
            sampling *= np.uint64(2)
            shingles = [kept[(kept >> np.uint64(7)) % sampling == 0] for kept in shingles]
            num_shingles = sum(map(len, shingles))
    if not shingles:
        return []
    sizes = np.array([len(s) for s in shingles])
    _, column = np.unique(np.concatenate(shingles), return_inverse=True)
    row_starts = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_matrix(
        (np.ones(len(column), np.int32), column, row_starts), shape=(len(sizes), column.max(initial=0) + 1)
    )
    transposed = matrix.T.tocsr()  # converted once, not in every product
    for start in range(0, len(sizes), 256):
        shared = (matrix[start : start + 256] @ transposed).tocoo()
        i, j = shared.row + start, shared.col
        alike = (i < j) & (shared.data >= threshold * (sizes[i] + sizes[j] - shared.data))
        pairs.update(_spanning_edges(np.stack([i[alike], j[alike]], axis=1)))
    return sorted(_spanning_edges(np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)))


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
