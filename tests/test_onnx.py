"""Exports to ONNX predict what the pipeline predicts, in a process that has neither torch nor transformers."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, pipeline

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from scripts import export_onnx as command
from scripts.common.cli import run_main
from scripts.common.prediction import ResumableOutput
from scripts.hub.upload import stage, stage_onnx
from scripts.predict import main as predict_main
from tests.conftest import LABELS, options, run_command, shared_folder, tiny_rows
from tests.processes import ROOT, start_ranks

pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install -e '.[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra onnx: pip install -e '.[onnx]'")

from scripts.onnx import export, graphs
from scripts.onnx.predict_onnx import OnnxClassifier

# Encoder, and fields of the model's config; together they have every kind of pooling, features and policy.
MODELS = {
    "plain": ("roberta", {"chunk_policy": "head"}),
    "words": (
        "bert",
        {
            "chunk_policy": "lexical",
            "lexical_features": 30,
            "lexical_weighting": "tfidf",
            "pooling": "mean",
            "chunk_overlap": 4,
            "chunk_prefix": "The murder: ",
            "chunk_length": 24,
            "token_pooling": "last",
            "encoder_weight": 0.7,
            "lexical_weight": 1.5,
            "class_biases": [2.0, 0.0, -2.0],
        },
    ),
    "transformer": (
        "roberta",
        {
            "chunk_transformer_layers": 1,
            "lexical_features": 20,
            "pooling_size": 8,
            "temperature": 1.7,
            "chunk_policy": "head_tail",
            "token_pooling": "cls",
            "max_chunks": 5,
        },
    ),
    "equal lengths": ("bert", {"pooling": "max", "chunk_policy": "random", "equal_lengths": True}),
}
TEXTS = [
    *(
        "",
        " \n",
        "murder",
        "A short one.",
        "😀" * 30,
        "".join(tiny_rows()[0]["text"].split()),
        "שלום עולם " * 9,
        "space at the end ",
    ),
    *("e\u0301t " * 30, unicodedata.normalize("NFD", "Élève très fatigué. " * 20), "Two\n\nparagraphs. " * 30),
    *(row["text"] for row in tiny_rows()[:12]),
    " ".join(row["text"] for row in tiny_rows()[:6]),
]


def build(name: str, encoders: dict[str, Path], folder: Path) -> None:
    """A model whose scores depend on what it reads, saved in folder/run, and its export in folder/onnx."""
    encoder, fields = MODELS[name]
    torch.manual_seed(3)
    fields = {"chunk_length": 16, "max_chunks": 4, "id2label": dict(enumerate(LABELS)), **fields}
    equal_lengths = fields.pop("equal_lengths", False)
    model = HierarchicalRobertaForSequenceClassification.from_encoder(str(encoders[encoder]), **fields)
    model.config.equal_lengths = model.config.equal_lengths or equal_lengths
    with torch.no_grad():
        for part in (model.encoder, model.pooling, model.classifier):
            for weight in part.parameters():
                weight.mul_(4 if weight.dim() > 1 else 1)
    model.vector_mean.normal_()
    model.vector_scale.uniform_(0.5, 2)
    tokenizer = AutoTokenizer.from_pretrained(encoders[encoder])
    if model.lexical is not None:
        ids = tokenizer("The boat came in late. Nobody spoke of it, of a murder.", add_special_tokens=False)[
            "input_ids"
        ]
        num_features = model.config.lexical_features - 3  # the others stay unused
        features = list(dict.fromkeys(ids))
        if model.lexical.pairs is not None:
            vocab_size = len(model.lexical.feature_of_token)
            pairs = [vocab_size + a * vocab_size + b for a, b in pairwise(ids)]
            features = [each for both in zip(features, dict.fromkeys(pairs), strict=False) for each in both]
        features = torch.tensor(features[:num_features])
        model.lexical.set_weights(
            features, torch.randn(3, len(features)), torch.randn(3), torch.rand(len(features)) + 0.5
        )
    model.save_pretrained(folder / "run")
    tokenizer.save_pretrained(folder / "run")
    export.export_onnx(str(folder / "run"), folder / "onnx")


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory, roberta_folder, bert_folder) -> Path:
    encoders = {"roberta": roberta_folder, "bert": bert_folder}
    name = f"onnx {request.param}"
    return shared_folder(tmp_path_factory, name, lambda folder: build(request.param, encoders, folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, roberta_folder) -> Path:
    encoders = {"roberta": roberta_folder}
    return shared_folder(tmp_path_factory, "onnx plain", lambda folder: build("plain", encoders, folder))


def run_alone(folder: Path, code: str, *arguments: str) -> str:
    """Standard output of code in a fresh process outside the project, where torch, transformers and the project cannot be
    imported."""
    blocked = ["torch", "transformers", "huggingface_hub", "onnx", "onnxscript", "modeling", "scripts", "data"]
    code = f"import sys\nsys.modules.update(dict.fromkeys({blocked}))\nsys.path.insert(0, sys.argv[1])\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(results: list[dict], expected: list[dict]) -> None:
    def evidence_of(result: dict) -> dict[tuple, float]:
        # Of chunks that make no difference, rounding decides which are shown.
        return {(e["start"], e["end"], e["text"]): e["score"] for e in result["evidence"] if abs(e["score"]) > 1e-4}

    for text, found, result in zip(TEXTS, results, expected, strict=True):
        assert found["scores"] == pytest.approx(result["scores"], abs=1e-4), text
        for name in ("label", "num_chunks", "num_encoded_chunks", "truncated"):
            assert found[name] == result[name], (text, name)
        assert evidence_of(found) == pytest.approx(evidence_of(result), abs=1e-4), text


def test_predictions_are_those_of_the_pipeline_without_torch(exported):
    code = (
        "import json\nfrom predict_onnx import OnnxClassifier\nclassify = OnnxClassifier()\n"
        "texts = json.loads(sys.argv[2])\n"
        "print(json.dumps([classify(texts, evidence=9), [classify(text, evidence=9)[0] for text in texts]]))"
    )
    batched, alone = json.loads(run_alone(exported / "onnx", code, json.dumps(TEXTS)))
    expected = pipeline("text-classification", model=str(exported / "run"), trust_remote_code=True)(TEXTS, evidence=9)
    assert np.std([list(result["scores"].values()) for result in expected], axis=0).min() > 0.01
    assert {result["num_chunks"] for result in expected} >= {1, 3, 4}
    is_decided = [result["score"] < max(result["scores"].values()) for result in expected]
    assert any(is_decided) == exported.name.endswith("words")  # the one with class biases
    assert_same(batched, expected)
    assert_same(alone, expected)


def test_chunks_of_different_lengths_are_kept_apart_where_padding_matters(plain):
    classify, masks = OnnxClassifier(plain / "onnx"), []
    encode = classify.encoder.run
    classify.encoder = SimpleNamespace(
        run=lambda _, inputs: masks.append(inputs["attention_mask"]) or encode(None, inputs)
    )
    for equal_lengths in (False, True):
        classify.config["equal_lengths"] = equal_lengths
        masks.clear()
        classify(TEXTS)
        assert all(mask.all() for mask in masks) == equal_lengths


def test_the_command_prints_a_line_for_each_document(plain, tmp_path):
    rows = tiny_rows()[:3]
    (tmp_path / "story.txt").write_text(rows[0]["text"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    call = [sys.executable, str(plain / "onnx" / "predict_onnx.py")]
    files = [str(tmp_path / name) for name in ("story.txt", "rows.jsonl")]
    done = subprocess.run([*call, *files, "--evidence", "1"], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["story", rows[1]["id"], rows[2]["id"]]
    assert list(lines[0]) == ["id", "label", "scores", "num_chunks", "num_encoded_chunks", "truncated", "evidence"]
    assert lines[0]["scores"] == pytest.approx(OnnxClassifier(plain / "onnx")(rows[0]["text"])[0]["scores"], abs=1e-6)
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    for wrong in ("none.txt", "wrong.jsonl", "wide.txt"):
        (tmp_path / "wrong.jsonl").write_text('{"txt": "a"}\n')
        done = subprocess.run([*call, str(tmp_path / wrong)], capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr, wrong in done.stderr) == (1, False, True)


def test_inputs_are_taken_and_refused_as_by_the_pipeline(plain, monkeypatch):
    classify = OnnxClassifier(plain / "onnx")
    assert classify([]) == []
    assert next(classify(iter(TEXTS)))["label"] in LABELS
    for wrong in (None, 3, b"bytes", ["text", 3], "half \ud800 pair", {"text": "a"}):
        with pytest.raises(ValueError, match=r"\btext\b|surrogate"):
            classify(wrong)
    with pytest.raises(ValueError, match="evidence"):
        classify("text", evidence=-1)
    monkeypatch.setattr("onnxruntime.__version__", "1.20.1")
    with pytest.raises(ImportError, match=r"onnxruntime 1\.20\.1 .* 1\.22"):
        OnnxClassifier(plain / "onnx")


def test_int8_is_smaller_and_close(plain, tmp_path, caplog, call_command):
    caplog.set_level(logging.INFO, logger="export_onnx")
    call_command(command.main, model=plain / "run", output_dir=tmp_path / "int8", quantize="int8")
    assert "Quantized to int8" in caplog.text
    graph = (tmp_path / "int8" / "encoder.onnx").read_bytes()
    assert b"MatMulInteger" in graph
    assert str(ROOT).encode() not in graph  # the exporter writes stack traces
    assert "onnxruntime>=1.22" in (tmp_path / "int8" / "requirements.txt").read_text()
    exact, close = (OnnxClassifier(folder / name)(TEXTS) for folder, name in ((plain, "onnx"), (tmp_path, "int8")))
    difference = export.largest_difference(exact, close)
    assert 0 < difference < 0.3
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {path.name for path in (plain / "onnx").iterdir()}


def test_an_export_that_fails_leaves_nothing(plain, tmp_path, monkeypatch):
    def files() -> set[str]:
        return {path.name for path in tmp_path.rglob("*")}

    with monkeypatch.context() as patched:
        patched.setattr(graphs, "pool_tokens", lambda *_: torch.zeros(3).tolist()[5])
        with pytest.raises(ValueError, match=r"roberta\) cannot be exported to ONNX \(list index out of range"):
            export.export_onnx(str(plain / "run"), tmp_path / "out")
    assert files() == set()
    # What is written is checked: here it is another model's.
    for name in ("write_head", "write_encoder", "fuse"):
        monkeypatch.setattr(export, name, lambda *_: None)

    def write_other(model, tokenizer, folder):
        for path in (plain / "onnx").glob("*.*"):
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    monkeypatch.setattr(export, "write_predictor", write_other)
    changed: dict[str, float] = {}
    for name, value, words in (("temperature", 1.1, "differ from the model's by"), ("max_chunks", 3, "other chunks")):
        changed[name] = value
        with pytest.raises(ValueError, match=words):
            export.export_onnx(str(plain / "run"), tmp_path / "out")
        assert files() == set()
    changed.clear()
    export.export_onnx(str(plain / "run"), tmp_path / "out")
    assert "predict_onnx.py" in files()
    with pytest.raises(ValueError, match="already exists"):
        export.export_onnx(str(plain / "run"), tmp_path / "out")


def test_missing_packages_are_named_with_their_extra(tmp_path, monkeypatch, caplog, call_command):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    assert call_command(lambda: run_main(command.main), model=tmp_path, output_dir=tmp_path / "out") == 1
    assert "needs onnxscript: pip install -e '.[onnx]'" in caplog.text


# ---- scripts.predict ----


@pytest.fixture
def source(tmp_path) -> Path:
    """Documents to keep columns of, and two that cannot be classified."""
    rows = [{**row, "url": f"http://{row['id']}"} for row in tiny_rows()]
    rows[3:5] = [{"id": "none", "text": None}, {"id": "list", "text": [5]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_takes_an_export_as_it_takes_the_model(plain, source):
    done = [
        run_command("scripts.predict", model=plain / name, source=source, keep_columns="url", evidence=9)
        for name in ("run", "onnx")
    ]
    assert [each.returncode for each in done] == [0, 0], done[1].stderr
    expected, found = (lines_of(each.stdout) for each in done)
    assert [list(row) for row in found] == [list(row) for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert [row.get(name) for name in ("id", "error", "label", "metadata")] == [
            wanted.get(name) for name in ("id", "error", "label", "metadata")
        ]
        assert row.get("scores", {}) == pytest.approx(wanted.get("scores", {}), abs=1e-4)
    counts = [re.search(r"Classified .*? tokens", each.stderr)[0] for each in done]
    assert counts[0] == counts[1]


def test_predict_with_an_export_is_resumed(plain, source, tmp_path, monkeypatch, capsys, call_command):
    given = {"model": plain / "onnx", "source": source, "output": tmp_path / "out.jsonl"}
    with monkeypatch.context() as patched:
        patched.setattr(ResumableOutput, "merge", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            call_command(predict_main, **given)
    part = tmp_path / ".out.jsonl.parts" / "0.jsonl"
    expected = part.read_text()
    part.write_text("".join(expected.splitlines(keepends=True)[:10]) + '{"id": "torn')
    with pytest.raises(ValueError, match=r"another .*model"):
        call_command(predict_main, **{**given, "model": shutil.copytree(plain / "onnx", tmp_path / "other")})
    capsys.readouterr()
    call_command(predict_main, **given)
    assert (tmp_path / "out.jsonl").read_text() == expected
    assert f"Classified {len(lines_of(expected)) - 10} documents" in capsys.readouterr().err


@pytest.mark.distributed
def test_processes_share_the_documents_with_an_export(plain, source, tmp_path):
    done = run_command("scripts.predict", model=plain / "onnx", source=source)
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "scripts.predict", *options(model=plain / "onnx", source=source, output=output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    ranks = start_ranks([command] * 2, environment, cwd=ROOT, stderr=subprocess.PIPE)
    ends = [(rank.communicate(timeout=300)[1], rank.returncode) for rank in ranks]
    assert [status for _, status in ends] == [0, 0], ends
    alone, shared = lines_of(done.stdout), lines_of(output.read_text())
    assert [row["id"] for row in shared] == [row["id"] for row in alone]
    for row, wanted in zip(shared, alone, strict=True):
        assert row.get("scores", {}) == pytest.approx(wanted.get("scores", {}), abs=1e-5)
    assert f"Classified {len(alone) - 2} documents" in ends[0][0]


def test_what_predict_cannot_do_with_an_export_is_said(plain, source, tmp_path, monkeypatch, call_command):
    def refused(model: Path, **given) -> str:
        with pytest.raises(ValueError) as error:
            call_command(predict_main, model=model, source=source, **given)
        return str(error.value)

    assert "remove --precision bf16" in refused(plain / "onnx", precision="bf16")
    assert f"scripts.export_onnx --model {plain / 'run'} --quantize int8" in refused(plain / "run", precision="int8")
    half = shutil.copytree(plain / "onnx", tmp_path / "half")
    for name, content in (("encoder.onnx", b"torn"), ("config.json", None)):
        (half / name).unlink() if content is None else (half / name).write_bytes(content)
        assert "written by python -m scripts.export_onnx" in refused(half)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
    assert "pip install -e '.[onnx]'" in refused(plain / "onnx")


def test_what_is_pushed_of_an_export_is_the_export(plain, tmp_path):
    folder = shutil.copytree(plain / "onnx", tmp_path / "onnx", ignore=shutil.ignore_patterns("__pycache__"))
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    for private in ("story.txt", "predictions.jsonl", "hierarchical_roberta/chunking.cpython-311.pyc"):
        (folder / private).write_text("x")
    stage(tmp_path / "staged", plain / "run", plain / "run", None)
    stage_onnx(tmp_path / "staged", folder)
    staged = tmp_path / "staged" / "onnx"
    assert {path.relative_to(staged) for path in staged.rglob("*") if path.is_file()} == names
    assert (tmp_path / "staged" / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"--onnx .*run is no export"):
        stage_onnx(tmp_path / "staged", plain / "run")
