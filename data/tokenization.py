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

from modeling.hierarchical_roberta.chunking import special_token_frame, tokenize_batch, unlimited_backend

# What is tokenized and written at once: that many documents, or fewer if they are longer than this.
BATCH_DOCUMENTS, BATCH_BYTES = 64, 2**18


def load_tokenizer(name: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """Load the encoder's fast tokenizer. Raises ValueError if there is none or it has no padding token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}: expected a hub name (reachable or cached) or a folder with "
            f"tokenizer.json. ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {name!r} has no padding token; expected an encoder tokenizer, e.g. of RoBERTa."
        )
    return tokenizer


TOKEN_FEATURES = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "token_start": datasets.List(datasets.Value("int32")),
    "token_end": datasets.List(datasets.Value("int32")),
    "token_break": datasets.List(datasets.Value("int8")),
}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of a tokenizer's rules, vocabulary and added special tokens, ignoring truncation and padding settings."""
    if not tokenizer.is_fast:
        raise ValueError(f"{tokenizer.name_or_path}: a fast tokenizer is required for character offsets.")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}
    frame = special_token_frame(tokenizer)
    return hashlib.sha256(json.dumps([rules, frame], sort_keys=True).encode()).hexdigest()


def tokenize_documents(
    documents: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    num_proc: int,
    name: str,
    optional: Sequence[str] = (),
) -> datasets.Dataset:
    """Tokenize a split of documents on disk, into a file beside theirs. What is in memory does not grow with the split.

    Labels become a ClassLabel in the order of `labels`; the columns `optional` are kept, too. A single process has a thread
    for each core, but only one of them at a time makes arrays of tokens: from about eight cores on, more are faster.
    """
    kept = ["id", "text", *optional]
    features = datasets.Features(
        {column: documents.features[column] for column in kept}
        | {"label": datasets.ClassLabel(names=list(labels))}
        | TOKEN_FEATURES
    )
    schema, ids = features.arrow_schema, {label: i for i, label in enumerate(labels)}
    path = str(Path(documents.cache_files[0]["filename"]).with_name(f"tokenized-{name}.arrow"))
    with (
        _pool(tokenizer, min(num_proc, len(documents))) as pool,
        pa.OSFile(path, "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        tqdm(total=len(documents), desc=f"Tokenizing {name}", unit=" documents", disable=None) as progress,
    ):
        for table, tokens in _tokenize_in_order(pool, _batches(documents), 2 * max(num_proc, joblib.cpu_count())):
            label = pa.array([ids[label] for label in table["label"].to_pylist()])
            columns = {column: table[column] for column in kept} | {"label": label} | tokens
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
