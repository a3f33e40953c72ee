"""Measurements of a prepared dataset's documents, and warnings about what may spoil training or its evaluation."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import rankdata
from transformers import PreTrainedTokenizerBase

from data.documents import shorten, similar_label_groups
from data.labels import label_rows
from data.report_page import readable_percent
from data.text_excerpts import visible_name

# Fewer training documents of a class than this are hardly enough to learn it, and its validation scores are noise.
MIN_TRAIN_DOCUMENTS = 10
# English film dialogue has no unknown tokens with MiniLM's tokenizer; English news has 0.2 % with MPNet's, most of them
# in one document full of box-drawing and Braille characters.
MAX_UNKNOWN = 0.01
# Bytes of text per token. RoBERTa's tokenizer has 4.4 on English prose and 3.1 on shouted dialogue, but 2.6 to 2.8 on
# German, French and Spanish and 1.4 to 2.2 on Polish, Russian, Chinese, digits or base64. A tokenizer made for Chinese,
# with a token for each character, has 3.
MIN_BYTES_PER_TOKEN = 2.8
# A tenth of the text that is never read.
MAX_CUT = 0.1
# How often a document of one label is longer than one of another: 0.71 corresponds to d = 0.8, a "large" effect (Cohen
# 1988), for normal distributions.
LENGTH_EFFECT = 0.71
# Documents with unknown tokens, and tokens of each, whose characters are counted.
SAMPLED_DOCUMENTS, SAMPLED_TOKENS = 1000, 100


class DatasetWarning(NamedTuple):
    message: str
    section: str  # of the report, where the details are


def measure_documents(
    splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> tuple[pd.DataFrame, pd.DataFrame, Counter[str]]:
    """Measure every document in one pass over the Arrow columns, a batch in memory at a time.

    Returns:
        A row for each document: split, row (in the split), num_tokens, num_bytes, num_unknown.
        The same for each label of a document, with label (its number) and the document's index.
        The texts of unknown tokens and how often they occur, in a sample.
    """
    unknown_id, unknown_texts, num_sampled = tokenizer.unk_token_id, Counter[str](), 0
    measured: dict[str, list[np.ndarray]] = defaultdict(list)
    for part in splits.values():
        columns = part.select_columns(["text", "label", "input_ids", "token_start", "token_end"])
        for batch in columns.with_format("arrow").iter(batch_size=64):
            num_tokens = pc.list_value_length(batch["input_ids"]).to_numpy().astype(np.int64)
            num_unknown = np.zeros_like(num_tokens)
            if unknown_id is not None:
                unknown = np.flatnonzero(pc.list_flatten(batch["input_ids"]).to_numpy() == unknown_id)
                owner = np.searchsorted(np.cumsum(num_tokens), unknown, side="right")
                num_unknown = np.bincount(owner, minlength=len(num_tokens))
            for index in np.flatnonzero(num_unknown)[: SAMPLED_DOCUMENTS - num_sampled]:
                document = {name: batch[name][index] for name in batch.column_names}
                unknown_texts.update(_unknown_texts(document, unknown_id))
                num_sampled += 1
            measured["num_tokens"].append(num_tokens)
            measured["num_bytes"].append(pc.binary_length(batch["text"]).to_numpy().astype(np.int64))
            measured["num_unknown"].append(num_unknown)
    documents = pd.DataFrame({name: np.concatenate(arrays) for name, arrays in measured.items()})
    documents["split"] = np.repeat(list(splits), [len(part) for part in splits.values()])
    documents["row"] = np.concatenate([np.arange(len(part)) for part in splits.values()])
    labels = pd.concat([label_rows(part) for part in splits.values()], keys=list(splits), names=["split"])
    first = pd.Series(np.cumsum([0, *(len(part) for part in splits.values())])[:-1], index=list(splits))
    index = labels["row"].to_numpy() + first[labels.index.get_level_values("split")].to_numpy()
    return documents, documents.iloc[index].assign(label=labels["label"].to_numpy()), unknown_texts


def _unknown_texts(document: dict[str, pa.Scalar], unknown_id: int) -> list[str]:
    ids, starts, ends = (document[name].values.to_numpy() for name in ("input_ids", "token_start", "token_end"))
    text = document["text"].as_py()
    unknown = np.flatnonzero(ids == unknown_id)[:SAMPLED_TOKENS]
    return [text[starts[i] : min(ends[i], starts[i] + 100)] for i in unknown]  # a "word" may be as long as the document


def unknown_characters(texts: Counter[str], tokenizer: PreTrainedTokenizerBase) -> Counter[str]:
    """Characters that the tokenizer does not know, by how often they occur in `texts`.

    A text without such a character (a word may be unknown because it is too long) is counted as it is.
    """
    is_unknown = {
        char: tokenizer.unk_token_id in tokenizer.backend_tokenizer.encode(char, add_special_tokens=False).ids
        for char in set("".join(texts))
    }
    counts = Counter[str]()
    for text, count in texts.items():
        for name in [char for char in text if is_unknown[char]] or [text]:
            counts[name] += count
    return counts


def count_documents(labelled: pd.DataFrame, num_labels: int, splits: Sequence[str]) -> pd.DataFrame:
    """Documents by label (rows) and split (columns)."""
    counts = labelled.groupby(["label", "split"]).size().unstack(fill_value=0)
    return counts.reindex(index=range(num_labels), columns=list(splits), fill_value=0)


def check_dataset(
    documents: pd.DataFrame,
    labelled: pd.DataFrame,
    labels: Sequence[str],
    splits: Sequence[str],
    issues: dict[str, Any],
    cut_share: float,
) -> list[DatasetWarning]:
    """Everything that needs attention before training, the gravest first.

    Args:
        documents, labelled: from `measure_documents`.
        issues: the manifest's data issues, by problem.
        cut_share: share of the tokens beyond `max_chunks`.
    """
    names = [visible_name(label) for label in labels]
    messages = [
        *(("labels", message) for message in _check_counts(count_documents(labelled, len(labels), splits), names)),
        *(("labels", message) for message in _check_label_names(labels)),
        *(("issues", message) for message in _check_leaks(issues)),
        *(("vocabulary", message) for message in _check_vocabulary(documents, labelled, names)),
        *(("lengths", message) for message in _check_lengths(_in_train(documents), _in_train(labelled), names)),
    ]
    if cut_share >= MAX_CUT:
        message = f"{readable_percent(cut_share)} of the tokens are beyond max_chunks and would not be read."
        messages.append(("coverage", message))
    return [DatasetWarning(message, section) for section, message in messages]


def _check_counts(counts: pd.DataFrame, names: Sequence[str]) -> Iterator[str]:
    others = [split for split in counts.columns if split != "train"]
    few = counts.index[counts["train"] < MIN_TRAIN_DOCUMENTS]
    if len(few):
        listed = shorten([f"{names[i]} ({counts.loc[i, 'train']})" for i in few])
        yield f"Fewer than {MIN_TRAIN_DOCUMENTS} training documents: {listed}."
    only_in_train = (counts["train"] > 0) & (counts[others] == 0).all(axis="columns")
    if only_in_train.any():
        yield f"Only in train, so that no score can be measured: {shorten([names[i] for i in counts.index[only_in_train]])}."
    for split in others:
        absent = counts.index[(counts[split] == 0) & ~only_in_train]
        if len(absent):
            yield f"No {split} documents: {shorten([names[i] for i in absent])}."


def _check_label_names(labels: Sequence[str]) -> Iterator[str]:
    groups = [" = ".join(visible_name(label) for label in group) for group in similar_label_groups(labels)]
    if groups:
        yield f"Labels that look alike: {shorten(groups)}."


def _check_leaks(issues: dict[str, Any]) -> Iterator[str]:
    kept = {problem: len(issue["rows"]) for problem, issue in issues.items() if issue["decision"] == "kept"}
    if leaks := kept.get("duplicate", 0) + kept.get("group_leak", 0):
        yield f"Leaks between splits were kept ({leaks:,}): scores will be too high."


def _in_train(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["split"] == "train"]


def _check_vocabulary(documents: pd.DataFrame, labelled: pd.DataFrame, names: Sequence[str]) -> Iterator[str]:
    columns = ["num_tokens", "num_bytes", "num_unknown"]
    by_label, total = labelled.groupby("label")[columns].sum(), documents[columns].sum()
    by_label = by_label[by_label["num_tokens"] > 0]
    unknown = by_label["num_unknown"] / by_label["num_tokens"]
    if (unknown > MAX_UNKNOWN).any():
        listed = shorten([f"{names[i]} {readable_percent(unknown[i])}" for i in unknown.index[unknown > MAX_UNKNOWN]])
        share = readable_percent(total["num_unknown"] / total["num_tokens"])
        yield f"{share} of the tokens are unknown to the tokenizer ({listed})."
    density = by_label["num_bytes"] / by_label["num_tokens"]
    if (density < MIN_BYTES_PER_TOKEN).any():
        listed = shorten([f"{names[i]} {density[i]:.1f}" for i in density.index[density < MIN_BYTES_PER_TOKEN]])
        yield (
            f"Only {total['num_bytes'] / total['num_tokens']:.1f} bytes of text per token ({listed}): the tokenizer may be "
            "made for another language."
        )


def _check_lengths(train: pd.DataFrame, labelled: pd.DataFrame, names: Sequence[str]) -> Iterator[str]:
    effects = length_effects(train, labelled)
    if len(names) == 2 and len(labelled) == len(train):
        effects = effects[:1]  # the other label's is its mirror image
    listed = []
    for label, longer in effects[:3]:
        is_label = train.index.isin(labelled.index[labelled["label"] == label])
        medians = [train["num_tokens"][rows].median() for rows in (is_label, ~is_label)]
        listed.append(
            f"{names[label]} documents are {'longer' if longer > 0.5 else 'shorter'} than others in "
            f"{readable_percent(max(longer, 1 - longer))} of pairs (median {medians[0]:,.0f} and {medians[1]:,.0f} tokens)"
        )
    if len(effects) > len(listed):
        listed.append(f"and likewise of {len(effects) - len(listed):,} more")
    if listed:
        yield f"Length alone tells labels apart, and a classifier may learn it: {', '.join(listed)}."


def length_effects(train: pd.DataFrame, labelled: pd.DataFrame) -> list[tuple[int, float]]:
    """Labels whose length stands out, the strongest first: how often a document is longer than one without the label.

    This is the area under the ROC curve of length as a classifier. It has to be beyond `LENGTH_EFFECT` and three
    standard errors of chance.
    """
    labels = labelled["label"].to_numpy()
    num_own = np.bincount(labels)
    num_other = len(train) - num_own
    rank = pd.Series(rankdata(train["num_tokens"]), index=train.index)
    rank_sums = np.bincount(labels, weights=rank[labelled.index].to_numpy())
    effects = []
    for label in np.flatnonzero(np.minimum(num_own, num_other) >= MIN_TRAIN_DOCUMENTS).tolist():
        own, other = int(num_own[label]), int(num_other[label])
        longer = float(rank_sums[label] - own * (own + 1) / 2) / (own * other)
        error = ((own + other + 1) / (12 * own * other)) ** 0.5
        if abs(longer - 0.5) > max(LENGTH_EFFECT - 0.5, 3 * error):
            effects.append((label, longer))
    return sorted(effects, key=lambda effect: -abs(effect[1] - 0.5))
