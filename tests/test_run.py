"""scripts.run: one's own documents from a file to a report, and the recipe that it chooses."""

import json
import signal
import subprocess
import sys

import pytest

from data.prepared_dataset import load_prepared
from modeling.training.checkpointing import find_checkpoint
from scripts.run import choose_recipe
from scripts.training.output_dir import lock_output_dir
from tests.conftest import LABELS, options, run_command, tiny_rows, write_csv
from tests.processes import start, wait_for

TINY = {"recipe": "scripts/recipes/smoke.yaml", "chunk_length": 16, "max_chunks": 4, "bf16": False, "cpu_threads": 1}


def test_run_goes_from_a_file_to_a_report_and_reuses_what_is_done(csv_file, roberta_folder, tmp_path):
    output_dir = tmp_path / "run"
    given = {
        "source": csv_file,
        "labels": ",".join(LABELS),
        "encoder": roberta_folder,
        "output_dir": output_dir,
        **TINY,
    }
    done = run_command("scripts.run", **given)
    assert done.returncode == 0, done.stderr
    assert "smoke.yaml" in done.stdout
    metrics = json.loads((output_dir / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["model"]["f1_macro"]["value"] <= 1
    assert (output_dir / "report" / "report.html").is_file()
    assert (output_dir / "model.safetensors").is_file()
    assert json.loads((output_dir / "dataset" / "manifest.json").read_text(encoding="utf-8"))["labels"] == LABELS

    others = write_csv(tmp_path / "others.csv", tiny_rows(seed=1))
    refused = run_command("scripts.run", **{**given, "source": others})
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert (output_dir / "model.safetensors").is_file()

    replaced = run_command("scripts.run", "--overwrite", **{**given, "source": others})
    assert replaced.returncode == 0, replaced.stderr
    history = json.loads((output_dir / "training_history.json").read_text(encoding="utf-8"))
    manifest = json.loads((output_dir / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    assert history["config"]["data_fingerprint"] == manifest["data_fingerprint"]
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2]


def test_run_takes_the_options_of_preparation(csv_file, roberta_folder, tmp_path):
    rows = [{"id": row["id"], "body": row["text"], "label": row["label"]} for row in tiny_rows()]
    rows[3]["label"] = ""
    given = {
        "source": write_csv(tmp_path / "s.csv", rows),
        "encoder": roberta_folder,
        "output_dir": tmp_path / "run",
        **TINY,
    }
    assert "--text_column" in run_command("scripts.run", "--dry_run", **given).stderr
    assert "--drop" in run_command("scripts.run", "--dry_run", text_column="body", **given).stderr
    planned = run_command("scripts.run", "--dry_run", text_column="body", drop="missing_label", **given)
    assert planned.returncode == 0, planned.stderr
    manifest = json.loads((tmp_path / "run" / "dataset" / "manifest.json").read_text(encoding="utf-8"))
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(rows) - 1


def test_mistaken_option_and_dry_run_leave_no_run(csv_file, roberta_folder, tmp_path):
    given = {"source": csv_file, "encoder": roberta_folder, "output_dir": tmp_path / "run", **TINY}
    mistaken = run_command("scripts.run", "--num_train_epoch", "3", **given)
    assert mistaken.returncode == 1
    assert "--num_train_epoch" in mistaken.stderr
    assert not (tmp_path / "run" / "dataset").exists()
    planned = run_command("scripts.run", "--dry_run", **given)
    assert planned.returncode == 0, planned.stderr
    assert "epoch" in planned.stdout
    assert not (tmp_path / "run" / "report").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_training_before_the_command(csv_file, roberta_folder, tmp_path, number, status):
    output_dir = tmp_path / "run"
    endless = {
        "num_train_epochs": 1000,
        "save_steps": 1,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    given = {"source": csv_file, "encoder": roberta_folder, "output_dir": output_dir, **TINY, **endless}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = start([sys.executable, "-m", "scripts.run", *options(**given)], **pipes)
    wait_for(output_dir, "checkpoint-*")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert find_checkpoint(str(output_dir), "auto")
    with lock_output_dir(output_dir):  # nobody trains there any more
        pass


@pytest.mark.parametrize(
    ("on_gpu", "most_tokens", "name", "options"),
    [
        (False, 10**6, "upper_layers_cpu.yaml", {"num_train_epochs": 34, "early_stopping_patience": 11}),
        (False, 10, "films_cpu.yaml", {}),
        (True, 10**6, "roberta_base.yaml", {"max_chunks": 1}),
    ],
)
def test_the_recipe_follows_from_device_and_lengths(prepared_folder, monkeypatch, on_gpu, most_tokens, name, options):
    monkeypatch.setattr("scripts.run.MAX_TOKENS_TO_TRAIN_ON_A_CPU", most_tokens)
    recipe, chosen, reason = choose_recipe(load_prepared(str(prepared_folder))[1]["splits"]["train"], on_gpu)
    assert recipe.endswith(name)
    assert chosen == options
    assert "documents" in reason
