"""Training on a stream: each document once a pass, on one process; resumed at the right document."""

import json
import shutil
from dataclasses import replace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from data.chunk_dataset import ChunkedDocuments
from data.documents import Columns
from data.labels import MULTI
from data.preparation import prepare_dataset
from data.readers import ReadOptions
from data.streaming import StreamedDocuments, prepared_stream, shuffled, source_stream
from scripts.common.cli import one_paragraph
from tests.conftest import LABELS, assert_refused, tiny_rows, train, write_csv

STREAM = {"streaming": True, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"}
STREAM |= {"save_steps": 4, "dropout": 0.0, "attention_dropout": 0.0, "shuffle_buffer": 10, "max_grad_norm": 0}


def take(stream, count: int) -> list:
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_pass_has_each_document_once_on_one_process(num_processes):
    shares = []
    for process in range(num_processes):
        stream = StreamedDocuments(
            lambda number: range(50),
            lambda row: row,
            seed=3,
            buffer_size=8,
            process_index=process,
            num_processes=num_processes,
        )
        shares.append(take(stream, 150 // num_processes))
    order = [shares[place % num_processes][place // num_processes] for place in range(150)]
    for start in (0, 50, 100):
        assert sorted(order[start : start + 50]) == list(range(50))
    assert order[:50] != order[50:100]
    alone = StreamedDocuments(lambda number: range(50), lambda row: row, seed=3, buffer_size=8)
    assert take(alone, 150) == order


def test_shuffled_with_a_buffer_of_one_keeps_the_order_and_an_empty_stream_is_an_error():
    assert list(shuffled(range(9), 1, "0")) == list(range(9))
    assert sorted(shuffled(range(100), 30, "0")) == list(range(100)) != list(shuffled(range(100), 30, "0"))
    with pytest.raises(ValueError, match=r"(?i)empty|no documents"):
        take(StreamedDocuments(lambda number: [], lambda row: row, seed=0), 1)


def test_source_stream_gives_the_items_of_the_prepared_stream(splits, csv_file, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    chunked = ChunkedDocuments(splits["train"], tokenizer, chunk_length=16, max_chunks=4)
    prepared = {item["id"]: item for item in take(prepared_stream(chunked, seed=0), len(chunked))}
    streamed = {item["id"]: item for item in take(source_stream(str(csv_file), chunked, LABELS, seed=0), 60)}
    assert set(prepared) < set(streamed)
    for id_, item in prepared.items():
        assert item["labels"] == streamed[id_]["labels"]
        assert all((a == b).all() for a, b in zip(item["input_ids"], streamed[id_]["input_ids"], strict=True))


def test_source_stream_reads_labels_as_they_were_prepared(splits, csv_file, roberta_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    rows = [{"story": "One.", "tags": "b; a"}, {"story": "Two.", "tags": ""}]
    source = tmp_path / "a.csv"
    source.write_text("story,tags\n" + "".join(f"{row['story']},{row['tags']}\n" for row in rows))
    columns = Columns(text="story", label="tags", label_separator=";", problem_type=MULTI)
    features = datasets.Features(
        splits["train"].features | {"label": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    )
    part = splits["train"].select(range(2)).map(lambda _: {"label": [0]}, features=features)
    chunked = ChunkedDocuments(part, tokenizer, chunk_length=16, max_chunks=4)
    items = take(source_stream(str(source), chunked, ["a", "b"], columns, seed=0, buffer_size=1), 2)
    assert [item["labels"].tolist() for item in items] == [[1, 1], [0, 0]]
    source.write_text("story,tags\nOne.,A; b\n")
    with pytest.raises(ValueError, match=r"row 1: label 'A', expected one of a, b"):
        take(source_stream(str(source), chunked, ["a", "b"], columns, seed=0), 1)
    [item] = take(source_stream(str(source), chunked, ["a", "b"], columns, merge_labels=True, seed=0), 1)
    assert item["labels"].tolist() == [1, 1]
    assert item["id"] == "row-1"
    source.write_text("story|tags\nOne.|b\n", encoding="utf-16")
    options = ReadOptions(encoding="utf-16", delimiter="|")
    named = replace(columns, id="key")  # which a stream may lack
    [item] = take(source_stream(str(source), chunked, ["a", "b"], named, read_options=options, seed=0), 1)
    assert item["labels"].tolist() == [0, 1]
    source.write_text("story,tags\nOne.,A; b\n")
    with pytest.raises(ValueError, match="no column for --label_columns c"):
        take(source_stream(str(source), chunked, ["a", "b"], replace(columns, label_columns=["c"]), seed=0), 1)


@pytest.mark.slow
@pytest.mark.distributed
def test_streaming_gives_the_same_weights_in_one_process_in_two_and_after_resume(
    prepared_folder, roberta_folder, csv_file, tmp_path
):
    ways = {"one": (1, 8, "whole"), "two": (2, 4, "whole"), "resumed": (1, 8, "cut")}
    for name, (processes, batch, how) in ways.items():
        given = {**STREAM, "train_source": csv_file, "per_device_train_batch_size": batch}
        given |= {"gradient_accumulation_steps": 2}
        if how == "cut":  # stopped in the second pass over the 60 documents, after step 4 of 8
            done = train(prepared_folder, roberta_folder, tmp_path / name, processes=processes, **given)
            assert done.returncode == 0, done.stderr
            shutil.rmtree(tmp_path / name / "checkpoint-8")
            given["resume_from_checkpoint"] = "auto"
        done = train(prepared_folder, roberta_folder, tmp_path / name, processes=processes, **given)
        assert done.returncode == 0, done.stderr
    weights = {name: load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ways}
    for name, value in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], value, atol=1e-5, rtol=0)
        assert torch.equal(weights["resumed"][name], value)
    epochs = json.loads((tmp_path / "two" / "training_history.json").read_text())["epochs"]
    assert [epoch["step"] for epoch in epochs] == [4, 8]
    assert sum(epoch["documents_per_second"] * epoch["seconds"] for epoch in epochs) == pytest.approx(128, abs=0.1)


@pytest.mark.slow
def test_prepared_split_can_be_streamed_and_mistakes_are_named(prepared_folder, roberta_folder, tmp_path):
    done = train(prepared_folder, roberta_folder, tmp_path / "run", **STREAM)
    assert done.returncode == 0, done.stderr
    rows = tiny_rows()
    rows[3]["label"] = "Teens"
    wrong = write_csv(tmp_path / "wrong.csv", rows)
    for given, said in (
        (
            {**STREAM, "train_source": wrong},
            r"wrong\.csv.*row 4.*Teens.*General, Teen, Mature",
        ),
        ({**STREAM, "max_steps": 0}, "--max_steps"),
        ({"train_source": wrong}, "--streaming"),
    ):
        assert_refused(train(prepared_folder, roberta_folder, tmp_path / "other", **given), said)


def _bad_row(row: int) -> dict:
    raise ValueError("big.jsonl: row 4 has no text.")


def test_error_of_a_loaders_worker_is_one_sentence():
    loader = DataLoader(StreamedDocuments(lambda number: range(9), _bad_row, seed=0), 2, num_workers=1)
    with pytest.raises(ValueError, match="DataLoader worker process 0") as caught:
        next(iter(loader))
    assert one_paragraph(caught.value) == "big.jsonl: row 4 has no text."


@pytest.mark.slow
def test_a_run_streams_the_source_as_it_was_prepared(roberta_folder, tmp_path):
    rows = [row | {"label": "a| B" if k % 3 else "b" if k % 2 else ""} for k, row in enumerate(tiny_rows())]
    source = write_csv(tmp_path / "tags.csv", rows)
    columns = Columns(label_separator="|", problem_type=MULTI)
    given = {"labels": ["a", "b"], "columns": columns, "merge_labels": True, "keep": ["duplicate"]}
    prepare_dataset(str(source), str(roberta_folder), tmp_path / "data", **given)
    done = train(tmp_path / "data", roberta_folder, tmp_path / "run", **STREAM, train_source=source)
    assert done.returncode == 0, done.stderr
