"""Train, validation and test: near-duplicates found, leaks named, splits made by label and group."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from data.documents import SPLITS, Findings, shorten

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
        pairs.update(_joining(np.stack([i[alike], j[alike]], axis=1)))
    return sorted(_joining(np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)))


def _joining(pairs_P2: np.ndarray) -> list[tuple[int, int]]:
    """As many of P pairs as it takes to join what all of them join: fewer than there are texts, not their square."""
    texts, places = np.unique(pairs_P2, return_inverse=True)
    first, second = places.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(first)), (first, second)), shape=(len(texts),) * 2)
    tree = minimum_spanning_tree(graph).tocoo()
    return list(zip(texts[tree.row].tolist(), texts[tree.col].tolist(), strict=True))


def split_documents(
    documents: datasets.Dataset,
    findings: Findings,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 42,
) -> list[str]:
    """The split of each document ("" where it is dropped): the one it came with, or one made here.

    Made here: stratified by label, seeded, documents of a group or with nearly the same text never apart. As given:
    groups and near-duplicates that stand in several splits are the problems `group_leak` and `duplicate`; dropping
    leaves only those in the last of these splits.

    Raises:
        ValueError: leaks without a decision; a class too small to stand in every split; splits given for some
            documents only; no train or validation documents.
    """
    given = documents["split"]
    duplicates = near_duplicates(documents["text"])
    if any(given):
        if not all(given):
            nameless = [documents[i]["id"] for i, split in enumerate(given) if not split]
            raise ValueError(
                f"{len(nameless)} documents have no split and the others do: {shorten(nameless)}. Name the split of "
                "each, or make the splits here with --split_column none."
            )
        splits = without_leaks(documents["id"], documents["group"], list(given), duplicates, findings)
    else:
        group_of = join_groups(documents["group"], duplicates)
        if duplicates:
            findings.rows["duplicate"] = [f"{documents[i]['id']} ~ {documents[j]['id']}" for i, j in duplicates]
            findings.decisions["duplicate"] = "put into the same split"
        splits = make_splits(documents["label"], group_of, fractions, seed)
    made = [split for split, fraction in zip(SPLITS, fractions, strict=False) if fraction > 0]
    _check_splits(documents["label"], splits, in_each=["train"] if any(given) else made)
    return splits


def join_groups(groups: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Group number of each document: those of a group, and those joined by `pairs`, get the same."""
    first: dict[str, int] = {}
    edges = list(pairs) + [(first.setdefault(group, i), i) for i, group in enumerate(groups) if group]
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = len(groups)
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist()


def make_splits(labels: Sequence[str], group_of: Sequence[int], fractions: Sequence[float], seed: int) -> list[str]:
    """Greedy stratified split by group: the largest groups first, each to the split that lacks its labels most."""
    if len(fractions) != 3 or min(fractions[:2]) <= 0 or fractions[2] < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"The split fractions must be three shares that sum to 1, and are {list(fractions)}.")
    classes, label_ids = np.unique(np.asarray(labels), return_inverse=True)
    members: dict[int, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(labels)).tolist():
        members.setdefault(group_of[index], []).append(index)
    target = np.outer(fractions, np.bincount(label_ids, minlength=len(classes)))
    wanted = np.maximum(target, 1e-9)
    filled = np.zeros_like(target)
    splits = [""] * len(labels)
    for group in sorted(members.values(), key=len, reverse=True):
        counts = np.bincount(label_ids[group], minlength=len(classes))
        lack = ((target - filled) / wanted * (target > 0)) @ counts
        best = int(lack.argmax())
        filled[best] += counts
        for index in group:
            splits[index] = SPLITS[best]
    return splits


def without_leaks(
    ids: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
    duplicates: Sequence[tuple[int, int]],
    findings: Findings,
) -> list[str]:
    """The splits, less the documents that leak into a later one, where dropping them was decided.

    Raises:
        ValueError: leaks without a decision.
    """
    none = [""] * len(ids)
    dropped = set()
    for problem, cluster_of in (
        ("duplicate", join_groups(none, duplicates)),
        ("group_leak", join_groups(groups, [])),
    ):
        clusters: dict[int, list[int]] = {}
        for index, cluster in enumerate(cluster_of):
            clusters.setdefault(cluster, []).append(index)
        for members in clusters.values():
            last = max(members, key=lambda index: SPLITS.index(splits[index]))
            for index in members:
                if splits[index] != splits[last]:
                    findings.add(problem, f"{ids[index]} ({splits[index]}) ~ {ids[last]} ({splits[last]})")
                    if findings.decisions.get(problem) == "dropped":
                        dropped.add(index)
    findings.raise_undecided()
    return ["" if index in dropped else split for index, split in enumerate(splits)]


def _check_splits(labels: Sequence[str], splits: Sequence[str], in_each: Sequence[str]) -> None:
    """Raises ValueError unless there are train and validation documents, and every label is `in_each` of these splits."""
    counts = Counter(zip(splits, labels, strict=True))
    present = set(splits) - {""}
    for split in ("train", "validation"):
        if split not in present and len(in_each) == 1:
            raise ValueError(
                f"There are no {split} documents (splits found: {', '.join(sorted(present)) or 'none'}). Name them in the "
                "split column, or make the splits here with --split_column none."
            )
    for label in sorted(set(labels)):
        absent = [split for split in in_each if not counts[split, label]]
        if absent:
            total = sum(counts[split, label] for split in present)
            raise ValueError(
                f"The class {label[:60]!r} has too few documents to split ({total}): none in {', '.join(absent)}. Give at "
                "least three that are in no common group, or leave the class out."
            )
