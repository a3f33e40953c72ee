"""Tokens into chunks: sizes, overlap, breaks, offsets, and what is read past max_chunks."""

import itertools
import re
import tracemalloc

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import tokenization
from data.chunk_dataset import ChunkedDocuments
from data.documents import Columns, read_documents
from data.readers import Source
from data.tokenization import tokenize_documents
from modeling.hierarchical_roberta.chunking import (
    Chunker,
    chunk_bounds,
    coverage,
    num_chunks_of,
    select_chunks,
    special_token_frame,
    token_breaks,
    tokenize_batch,
)


@given(st.integers(0, 5000), st.integers(2, 300), st.integers(0, 200), st.booleans())
def test_chunks_cover_the_document_are_few_and_even(num_tokens, body_length, overlap, with_breaks):
    overlap = min(overlap, body_length - 1)
    rng = np.random.default_rng(num_tokens)
    breaks = rng.integers(0, 3, num_tokens).astype(np.int8) * (rng.random(num_tokens) < 0.1) if with_breaks else None
    bounds = chunk_bounds(num_tokens, body_length, overlap, breaks)
    lengths = [end - start for start, end in bounds]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_tokens
    assert max(lengths) <= body_length
    assert all(end - following == overlap for (_, end), (following, _) in itertools.pairwise(bounds))
    assert len(bounds) == int(num_chunks_of(np.array([num_tokens]), body_length, overlap)[0])
    if breaks is None:
        assert max(lengths) - min(lengths) <= 1
    elif len(bounds) > 1:
        # Each start moves by an eighth of a chunk at most from where it would have been even.
        assert max(lengths) - min(lengths) <= 2 * (body_length // 8) + 1 + body_length // 8


def test_a_chunk_begins_at_a_paragraph_or_sentence_near_its_even_place():
    breaks = np.zeros(100, dtype=np.int8)
    breaks[48] = 1
    assert chunk_bounds(100, 60, breaks=breaks) == [(0, 48), (48, 100)]
    breaks[54] = 2
    assert chunk_bounds(100, 60, breaks=breaks) == [(0, 54), (54, 100)]
    far = np.zeros(100, dtype=np.int8)
    far[30] = 2
    assert chunk_bounds(100, 60, breaks=far) == [(0, 50), (50, 100)]


def test_an_empty_document_is_one_chunk_of_special_tokens(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    empty = splits["train"].select([0]).map(lambda row: {"input_ids": [], "token_break": []})
    [chunk] = ChunkedDocuments(empty, tokenizer, chunk_length=16)[0]["input_ids"]
    assert chunk.tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_special_tokens_stand_in_every_chunk_and_the_bodies_are_the_document(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    chunked = ChunkedDocuments(splits["train"], tokenizer, chunk_length=16, max_chunks=1000)
    for index in range(len(chunked)):
        chunks = chunked[index]["input_ids"]
        assert {(chunk[0], chunk[-1]) for chunk in chunks} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
        assert max(map(len, chunks)) <= 16
        assert np.concatenate([chunk[1:-1] for chunk in chunks]).tolist() == splits["train"][index]["input_ids"]


def test_the_prefix_stands_in_every_chunk_after_the_leading_special_tokens(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    prefix = tokenizer("The lamp:", add_special_tokens=False)["input_ids"]
    options = {"chunk_length": 24, "max_chunks": 1000, "chunk_prefix": "The lamp: "}
    chunked = ChunkedDocuments(splits["train"], tokenizer, **options)
    for index in range(len(chunked)):
        chunks = chunked[index]["input_ids"]
        assert all(chunk[: len(prefix) + 1].tolist() == [tokenizer.cls_token_id, *prefix] for chunk in chunks)
        assert max(map(len, chunks)) <= 24
        bodies = np.concatenate([chunk[len(prefix) + 1 : -1] for chunk in chunks])
        assert bodies.tolist() == splits["train"][index]["input_ids"]


def test_a_prefix_that_leaves_no_room_is_an_error(roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    words = "lamp " * 8
    length = len(Chunker(tokenizer, 100, chunk_prefix=words).prefix) + 1
    with pytest.raises(ValueError, match=rf"chunk_prefix.*\b{length}\b.*chunk_length"):
        Chunker(tokenizer, length, chunk_prefix=words)
    assert Chunker(tokenizer, length + 1, chunk_prefix=words).body_length == 1
    with pytest.raises(ValueError, match=r"chunk_overlap.*chunk_prefix"):
        Chunker(tokenizer, length + 3, chunk_overlap=3, chunk_prefix=words)


@pytest.mark.parametrize("folder", ["roberta_folder", "bert_folder"])
def test_the_special_tokens_are_asked_of_the_tokenizer(folder, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    assert special_token_frame(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])


def test_offsets_lead_back_to_the_text(roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    text = "Nobody spoke. — Æther 😀, naïve שלום\n\nA second paragraph! And more."
    tokens = {name: column[0] for name, column in tokenize_batch([text], tokenizer).items()}
    spans = zip(tokens["token_start"], tokens["token_end"], strict=True)
    covered = sorted({position for start, end in spans for position in range(start, end)})
    assert "".join(text[i] for i in covered).replace(" ", "") == text.replace(" ", "")
    starts = [text[tokens["token_end"][i] - 1 :][:20] for i in np.flatnonzero(tokens["token_break"] == 2)]
    assert len(starts) == 1
    assert "A" in starts[0]


def test_breaks_know_paragraphs_and_sentences():
    text = "One. Two!\n\nThree"
    ends = np.array([3, 4, 8, 9, 16])
    assert token_breaks(text, ends).tolist() == [0, 0, 1, 0, 2]


PIECES = [".", "!", "?", "…", "。", "！", "？", '"', "”", ")", " ", "\n", "\t", "\u3000", "a", "Word", "文"]


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join), st.integers(1, 4))
def test_breaks_are_where_one_expression_finds_them(text, step):
    sentence = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s+|[。！？]|\n\s*")
    ends = np.arange(step, len(text) + step, step)
    expected = np.zeros(len(ends) + 1, np.int8)
    for level, pattern in ((1, sentence), (2, re.compile(r"\n[^\S\n]*\n\s*"))):
        for match in pattern.finditer(text):
            expected[(ends <= match.end()).sum()] = level
    expected[:1] = 0
    assert token_breaks(text, ends).tolist() == expected[:-1].tolist()


def written_documents(folder, texts):
    """Documents on disk, as scripts.prepare_dataset reads them."""
    source = folder / "source.parquet"
    labels = [("mild", "mature")[index % 2] for index in range(len(texts))]
    datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(source)
    return read_documents(Source(str(source)), Columns(), keep=["empty"], cache_dir=str(folder))[0]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("folder", ["roberta_folder", "bert_folder"])
def test_a_split_is_tokenized_in_order_as_the_tokenizer_does(folder, num_proc, request, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 3000)
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    rng = np.random.default_rng(0)
    texts = ["The lamp, naïve 😀. " * int(count) + f"number {count}" for count in rng.integers(0, 300, 90)] + [""]
    documents = written_documents(tmp_path, texts).select(range(90, -1, -1))
    tokens = tokenize_documents(documents, tokenizer, ["mild", "mature"], num_proc, "train")
    assert tokens["text"][:] == texts[::-1]
    assert tokens["label"][:] == [index % 2 for index in range(90, -1, -1)]
    assert tokens.column_names == ["id", "text", "label", "input_ids", "token_start", "token_end", "token_break"]
    assert {name: tokens.features[name] for name in tokenization.TOKEN_FEATURES} == tokenization.TOKEN_FEATURES
    plain = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    for row in tokens:
        expected = plain(row["text"], add_special_tokens=False, return_offsets_mapping=True)
        assert row["input_ids"] == expected["input_ids"]
        assert list(zip(row["token_start"], row["token_end"], strict=True)) == expected["offset_mapping"]
        assert row["token_break"] == token_breaks(row["text"], np.array(row["token_end"], dtype=np.int32)).tolist()


def test_a_split_is_not_in_memory_as_it_is_tokenized(roberta_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization.joblib, "cpu_count", lambda: 1)
    monkeypatch.setattr(tokenization, "BATCH_BYTES", 20_000)
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    documents = written_documents(tmp_path, ["The lamp went out. " * 1000] * 40)
    tracemalloc.start()
    tokens = tokenize_documents(documents, tokenizer, ["mild", "mature"], 1, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < tokens.data.nbytes / 2


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("head", [0, 1, 2]), ("head_tail", [0, 1, 9]), ("uniform", [0, 4, 9]), ("random", [0, 4, 9])],
)
def test_which_chunks_are_read_past_the_maximum(policy, expected):
    assert select_chunks(10, 3, policy).tolist() == expected
    assert select_chunks(3, 3, policy).tolist() == [0, 1, 2]


def test_random_chunks_are_drawn_anew_each_epoch_and_the_same_for_the_same_epoch(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    geometry = {"chunk_length": 8, "max_chunks": 3, "chunk_policy": "random"}
    longest = int(np.argmax([len(ids) for ids in splits["train"]["input_ids"]]))

    def read(epoch: int, seed: int = 42, training: bool = True) -> list[list[int]]:
        chunked = ChunkedDocuments(splits["train"], tokenizer, training=training, seed=seed, **geometry)
        chunked.set_epoch(epoch)
        return [chunk.tolist() for chunk in chunked[longest]["input_ids"]]

    assert read(0) == read(0)
    assert len({str(read(epoch)) for epoch in range(5)}) > 1
    assert read(0, training=False) == read(3, training=False)


def test_coverage_counts_what_is_cut():
    cut = coverage([10, 40, 100], body_length=10, overlap=0, max_chunks=5)
    assert (cut["documents_cut"], cut["tokens_cut"], cut["most_chunks"]) == (1, 50, 10)
    assert cut["tokens_cut_share"] == pytest.approx(50 / 150)


def test_an_overlap_that_cannot_be_is_an_error(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    with pytest.raises(ValueError, match=r"chunk_overlap.*14"):
        ChunkedDocuments(splits["train"], tokenizer, chunk_length=16, chunk_overlap=14)
