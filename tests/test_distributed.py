"""Two processes compute what one does; torch's own launcher starts some of them."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import launched, train, training_command
from tests.processes import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# Without clipping, which would hide a gradient of the wrong size.
EXACT = {"dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 2, "max_grad_norm": 0}


def test_weights_do_not_depend_on_batching_and_number_of_processes(prepared_folder, roberta_folder, tmp_path):
    # 48 training documents: two processes of 5 x 2 leave a last step that does not divide.
    ways = {"one": (1, 20, 1), "accumulated": (1, 1, 20), "two": (2, 5, 2)}
    weights, histories, predictions = {}, {}, {}
    for name, (processes, batch, accumulation) in ways.items():
        given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        given |= {"per_device_eval_batch_size": 4, **EXACT}
        command = training_command(prepared_folder, roberta_folder, tmp_path / name, **given)
        done = run(command if processes == 1 else launched(command, processes), cwd=ROOT, cold=processes > 1)
        assert done.returncode == 0, done.stderr
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        histories[name] = json.loads((tmp_path / name / "training_history.json").read_text())
        with open(tmp_path / name / "predictions_test.csv", encoding="utf-8") as file:
            predictions[name] = [row["id"] for row in csv.DictReader(file)]
    for name in ("accumulated", "two"):
        for key, value in weights["one"].items():
            torch.testing.assert_close(weights[name][key], value, atol=1e-5, rtol=0)
        assert predictions[name] == predictions["one"]
        for ours, theirs in zip(histories[name]["epochs"], histories["one"]["epochs"], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
            assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)
            for epoch in (ours, theirs):
                assert epoch["documents_per_second"] * epoch["seconds"] == pytest.approx(48, abs=0.01)
            assert sum(ours[f"eval_support_{label}"] for label in ("General", "Teen", "Mature")) == 6


def test_two_processes_resume_to_the_same_bits(prepared_folder, roberta_folder, tmp_path):
    given = {"dropout": 0.2, "chunk_policy": "random", "max_chunks": 2, "per_device_train_batch_size": 4}
    whole = train(prepared_folder, roberta_folder, tmp_path / "whole", processes=2, **given)
    assert whole.returncode == 0, whole.stderr
    [first, last] = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(first, tmp_path / "resumed" / first.name)
    resumed = train(
        prepared_folder, roberta_folder, tmp_path / "resumed", processes=2, resume_from_checkpoint="auto", **given
    )
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(last / "model.safetensors")
    found = load_file(tmp_path / "resumed" / last.name / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
