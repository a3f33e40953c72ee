"""Documents with a given number of chunks, cut from demo stories or a source, and their balance over ranks; and reports with any
number of topics:

    python -m scripts.benchmark.synthetic_documents --documents 3000 --topics 90 --output topics.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.demo_corpus import demo_corpus
from data.readers import read_rows
from modeling.file_utils import write_text
from modeling.hierarchical_roberta.chunking import tokenize_batch
from modeling.training.sampling import balance_across_ranks
from scripts.common.cli import UserParser, run_main

# 8 documents of 1 to 20 chunks, 49 in total; padding to 20 makes 160.
MIX = (3.4, 19.8, 0.7, 6.5, 1.3, 9.6, 4.2, 2.1)


def stories() -> Iterator[str]:
    """An infinite stream of demo stories."""
    seed = 0
    while True:
        yield from (document["text"] for document in demo_corpus(100, seed=seed))
        seed += 1


def texts_of_source(source: str) -> list[str]:
    """The texts of a CSV, JSONL or Parquet file."""
    return [str(row["text"]) for row in read_rows(source)]


def cut(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first `num_tokens` tokens of a text, as text."""
    ends = tokenize_batch([text], tokenizer)["token_end"][0]
    return text[: int(ends[num_tokens - 1])] if len(ends) > num_tokens else text


def documents_of(chunks: tuple[float, ...], chunk_length: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Concatenate stories to one document per number of chunks; a fraction makes the last chunk shorter."""
    source, documents = stories(), []
    for number in chunks:
        num_tokens = max(1, round(number * (chunk_length - 2)))
        text = ""
        while len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) < num_tokens:
            text += " ".join(next(source) for _ in range(4)) + "\n\n"
        documents.append(cut(text, num_tokens, tokenizer))
    return documents


# Topics in a group share TERMS_SHARED of their TERMS.
GROUP, TERMS, TERMS_SHARED = 6, 8, 3


def topic_documents(num_documents: int, num_topics: int, seed: int = 7) -> list[dict[str, object]]:
    """Short reports with topics, many of them rare, as in the news of Reuters-21578: `{"id", "text", "label": [topic, …]}`.

    Frequencies follow Zipf's law, so that many topics do not occur in few documents. Most reports have one topic, some none or
    several, of a group of topics that share made-up terms. Every report also has two terms of a topic that is drawn at random.
    """
    rng = np.random.default_rng(seed)
    syllables = np.array([first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"])

    def terms(number: int) -> list[str]:
        return ["".join(word) for word in rng.choice(syllables, (number, 3))]

    shared = [terms(TERMS_SHARED) for _ in range(-(-num_topics // GROUP))]
    terms_of = [shared[topic // GROUP] + terms(TERMS - TERMS_SHARED) for topic in range(num_topics)]
    # Frequent and rare topics are mixed in the groups.
    share_T = rng.permutation(1 / np.arange(1, num_topics + 1))
    share_T /= share_T.sum()
    stock = " ".join(story for _, story in zip(range(50), stories(), strict=False)).split()
    documents: list[dict[str, object]] = []
    for number in range(num_documents):
        own = rng.choice(num_topics, size=int(rng.random() < 0.95), p=share_T).tolist()
        while own and rng.random() < 0.2:
            group = np.arange(num_topics) // GROUP == own[0] // GROUP
            own.append(int(rng.choice(num_topics, p=share_T * group / (share_T @ group))))
        own = sorted(set(own))
        other = int(rng.integers(num_topics))
        start = rng.integers(len(stock) - 200)
        words = stock[start : start + int(rng.integers(40, 160))]
        terms_here = [str(rng.choice(terms_of[topic])) for topic in own for _ in range(3)]
        terms_here += [str(rng.choice(terms_of[other])) for _ in range(2)]
        for term in terms_here:
            words.insert(int(rng.integers(len(words))), term)
        label = [f"topic-{topic:04d}" for topic in own]
        documents.append({"id": f"report-{number:05d}", "text": " ".join(words), "label": label})
    return documents


STEPS = 20


def evenness(
    num_tokens: np.ndarray,
    ranks: int,
    documents_each: int = 16,
    chunk_length: int = 256,
    hidden_size: int = 384,
    seed: int = 0,
) -> dict[str, float]:
    """Mean ÷ maximum cost over the ranks in a step, averaged over steps, for `WeightedTrainer`'s balanced order and for
    a random order. 1 means that all ranks finish at the same time.

    Args:
        num_tokens: number of tokens of each document; steps sample from them (with replacement if there are too few).
        documents_each: documents per rank and optimizer step.
    """
    rng = np.random.default_rng(seed)
    balance: dict[str, list[float]] = {"dealt out": [], "random": []}
    for _ in range(STEPS if ranks < 1000 else STEPS // 4):
        count = ranks * documents_each
        tokens = rng.choice(num_tokens, count, replace=count > len(num_tokens))
        chunks = np.ceil(tokens / (chunk_length - 2))
        costs = tokens * (1 + tokens / chunks / (6 * hidden_size))
        for name, order in (("dealt out", balance_across_ranks(costs.tolist(), ranks, 1)), ("random", range(count))):
            totals = costs[list(order)].reshape(documents_each, ranks).sum(axis=0)
            balance[name].append(float(totals.mean() / totals.max()))
    return {name: float(np.mean(values)) for name, values in balance.items()}


def main() -> None:
    parser = UserParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--topics", type=int, default=90)
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    arguments = parser.parse_args()
    if min(arguments.documents, arguments.topics) < 1:
        raise ValueError("--documents and --topics must be at least 1.")
    documents = topic_documents(arguments.documents, arguments.topics)
    write_text(arguments.output, "".join(f"{json.dumps(document)}\n" for document in documents))


if __name__ == "__main__":
    sys.exit(run_main(main))
