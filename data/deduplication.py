"""Near-duplicates of a corpus, and the groups that they and a group column make."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

MOST_SHINGLES = 10_000_000


def near_duplicates(texts: Iterable[str], threshold: float = 0.8) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts that are the same but for case and white space, or whose sets of five-word
    shingles have a Jaccard similarity of at least `threshold` (Broder 1997). Of many that are all alike there are as
    many pairs as it takes to join them. Beyond `MOST_SHINGLES` a sample of the shingles stands for all (the same for
    every text), so that memory does not grow with the texts."""
    pairs: set[tuple[int, int]] = set()
    first: dict[bytes, int] = {}
    shingles: list[np.ndarray] = []
    num_shingles, rate = 0, np.uint64(1)
    for index, text in enumerate(texts):
        words = re.findall(r"\w+", text.casefold())
        digest = hashlib.sha256(" ".join(words or text.split()).encode()).digest()
        if digest in first:
            pairs.add((first[digest], index))
            words = []  # its likeness to others is known from the first of its kind
        first.setdefault(digest, index)
        hashed = pd.util.hash_array(np.array(words or [""], dtype=object), categorize=False)
        views = np.lib.stride_tricks.sliding_window_view(hashed, 5) if len(words) >= 5 else np.empty((0, 5), np.uint64)
        powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(5, dtype=np.uint64)
        found = np.unique((views * powers).sum(axis=1, dtype=np.uint64))
        shingles.append(found[(found >> np.uint64(7)) % rate == 0])
        num_shingles += len(shingles[-1])
        if num_shingles > MOST_SHINGLES:
            rate *= np.uint64(2)
            shingles = [kept[(kept >> np.uint64(7)) % rate == 0] for kept in shingles]
            num_shingles = sum(map(len, shingles))
    if not shingles:
        return []
    sizes = np.array([len(s) for s in shingles])
    _, column = np.unique(np.concatenate(shingles), return_inverse=True)
    row_starts = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_matrix(
        (np.ones(len(column), np.int32), column, row_starts), shape=(len(sizes), column.max(initial=0) + 1)
    )
    of_shingle = matrix.T.tocsr()  # once: the product would lay it out anew each time
    for start in range(0, len(sizes), 256):
        shared = (matrix[start : start + 256] @ of_shingle).tocoo()
        i, j = shared.row + start, shared.col
        alike = (i < j) & (shared.data >= threshold * (sizes[i] + sizes[j] - shared.data))
        pairs.update(_spanning_edges(np.stack([i[alike], j[alike]], axis=1)))
    return sorted(_spanning_edges(np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)))


def _spanning_edges(pairs_P2: np.ndarray) -> list[tuple[int, int]]:
    """As many of P pairs as it takes to join what all of them join: fewer than there are texts, not their square."""
    texts, places = np.unique(pairs_P2, return_inverse=True)
    first, second = places.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(len(texts),) * 2)
    tree = minimum_spanning_tree(graph).tocoo()
    return list(zip(texts[tree.row].tolist(), texts[tree.col].tolist(), strict=True))


def join_groups(groups: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Group number of each document: those of a group, and those joined by `pairs`, get the same."""
    first: dict[str, int] = {}
    edges = list(pairs) + [(first.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = len(groups)
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist()
