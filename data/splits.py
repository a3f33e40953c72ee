"""Train, validation and test: leaks named, splits made by label and group."""

from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np

from data.deduplication import join_groups, near_duplicates
from data.documents import SPLITS, DataIssues, shorten


def split_documents(
    documents: datasets.Dataset,
    issues: DataIssues,
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
        splits = without_leaks(documents["id"], documents["group"], list(given), duplicates, issues)
    else:
        group_of = join_groups(documents["group"], duplicates)
        if duplicates:
            issues.rows["duplicate"] = [f"{documents[i]['id']} ~ {documents[j]['id']}" for i, j in duplicates]
            issues.decisions["duplicate"] = "put into the same split"
        splits = make_splits(documents["label"], group_of, fractions, seed)
    made = [split for split, fraction in zip(SPLITS, fractions, strict=False) if fraction > 0]
    _check_splits(documents["label"], splits, in_each=["train"] if any(given) else made)
    return splits


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
    issues: DataIssues,
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
                    issues.add(problem, f"{ids[index]} ({splits[index]}) ~ {ids[last]} ({splits[last]})")
                    if issues.decisions.get(problem) == "dropped":
                        dropped.add(index)
    issues.raise_if_unresolved()
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
