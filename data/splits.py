"""Train, validation and test splits: leak detection, and stratified splitting by group."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from data.deduplication import join_groups, near_duplicates
from data.documents import DataIssues, shorten
from data.labels import label_sets
from data.source_files import SPLITS

# Of a part's number of documents, relative to that of one label (docs/log.md, 2026-11-28).
SIZE_WEIGHT = 10.0


def split_documents(
    documents: datasets.Dataset,
    issues: DataIssues,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 42,
    validation_from_train: float = 0.0,
    duplicate_threshold: float = 0.8,
) -> list[str]:
    """Assign a split to each document ("" if it is dropped).

    Without a split column, splits are seeded and stratified by label; documents of a group and near-duplicates stay
    together. Existing splits are checked: groups and near-duplicates in several splits are the problems `group_leak`
    and `duplicate`; dropping keeps only the documents in the last of these splits.

    Args:
        fractions: of train, validation and test, if there are no splits.
        validation_from_train: share of the train split that becomes validation, in the same way.
        duplicate_threshold: see `near_duplicates`.

    Raises:
        ValueError: unresolved leaks, a class too small for every split, splits for only some of the documents, or no
            train or validation documents.
    """
    existing, labels = documents["split"], label_sets(documents["label"])
    duplicates = near_duplicates(documents["text"], duplicate_threshold)
    group_of = join_groups(documents["group"], duplicates)
    if any(existing):
        if not all(existing):
            unassigned = [documents[i]["id"] for i, split in enumerate(existing) if not split]
            raise ValueError(
                f"{len(unassigned)} documents have no split: {shorten(unassigned)}. Assign a split to all documents, "
                "or use --split_column none to create the splits."
            )
        splits = without_leaks(documents["id"], documents["group"], list(existing), duplicates, issues)
        if validation_from_train:
            splits = with_validation_from_train(splits, labels, group_of, validation_from_train, seed)
    elif validation_from_train:
        raise ValueError(
            "--validation_from_train needs a source with a train split; without splits use --split_fractions."
        )
    else:
        if duplicates:
            issues.rows["duplicate"] = [f"{documents[i]['id']} ~ {documents[j]['id']}" for i, j in duplicates]
            issues.decisions["duplicate"] = "assigned to the same split"
            issues.pairs = [("duplicate", i, j) for i, j in duplicates]
        splits = make_splits(labels, group_of, fractions, seed)
    nonempty = [split for split, fraction in zip(SPLITS, fractions, strict=False) if fraction > 0]
    # With several labels a document, rare ones are common.
    is_multi = not isinstance(documents.features["label"], datasets.Value)
    _check_splits(labels, splits, in_each=["train"] if any(existing) or is_multi else nonempty)
    return splits


def make_splits(
    labels: Sequence[list[Any]], group_of: Sequence[int], fractions: Sequence[float], seed: int
) -> list[str]:
    """Train, validation and test splits by `stratified_parts`. Raises ValueError for fractions that are none."""
    if len(fractions) != 3 or min(fractions[:2]) <= 0 or fractions[2] < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"The split fractions must be three numbers that sum to 1, got {list(fractions)}.")
    return [SPLITS[part] for part in stratified_parts(labels, group_of, fractions, seed, learned=0)]


def stratified_parts(
    labels: Sequence[list[Any]],
    group_of: Sequence[int],
    fractions: Sequence[float],
    seed: int,
    learned: int | None = None,
) -> list[int]:
    """Greedy stratified split by group: largest groups first, each to the part with the largest label deficit.

    Where documents have several labels, of groups of a size those with the rarest label come first, as in iterative
    stratification (Sechidis et al. 2011), and a label's first document is in the part `learned`. Documents without labels share
    a pseudo-label; another pseudo-label, which all documents have, balances the sizes. Without `learned`, that holds for one
    label a document too.
    """
    names = {name: k for k, name in enumerate(sorted({name for own in labels for name in own}))}
    # The last columns: no label, and all documents.
    rows, columns = np.array([(i, names.get(name, -2)) for i, own in enumerate(labels) for name in own or [""]]).T
    label_BK = np.zeros((len(labels), len(names) + 2), dtype=np.int64)
    label_BK[rows, columns] = 1
    weight_K = np.ones(len(names) + 2)
    if has_several := learned is None or len(rows) > len(labels):
        label_BK[:, -1], weight_K[-1] = 1, SIZE_WEIGHT
    members: dict[int, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(labels)).tolist():
        members.setdefault(group_of[index], []).append(index)
    num_K = label_BK.sum(axis=0)
    target = np.outer(fractions, num_K)
    denominator = np.maximum(target, 1e-9)
    filled = np.zeros_like(target)
    parts = [0] * len(labels)

    def order(group: list[int]) -> tuple[int, int]:
        return -len(group), int(num_K[label_BK[group].any(axis=0)].min()) if has_several else 0

    for group in sorted(members.values(), key=order):
        counts = label_BK[group].sum(axis=0)
        # With several labels, the squared deviations that are left, for which what is added counts half.
        deficit = ((target - filled - has_several * counts / 2) / denominator * (target > 0)) @ (counts * weight_K)
        deficit[np.equal(fractions, 0)] = -np.inf
        best = int(deficit.argmax())
        if learned is not None and has_several and (filled[learned][counts > 0] == 0).any():
            best = learned
        filled[best] += counts
        for index in group:
            parts[index] = best
    return parts


def with_validation_from_train(
    splits: Sequence[str], labels: Sequence[list[str]], group_of: Sequence[int], share: float, seed: int
) -> list[str]:
    """Splits with a share of the train split as validation, stratified and by group as in `make_splits`."""
    if "validation" in splits:
        raise ValueError("--validation_from_train: the source has validation documents already; leave the option out.")
    if not 0 < share < 1:
        raise ValueError(f"--validation_from_train must be a share between 0 and 1, such as 0.1, got {share}.")
    train = [index for index, split in enumerate(splits) if split == "train"]
    made = make_splits([labels[i] for i in train], [group_of[i] for i in train], (1 - share, share, 0.0), seed)
    result = list(splits)
    for index, split in zip(train, made, strict=True):
        result[index] = split
    return result


def without_leaks(
    ids: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
    duplicates: Sequence[tuple[int, int]],
    issues: DataIssues,
) -> list[str]:
    """Splits without the documents that leak into a later split, if the decision is to drop them.

    Raises:
        ValueError: unresolved leaks.
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
                    issues.pairs.append((problem, index, last))
                    if issues.decisions.get(problem) == "dropped":
                        dropped.add(index)
    issues.raise_if_unresolved()
    return ["" if index in dropped else split for index, split in enumerate(splits)]


def _check_splits(labels: Sequence[list[str]], splits: Sequence[str], in_each: Sequence[str]) -> None:
    """Raise ValueError if train or validation is empty, or a label is missing in one of the splits `in_each`."""
    counts = Counter((split, name) for split, own in zip(splits, labels, strict=True) for name in own)
    present = set(splits) - {""}
    for split in ("train", "validation"):
        if split not in present and len(in_each) == 1:
            raise ValueError(
                f"There are no {split} documents (splits: {', '.join(sorted(present)) or 'none'}). "
                + ("Take a share of train with --validation_from_train 0.1, " if "train" in present else "Add them, ")
                + "or use --split_column none to mix all documents and create the splits."
            )
    for label in sorted({name for own in labels for name in own}):
        absent = [split for split in in_each if not counts[split, label]]
        if absent:
            total = sum(counts[split, label] for split in present)
            raise ValueError(
                f"The class {label[:60]!r} ({total} documents) has none in {', '.join(absent)}. "
                + (
                    "Put some of them there, use --split_column none to mix all documents and create the splits, "
                    if len(in_each) == 1
                    else "Provide at least three that share no group and are no near-duplicates, "
                )
                + "or remove the class."
            )
