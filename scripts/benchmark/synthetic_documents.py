"""Documents with a given number of chunks, cut from demo stories or a source, and their balance over ranks."""

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.demo_corpus import demo_corpus
from data.readers import read_rows
from modeling.hierarchical_roberta.chunking import tokenize_batch
from modeling.training.sampling import balance_across_ranks

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
