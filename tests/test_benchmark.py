"""What is measured against is the same model: the padded loop gives our logits, at more cost."""

import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from data.collator import DocumentCollator
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import plan_encoder_batches
from scripts.benchmark import worker
from scripts.benchmark.__main__ import parse_arguments
from scripts.benchmark.meter import Meter
from scripts.benchmark.padded_loop import PaddedCollator, PaddedLoop
from scripts.benchmark.synthetic_documents import evenness, topic_documents
from scripts.benchmark.table import draw, markdown
from tests.conftest import SENTENCES, assert_refused, run_command
from tests.tiny_training import SplitLengths


def test_the_padded_loop_is_the_same_mathematics(roberta_model):
    padded = PaddedLoop(roberta_model.config)
    padded.load_state_dict(roberta_model.state_dict())
    documents = [SplitLengths()[i] for i in range(6)]
    pad = roberta_model.config.encoder_config.pad_token_id
    ours = roberta_model.eval()(**DocumentCollator(pad)(documents))
    theirs = padded.eval()(**PaddedCollator(pad, max_chunks=5, chunk_length=16)(documents))
    torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.chunk_weights, ours.chunk_weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("system", ["ours", "ours, fp32", "padded loop, gradient checkpointing", "bare encoder"])
def test_a_system_trains_a_pass_and_says_what_it_took(roberta_folder, tmp_path, system):
    (tmp_path / "texts.json").write_text(json.dumps([" ".join(SENTENCES * n) for n in (1, 6, 3, 2)]))
    spec = {
        "system": system,
        "documents": str(tmp_path / "texts.json"),
        "encoder": str(roberta_folder),
        "chunk_length": 32,
        "max_chunks": 4,
        "batch": 2,
    }
    took = (worker.bare_encoder if system == "bare encoder" else worker.train)(spec)
    assert took["documents"] == 4
    assert took["seconds"] > 0
    assert 4 <= took["chunks"] <= 16
    assert took["chunks"] < took["tokens"] <= 16 * 32


def test_a_frozen_encoders_epochs_are_told_apart(roberta_folder, tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps([" ".join(SENTENCES * n) for n in (1, 6, 3, 2)]))
    spec = {"documents": str(tmp_path / "texts.json"), "encoder": str(roberta_folder), "chunk_length": 32}
    took = worker.frozen_encoder({**spec, "max_chunks": 4, "batch": 2})
    assert took["seconds"] > took["later_seconds"] > 0


def test_processes_finish_together():
    """Lengths spread as the films' are, in a step of 16 documents a process."""
    lengths = np.random.default_rng(0).lognormal(9.5, 0.4, 700).astype(int)
    for ranks in (2, 8, 64, 1024):
        even = evenness(lengths, ranks)
        assert even["dealt out"] > 0.95
        assert even["dealt out"] > even["random"]


def test_reports_have_topics_of_very_different_frequencies(tmp_path):
    documents = topic_documents(1500, 60)
    assert documents == topic_documents(1500, 60)
    counts = Counter(topic for document in documents for topic in document["label"])
    assert len(counts) == 60
    assert counts.most_common(1)[0][1] > 20 * min(counts.values())
    numbers = Counter(len(document["label"]) for document in documents)
    assert {0, 1, 2} <= set(numbers)
    assert numbers[1] > 1000
    done = run_command(
        "scripts.benchmark.synthetic_documents", documents=20, topics=3, output=tmp_path / "topics.jsonl"
    )
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "topics.jsonl").read_text().splitlines()]
    assert written == topic_documents(20, 3)
    wrong = run_command("scripts.benchmark.synthetic_documents", topics=0, output=tmp_path / "none.jsonl")
    assert_refused(wrong, "--topics")


@pytest.mark.parametrize(("kind", "documents_at_once"), [("like", 4), ("very uneven", 4), ("very uneven", 1)])
def test_little_of_what_is_encoded_is_padding(kind, documents_at_once):
    """Documents of 1 to 6 chunks as chunk_bounds makes them: near-equal within a document, any length between them."""
    rng = np.random.default_rng(1)
    real = padding = 0
    for _ in range(50):
        lengths = []
        for _ in range(documents_at_once):
            count = int(rng.integers(20, 60)) if kind == "like" else int(rng.integers(1, 7))
            mean = 245 if count > 1 else int(rng.integers(20, 256))
            lengths += rng.integers(int(mean * 0.85), mean + 1, count).tolist()
        for rows in plan_encoder_batches(lengths, token_budget=2048, batch_cost=64):
            longest = max(lengths[row] for row in rows)
            real += sum(lengths[row] for row in rows)
            padding += sum(longest - lengths[row] for row in rows)
    assert padding / (real + padding) < (0.05 if kind == "like" else 0.1)


def test_the_meter_sees_memory_that_was_freed_again():
    meter = Meter(torch.device("cpu"))
    meter.start()
    torch.ones(64 * 2**20, dtype=torch.uint8)
    meter.stop()
    assert 60 < meter.result()["peak_mib"] < 200


def test_the_table_and_the_picture(tmp_path):
    took = {"seconds": 2.0, "peak_mib": 100.0, "documents": 8, "tokens": 1000, "chunks": 49}
    slow = took | {"seconds": 20.0, "peak_mib": 500.0}
    results = {
        "mix": {"ours": took, "padded loop": slow},
        "frozen": {"frozen encoder": took | {"later_seconds": 0.01}},
        "ranks": {"64": {"dealt out": 0.98, "random": 0.8}},
    }
    for chunks in (5, 10, 20, 50, 200):
        results[f"growth {chunks}"] = {"ours": took | {"seconds": 0.1 * chunks}}
    text = markdown(results)
    assert "| padded loop | 20.00 | 0.40 | 50 | 500 | 10.00 | 5.00 |" in text
    for words in (r"\b1\.000\b", r"\b200 chunks\b.*\b20\b.*\b1\.00\b", r"\b200 (times|×)"):
        assert re.search(words, text), words
    assert "| 64 | 0.980 | 0.800 |" in text
    draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_wrong_options_are_named(monkeypatch):
    required = ["--encoder", "x", "--output_dir", "y"]
    for given, message in ((["--scenarios", "speed"], "--scenarios"), (["--rounds", "0"], "--rounds")):
        monkeypatch.setattr(sys, "argv", ["benchmark", *required, *given])
        with pytest.raises(ValueError, match=message):
            parse_arguments()
