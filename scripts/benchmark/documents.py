"""Documents of a known number of chunks, cut from the demo's stories or from a source of texts."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from data.chunking import tokenize_batch
from data.demo import demo_corpus
from data.sources import read_rows

# 49 real chunks in 8 documents of 1 to 20: padding to 20 makes 160 of them.
MIX = (3.4, 19.8, 0.7, 6.5, 1.3, 9.6, 4.2, 2.1)


def stories() -> Iterator[str]:
    """The demo's stories without end."""
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
    """A document for each number of chunks (a fraction for the last), of stories one after the other."""
    source, documents = stories(), []
    for number in chunks:
        num_tokens = max(1, round(number * (chunk_length - 2)))
        text = ""
        while len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) < num_tokens:
            text += " ".join(next(source) for _ in range(4)) + "\n\n"
        documents.append(cut(text, num_tokens, tokenizer))
    return documents
