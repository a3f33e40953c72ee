"""Loading the encoder's tokenizer, and tokenizing splits."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling.hierarchical_roberta.chunking import special_token_frame, tokenize_batch


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
    """Tokenize a split; labels become a ClassLabel in the order of `labels`. `optional`: further columns to keep, of strings."""
    ids = {label: i for i, label in enumerate(labels)}

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"label": [ids[label] for label in batch["label"]], **tokenize_batch(batch["text"], tokenizer)}

    features = {"id": datasets.Value("large_string"), "text": datasets.Value("large_string")}
    features |= {column: datasets.Value("string") for column in optional}
    return documents.map(
        tokenize,
        batched=True,
        batch_size=64,
        num_proc=num_proc if num_proc > 1 and len(documents) >= num_proc else None,
        remove_columns=[column for column in documents.column_names if column not in features],
        features=datasets.Features({**features, "label": datasets.ClassLabel(names=list(labels)), **TOKEN_FEATURES}),
        desc=f"Tokenizing {name}",
        load_from_cache_file=False,
    )
