"""Loading the encoder's tokenizer, and tokenizing splits."""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import datasets
import joblib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_protobuf_available, is_sentencepiece_available, is_tiktoken_available

from data.labels import SINGLE, label_feature, label_ids
from modeling.hierarchical_roberta.chunking import special_token_frame, tokenize_batch, unlimited_backend

# What is tokenized and written at once: that many documents, or fewer if they are longer than this.
BATCH_DOCUMENTS, BATCH_BYTES = 64, 2**18


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load the encoder's fast tokenizer, from tokenizer.json or converted by transformers from the files of a slow one.

    Decoders' tokenizers often have no padding token (GPT-2, Llama): their end-of-text or unknown token then pads. Which one
    makes no difference, since padding is masked; the choice is saved with the tokenizer, whose fingerprint stays the same.

    Raises:
        ValueError: there is none or it has no vocabulary, a package for its conversion is missing, it is slow, or no token
            could pad.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, revision=revision, trust_remote_code=False)
    except Exception as error:
        reason = f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''})"
        if missing := _missing_converters(error):
            raise ValueError(
                f"The tokenizer of {name!r} is not in the format of tokenizer.json, and converting it needs packages that "
                f"are not installed: pip install {' '.join(missing)}."
            ) from error
        if isinstance(error, ImportError):  # a converter needs no other package
            raise ValueError(_slow_message(name, reason)) from error
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}: expected a hub name (reachable or cached) or a folder with "
            f"tokenizer.json or files that transformers can convert. {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(_slow_message(name, f"({type(tokenizer).__name__})"))
    # transformers makes a tokenizer of special tokens alone where it finds no vocabulary.
    words = tokenizer.get_vocab().keys() - {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    if not any(character.isalnum() for word in words for character in word):
        raise ValueError(
            f"The tokenizer of {name!r} has no vocabulary: expected tokenizer.json, or files that transformers can convert to "
            f"a {type(tokenizer).__name__}, beside config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {name!r} has no special token to pad with: set `pad_token` in its tokenizer_config.json."
        )
    return tokenizer


def _missing_converters(error: Exception) -> list[str]:
    """Packages that transformers converts tokenizers with, if they are missing and the error comes from that.

    What transformers cannot read with sentencepiece and protobuf it takes for a file of tiktoken.
    """
    if not any(
        words in str(error) for words in ("`tiktoken` is required", "Error parsing line", "SentencePiece library")
    ):
        return []
    installed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [package for package, is_there in installed.items() if not is_there]
    return missing or ([] if is_tiktoken_available() else ["tiktoken"])


def _slow_message(name: str, detail: str) -> str:
    return (
        f"The tokenizer of {name!r} exists only as slow Python code {detail}; a fast tokenizer is needed, which knows the "
        "place of each token in the text. Choose an encoder that has one."
    )


TOKEN_FEATURES = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_start": datasets.List(datasets.Value("int32")),
    "token_end": datasets.List(datasets.Value("int32")),
    "token_break": datasets.List(datasets.Value("int8")),
}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's rules, vocabulary and added special tokens, ignoring truncation and padding settings."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}
    frame = special_token_frame(tokenizer)
    return hashlib.sha256(json.dumps([rules, frame], sort_keys=True).encode()).hexdigest()


def unknown_token_share(splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the documents' tokens that stand for what the tokenizer does not know: 0 for byte-level tokenizers."""
    num_tokens = num_unknown = 0
    for part in splits.values():
        for batch in part.select_columns(["input_ids"]).with_format("arrow").iter(BATCH_DOCUMENTS):
            tokens = pc.list_flatten(batch["input_ids"]).to_numpy()
            num_tokens += len(tokens)
            num_unknown += int((tokens == tokenizer.unk_token_id).sum())
    return num_unknown / max(num_tokens, 1)


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    num_proc: int,
    name: str,
    optional: Sequence[str] = (),
    problem_type: str = SINGLE,
) -> datasets.Dataset:
    """Tokenize a split of documents on disk, into a file beside theirs. What is in memory does not grow with the split.

    Labels become a ClassLabel in the order of `labels`, or lists of it; the columns `optional` are kept, too. A single process has a thread
    for each core, but only one of them at a time makes arrays of tokens: from about eight cores on, more are faster.
    """
    kept = ["id", "text", *optional]
    features = datasets.Features(
        {column: documents.features[column] for column in kept}
        | {"label": label_feature(labels, problem_type)}
        | TOKEN_FEATURES
    )
    schema = features.arrow_schema
    path = str(Path(documents.cache_files[0]["filename"]).with_name(f"tokenized-{name}.arrow"))
    with (
        _pool(tokenizer, min(num_proc, len(documents))) as pool,
        pa.OSFile(path, "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(total=len(documents), desc=f"Tokenizing {name}", unit=" documents", disable=None) as progress,
    ):
        for table, tokens in _tokenize_in_order(pool, _batches(documents), 2 * max(num_proc, joblib.cpu_count())):
            columns = {column: table[column] for column in kept} | {"label": label_ids(table["label"], labels)} | tokens
            writer.write_table(pa.table(columns).cast(schema))
            progress.update(len(table))
    return datasets.Dataset.from_file(path)


def _pool(tokenizer: PreTrainedTokenizerBase, num_proc: int) -> Executor:
    unlimited_backend(tokenizer)
    if num_proc > 1:
        return ProcessPoolExecutor(num_proc, initializer=_set_tokenizer, initargs=(tokenizer,))
    return ThreadPoolExecutor(joblib.cpu_count(), initializer=_set_tokenizer, initargs=(tokenizer,))


def _batches(documents: datasets.Dataset) -> Iterator[pa.Table]:
    for table in documents.with_format("arrow").iter(BATCH_DOCUMENTS):
        batch_of = np.cumsum(pc.binary_length(table["text"]).to_numpy()) // BATCH_BYTES
        starts = np.flatnonzero(np.diff(batch_of, prepend=-1))
        for start, end in pairwise([*starts.tolist(), len(table)]):
            yield table.slice(start, end - start)


def _tokenize_in_order(
    pool: Executor, batches: Iterator[pa.Table], num_waiting: int
) -> Iterator[tuple[pa.Table, dict[str, pa.Array]]]:
    """Each batch and its tokens; at most `num_waiting` are tokenized ahead."""
    waiting: deque[tuple[pa.Table, Future[dict[str, pa.Array]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_tokenize, batch["text"].to_pylist())))
        if len(waiting) == num_waiting:
            table, tokens = waiting.popleft()
            yield table, tokens.result()
    for table, tokens in waiting:
        yield table, tokens.result()


_tokenizer: PreTrainedTokenizerBase


def _set_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give it to a process once and not with each batch."""
    global _tokenizer
    _tokenizer = tokenizer


def _tokenize(texts: list[str]) -> dict[str, pa.Array]:
    columns = tokenize_batch(texts, _tokenizer)
    ends = np.cumsum([0, *map(len, columns["input_ids"])], dtype=np.int32)
    return {name: pa.ListArray.from_arrays(ends, np.concatenate(rows)) for name, rows in columns.items()}
