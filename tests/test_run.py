"""scripts.run: one's own documents from a file to a report, and the recipe that it chooses."""

import json

import pytest

from scripts.run import choose_recipe
from tests.conftest import LABELS, run_command, tiny_rows, write_csv


def test_run_goes_from_a_file_to_a_report_and_reuses_what_is_done(csv_file, roberta_folder, tmp_path):
    output_dir = tmp_path / "run"
    tiny = {"chunk_length": 16, "max_chunks": 4, "bf16": False, "cpu_threads": 1}
    given = {"source": csv_file, "labels": ",".join(LABELS), "encoder": roberta_folder, "output_dir": output_dir}
    smoke = {"recipe": "scripts/recipes/smoke.yaml", **tiny}
    done = run_command("scripts.run", **given, **smoke)
    assert done.returncode == 0, done.stderr
    assert "smoke.yaml" in done.stdout
    metrics = json.loads((output_dir / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 <= metrics["model"]["f1_macro"]["value"] <= 1
    assert (output_dir / "report" / "report.html").is_file()
    assert (output_dir / "model.safetensors").is_file()
    assert json.loads((output_dir / "dataset" / "manifest.json").read_text(encoding="utf-8"))["labels"] == LABELS

    others = write_csv(tmp_path / "others.csv", tiny_rows(seed=1))
    refused = run_command("scripts.run", **{**given, "source": others}, **smoke)
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr
    assert (output_dir / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("on_gpu", "most_tokens", "name", "options"),
    [
        (False, 10**6, "upper_layers_cpu.yaml", {"num_train_epochs": 34, "early_stopping_patience": 11}),
        (False, 10, "films_cpu.yaml", {}),
        (True, 10**6, "roberta_base.yaml", {"max_chunks": 1}),
    ],
)
def test_the_recipe_follows_from_device_and_lengths(prepared_folder, monkeypatch, on_gpu, most_tokens, name, options):
    monkeypatch.setattr("scripts.run.MOST_TOKENS_TO_TRAIN_ON_A_CPU", most_tokens)
    recipe, chosen, reason = choose_recipe(prepared_folder, on_gpu)
    assert recipe.endswith(name)
    assert chosen == options
    assert "documents" in reason
