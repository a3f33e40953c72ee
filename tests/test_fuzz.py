"""Whatever comes in: an answer or an error for people, never a hang, a traceback or a NaN. HYPOTHESIS_PROFILE=nightly tries 10,000 cases of each."""

import csv
import gzip
import io
import json
import lzma
import math
import shutil
import unicodedata
import zipfile
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data.collator import DocumentCollator
from data.documents import Columns, look_alike_key, read_documents
from data.preparation import prepare_dataset
from data.readers import ReadOptions, Source
from modeling.hierarchical_roberta.chunking import Chunker, tokenize_batch
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from scripts.common.recipe import parse_with_recipe
from scripts.prepare_dataset import parse_arguments
from train_hf import DataArguments, HierarchicalTrainingArguments, ModelArguments

pytestmark = pytest.mark.slow

KINDS = (ModelArguments, DataArguments, HierarchicalTrainingArguments)


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
any_case = settings(suppress_health_check=CHECKS)


ANY_CHARACTERS = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Z", "Cc", "Cf", "Cn", "Co", "Cs"]))
TEXTS = st.one_of(
    st.text(),
    ANY_CHARACTERS,
    st.builds(lambda part, times: part * times, st.text(min_size=1, max_size=6), st.sampled_from([10, 500, 3000])),
    st.builds(
        lambda content, codec: content.decode(codec, "replace"),
        st.binary(max_size=200),
        st.sampled_from(["latin-1", "cp1252", "utf-8", "utf-16", "shift-jis", "koi8-r"]),
    ),
)


@pytest.fixture(scope="module")
def rate(_models, roberta_folder):
    return HierarchicalClassificationPipeline(
        model=_models["roberta"].eval(), tokenizer=AutoTokenizer.from_pretrained(roberta_folder)
    )


def check_result(result: dict, text: str) -> None:
    assert math.isclose(sum(result["scores"].values()), 1, abs_tol=1e-6)
    assert result["label"] in result["scores"]
    assert 1 <= result["num_chunks"] <= 4
    for evidence in result["evidence"]:
        assert text[evidence["start"] : evidence["end"]] == evidence["text"] != ""
        assert math.isfinite(evidence["score"])


@any_case
@given(text=TEXTS)
def test_any_text_is_classified_or_refused(rate, text):
    try:
        [result] = rate(text)
    except ValueError as error:
        assert "surrogate" in str(error)
        assert any("\ud800" <= character <= "\udfff" for character in text)
    else:
        check_result(result, text)


@pytest.mark.parametrize("part", ["a", "\u0301", "\x00", " ", "\n", "👩‍👩‍👧", "가", "ﷺ"])
def test_a_million_characters_are_classified(rate, part):
    text = (part * 1_000_000)[:1_000_000]
    check_result(rate(text)[0], text)


@any_case
@given(
    texts=st.lists(TEXTS.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)), min_size=1, max_size=3),
    chunk_length=st.integers(3, 64),
    overlap=st.integers(0, 70),
)
def test_any_text_can_be_trained_on(rate, texts, chunk_length, overlap):
    tokenizer = rate.tokenizer
    try:
        chunker = Chunker(tokenizer, chunk_length, overlap)
    except ValueError as error:
        assert "chunk" in str(error)
        return
    documents = []
    tokens = tokenize_batch([text[:2000] for text in texts], tokenizer)
    for ids, breaks in zip(tokens["input_ids"], tokens["token_break"], strict=True):
        spans = chunker.spans(len(ids), breaks)
        assert spans[0][0] == 0
        assert spans[-1][1] == len(ids)
        assert all(b[0] <= a[1] for a, b in pairwise(spans))  # nothing between two chunks
        documents.append({"labels": 0, "input_ids": [chunker.with_special_tokens(ids[a:b]) for a, b in spans[:6]]})
    batch = DocumentCollator(tokenizer.pad_token_id)(documents)
    assert batch["input_ids"].shape[1] <= chunk_length
    with torch.no_grad():
        output = rate.model(**batch)
    assert output.logits.isfinite().all()
    assert output.loss.isfinite()


NAMES = st.sampled_from(["text", "label", "id", "split", "group", "evidence", "Text", "", "x", "text"])
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), ANY_CHARACTERS,
    st.sampled_from(["train", "val", "test", "General", "Teen", "1", "1.0", '[{"start": 0, "end": 3}]']),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
CELLS = st.one_of(st.text(max_size=12), st.sampled_from(['"', "a,b", '"a', "a\r\nb", "\x00", "General", "train"]))


def jsonl(rows: list) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode("utf-8", "replace")


def csv_of(header: list[str], rows: list[list[str]], junk: bytes) -> bytes:
    return "\n".join(",".join(cells) for cells in [header, *rows]).encode("utf-8", "replace") + junk


TABLES = st.one_of(
    st.tuples(st.just("jsonl"), st.builds(jsonl, st.lists(st.dictionaries(NAMES, VALUES, max_size=6), max_size=6))),
    st.tuples(st.just("jsonl"), st.builds(jsonl, st.lists(VALUES, max_size=3))),
    st.tuples(
        st.sampled_from(["csv", "tsv"]),
        st.builds(
            csv_of,
            st.lists(NAMES, max_size=5),
            st.lists(st.lists(CELLS, max_size=5), max_size=6),
            st.sampled_from([b"", b"\xff", b'"', b"\xfe\xff\x00"]),
        ),
    ),
    st.tuples(st.sampled_from(["csv", "jsonl", "parquet", "txt", "tsv", "xml"]), st.binary(max_size=300)),
)


@any_case
@given(table=TABLES, errors=st.sampled_from(["strict", "replace"]))
def test_any_table_is_read_or_refused(tmp_path, table, errors):
    kind, content = table
    source = tmp_path / f"table.{kind}"
    source.write_bytes(content)
    try:
        documents, _ = read_documents(Source(str(source), ReadOptions(encoding_errors=errors)), Columns())
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(documents, datasets.Dataset)
        assert all(isinstance(row["text"], str) and row["label"] for row in documents)


WORDS = st.text(st.sampled_from("abz é“”’;\t|,\u200b\u3042"), max_size=12)


@any_case
@example(rows=[("a", "1"), ("\u200b", "1")], encoding="utf-8", delimiter=",", compression="", merge_labels=False, cut=0)
@given(
    rows=st.lists(
        st.tuples(WORDS, st.sampled_from(["Teen", " teen", "TEEN\u200b", "1", "1.0", "01", "-1", ""])), max_size=6
    ),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "cp932"]),
    delimiter=st.sampled_from(",;\t|"),
    compression=st.sampled_from(["", ".gz", ".zst", ".xz", ".zip"]),
    merge_labels=st.booleans(),
    cut=st.integers(0, 40),
)
def test_a_table_in_any_dress_is_read_as_it_is_or_refused(
    tmp_path, rows, encoding, delimiter, compression, merge_labels, cut
):
    content = io.StringIO()
    writer = csv.writer(content, delimiter=delimiter)
    writer.writerow(["text", "label"])
    writer.writerows(rows)
    data = content.getvalue().encode(encoding, "replace")
    texts = [row[0] for row in csv.reader(io.StringIO(data.decode(encoding), newline=""), delimiter=delimiter)][1:]
    source = compressed(tmp_path, data, compression)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) - cut])
    try:
        documents, _ = read_documents(
            Source(str(source), ReadOptions(encoding=encoding if encoding[:2] == "cp" else None)), Columns(),
            drop=["empty", "missing_label"], keep=[] if merge_labels else ["similar_label"], merge_labels=merge_labels,
        )  # fmt: skip
    except ValueError as error:
        assert str(error)
    else:
        assert cut or documents["text"] == [unicodedata.normalize("NFC", text) for text, (_, label) in zip(texts, rows, strict=True)
                                            if text.strip("\u200b \t\xa0") and label]  # fmt: skip
        assert not merge_labels or len(set(documents["label"])) == len(
            {look_alike_key(label) for label in documents["label"]}
        )


def compressed(folder: Path, data: bytes, suffix: str) -> Path:
    path = folder / f"table.csv{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("table.csv", data)
    else:
        pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}.get(suffix)
        path.write_bytes(pack(data) if pack else pa.compress(data, codec="zstd", asbytes=True))
    return path


PARTS = st.sampled_from(["train", "test", "val", "pos", "neg", "a b", ".hidden", "__MACOSX", "é"])
LEAVES = st.sampled_from(
    ["1.txt", "2.md", "3.TXT", "x.csv", "train.csv", "t.jsonl", "notes", "urls_pos.txt", "data.json"]
)


@any_case
@given(
    files=st.dictionaries(
        st.tuples(st.lists(PARTS, max_size=3), LEAVES).map(lambda parts: "/".join([*parts[0], parts[1]])),
        st.sampled_from([b"A text.", b"text,label\na,b\n", b'{"text": "a", "label": "b"}\n', b"", b"\xff"]), max_size=6,
    ),
    suffix=st.sampled_from(["", ".zip", ".tar.gz"]),
)  # fmt: skip
def test_every_file_of_any_folder_is_read_or_named(tmp_path_factory, files, suffix):
    folder = tmp_path_factory.mktemp("any") / "tree"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    path = str(folder)
    if suffix:
        path = shutil.make_archive(path, {".zip": "zip", ".tar.gz": "gztar"}[suffix], folder)
    try:
        source = Source(path)
        rows = list(source)
    except ValueError as error:
        assert str(error)
        return
    left_out = [name for name in source.found.unread if not name.endswith("(no rows)")]
    assert len(source.found.files) + len(left_out) == len(files)
    assert all(row.error or "id" in row.values or "text" in row.values for row in rows)


@settings(any_case, max_examples=60)  # each prepares a dataset
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"text": TEXTS, "label": st.sampled_from(["General", "Teen", "Mature", "", "Teens"])},
            optional={"split": st.sampled_from(["train", "validation", "test", ""]), "group": st.text(max_size=2)},
        ),
        max_size=40,
    ),
    drop=st.sampled_from(["", "missing_label,unknown_label,empty,duplicate", "duplicate"]),
)
def test_any_rows_are_prepared_or_refused(roberta_folder, tmp_path_factory, rows, drop):
    folder = tmp_path_factory.mktemp("any")
    (folder / "rows.jsonl").write_bytes(jsonl(rows))
    given_options = ["--source", str(folder / "rows.jsonl"), "--tokenizer", str(roberta_folder)]
    given_options += ["--output_dir", str(folder / "out"), "--encoding_errors", "replace", "--drop", drop]
    try:
        manifest = prepare_dataset(**parse_arguments(given_options))
    except ValueError as error:
        assert str(error)
        assert not (folder / "out").exists()
    else:
        assert manifest["splits"]["train"]["documents"] > 0


OPTIONS = st.sampled_from(
    ["chunk_length", "chunk_overlap", "max_chunks", "chunk_policy", "pooling", "pooling_size", "dropout", "live_chunks",
     "chunk_prefix", "token_pooling", "decision_metric",
     "learning_rate", "num_train_epochs", "class_weights", "warmup_steps", "lr_scheduler_type", "eval_strategy", "bf16",
     "per_device_train_batch_size", "gradient_accumulation_steps", "freeze_encoder", "freeze_layers", "max_loss_spike",
     "save_total_limit", "lr_scheduler_kwargs", "optim", "seed", "hub_strategy", "grace_seconds", "encoder", "save_steps",
     "metric_for_best_model", "report_to", "early_stopping_patience", "max_grad_norm", "logging_steps", "max_steps"]
)  # fmt: skip
SETTINGS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2000), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
    st.sampled_from(["head", "random", "auto", "mean", "cosine", "epoch", "steps", "balanced", "1e-4", "yes", "--seed"]),
)  # fmt: skip
RECIPES = st.one_of(
    st.dictionaries(OPTIONS, SETTINGS, max_size=5).map(yaml.safe_dump),
    st.dictionaries(st.text(max_size=6), SETTINGS, max_size=2).map(lambda d: yaml.dump(d, allow_unicode=True)),
    st.text(max_size=40),
    st.sampled_from(["!!python/object/apply:os.system ['true']", "- 1", "a: &x [*x]", "{", "seed: 2020-01-01", "\t"]),
)


@any_case
@given(recipe=RECIPES)
def test_any_recipe_is_taken_or_refused(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8", errors="replace")
    fixed = ["--encoder", "e", "--dataset_dir", "d", "--output_dir", str(tmp_path / "out"), "--use_cpu", "True"]
    try:
        model_args, _, args = parse_with_recipe(KINDS, ["--config", str(path), *fixed])
        names = ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy", "pooling", "pooling_size")
        geometry = (*names, "chunk_prefix", "token_pooling")
        given = {name: value for name in geometry if (value := getattr(model_args, name)) is not None}
        HierarchicalRobertaConfig(**given)
    except ValueError as error:
        assert str(error)
    else:
        assert args.per_device_train_batch_size >= 1
        assert model_args.chunk_overlap < model_args.chunk_length - 2
        assert model_args.max_chunks >= 1
