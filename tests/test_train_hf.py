"""train_hf.py as a person runs it: what it leaves, how it resumes, what it refuses."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_hf
from modeling.training.model_card import model_card
from scripts.common.cli import USER_ERRORS
from scripts.training.run_record import command_without_tokens
from tests.conftest import LABELS, TRAINING, assert_refused, options, train, training_command
from tests.processes import ROOT, run, start, wait_for

pytestmark = pytest.mark.slow


def test_run_leaves_its_files(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "modeling_hierarchical_roberta.py",
        "training_history.json",
        "training.log",
        "metrics.json",
        "predictions_validation.csv",
        "predictions_test.csv",
        "runs",
        "README.md",
    }
    assert not [name for name in names if "partial" in name]


def test_history_has_every_epoch_and_the_best(finished_run):
    history = json.loads((finished_run / "training_history.json").read_text())
    assert set(history) == {"config", "epochs", "best", "stopped_early"}
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2, 3]
    last = history["epochs"][-1]
    assert {
        "step",
        "train_loss",
        "eval_loss",
        "eval_f1_macro",
        "eval_quadratic_kappa",
        "eval_severity_f1",
        "grad_norm",
        "eval_recall_Mature",
        "seconds",
        "documents_per_second",
        "chunks_per_second",
    } <= set(last)
    assert last["learning_rate"]["head"] == pytest.approx(2 * last["learning_rate"]["encoder"])
    assert history["best"]["eval_f1_macro"] == max(epoch["eval_f1_macro"] for epoch in history["epochs"])
    assert history["config"]["learning_rate"] == 1e-3
    assert history["config"]["data_fingerprint"]
    assert history["config"]["versions"]["torch"] == version("torch")
    documents = last["documents_per_second"] * last["seconds"]
    assert documents == pytest.approx(48, abs=0.01)


def test_metrics_and_predictions_are_of_the_best_model(finished_run):
    history = json.loads((finished_run / "training_history.json").read_text())
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert metrics["validation"]["f1_macro"] == pytest.approx(history["best"]["eval_f1_macro"])
    with open(finished_run / "predictions_test.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "label", "predicted", *LABELS]
    accuracy = sum(row["label"] == row["predicted"] for row in rows) / len(rows)
    assert accuracy == pytest.approx(metrics["test"]["accuracy"])
    for row in rows:
        scores = {label: float(row[label]) for label in LABELS}
        assert sum(scores.values()) == pytest.approx(1, abs=1e-5)
        assert row["predicted"] == max(scores, key=scores.get)


def test_model_card_describes_the_run(finished_run, roberta_folder):
    card = (finished_run / "README.md").read_text()
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert f"| f1_macro | {metrics['validation']['f1_macro']:.4f} | {metrics['test']['f1_macro']:.4f} |" in card
    assert re.search(r"\b16 documents", card)
    head = yaml.safe_load(card.split("---")[1])
    assert not {"base_model", "datasets"} & set(head)  # folders of this machine
    assert str(roberta_folder) not in card
    results = {result["dataset"]["split"]: result["metrics"] for result in head["model-index"][0]["results"]}
    for split, values in metrics.items():
        assert {m["name"]: m["value"] for m in results[split]}["Macro-F1"] == pytest.approx(
            values["f1_macro"], abs=1e-6
        )
    history = json.loads((finished_run / "training_history.json").read_text())
    for said in ("(?i)warm-?up", r"norm\D*1\b", "thread", "minutes", "balanced.*General"):
        assert re.search(said, card), said
    assert re.search(rf"best\D*epoch {history['best']['epoch']}\b", card)
    # Names on the hub stand in the head, whether or not a folder here has the same.
    known = {
        "encoder": "org/encoder",
        "encoder_is_on_hub": True,
        "data_sources": [{"name": "org/x", "is_on_hub": True}],
    }
    head = yaml.safe_load(model_card({**history, "config": history["config"] | known}, metrics, LABELS).split("---")[1])
    assert (head["base_model"], head["datasets"]) == ("org/encoder", ["org/x"])


def test_training_section_is_latex_with_the_metrics_of_the_best_checkpoint(finished_run):
    text = (finished_run / "training.tex").read_text()
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert text.startswith("\\paragraph{Training.}")
    for split in ("validation", "test"):
        assert f"{split}: macro-F1 {metrics[split]['f1_macro']:.3f}" in text
    assert "\\_" in text  # f1_macro, adamw_torch_fused
    assert not re.search(r"(?<!\\)[&%#_]", text)


def test_tensorboard_has_scalars_figure_graph_and_arguments(finished_run):
    [folder] = (finished_run / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    for name in (
        "loss",
        "grad_norm",
        "learning_rate_head",
        "learning_rate_encoder",
        "documents_per_second",
        "chunks_per_second",
        "padding_share",
        "peak_memory_gib",
    ):
        assert f"train/{name}" in tags["scalars"]
    assert {"eval/f1_macro", "eval/loss", "eval/recall_Mature"} <= set(tags["scalars"])
    assert len(events.Scalars("eval/f1_macro")) >= 3
    assert tags["images"] == ["confusion_matrix"]
    assert tags["graph"]
    assert any("arguments" in tag for tag in tags["tensors"])


def test_log_has_coverage_class_weights_and_optimizer_groups(finished_run):
    log = (finished_run / "training.log").read_text()
    for said in (
        r"max_chunks|\bcut",
        r"General 0\.67\b.*\b24\b",
        r"\bhead\b.*\d",
        r"Precision\W+fp32",
        r"epoch 3\.00\b.*f1_macro",
        r"epoch 3\b.*\b3\b.*loss\W+\d",
    ):
        assert re.search(said, log), said


def last_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return load_file(newest / "model.safetensors")


STEPS = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "chunk_policy": "random",
    "max_chunks": 2,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "dataloader_num_workers": 1,
}


def test_sigkill_and_sigterm_then_resume_give_the_weights_of_an_uninterrupted_run(
    prepared_folder, roberta_folder, tmp_path
):
    """With workers that load ahead, random chunks and dropout."""
    folders = prepared_folder, roberta_folder
    whole = train(*folders, tmp_path / "whole", **STEPS)
    assert whole.returncode == 0, whole.stderr
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        cut = tmp_path / number.name
        process = start(training_command(*folders, cut, **STEPS), cwd=ROOT, stderr=subprocess.DEVNULL)
        wait_for(cut, "checkpoint-4/checkpoint_manifest.json", process)  # of 8 steps an epoch
        process.send_signal(number)
        assert process.wait(60) == status
        assert not (cut / "checkpoint-16").exists(), "it was too fast to be stopped"
        resumed = train(*folders, cut, resume_from_checkpoint="auto", **STEPS)
        assert resumed.returncode == 0, resumed.stderr
        expected, found = last_weights(tmp_path / "whole"), last_weights(cut)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        histories = [json.loads((path / "training_history.json").read_text()) for path in (tmp_path / "whole", cut)]
        for ours, theirs in zip(*(history["epochs"] for history in histories), strict=True):
            assert ours["step"] == theirs["step"]
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-6)
            assert ours["eval_loss"] == theirs["eval_loss"]


def test_early_stopping_ends_a_run_and_resume_trains_no_further(prepared_folder, roberta_folder, tmp_path):
    rule = {"early_stopping_patience": 2, "early_stopping_min_delta": 1, "num_train_epochs": 9}
    done = train(prepared_folder, roberta_folder, tmp_path / "run", **rule)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert len(history["epochs"]) == 3
    assert history["stopped_early"]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    more = {**rule, "num_train_epochs": 12, "resume_from_checkpoint": "auto"}
    again = train(prepared_folder, roberta_folder, tmp_path / "run", **more)
    assert again.returncode == 0, again.stderr
    assert "--early_stopping_patience" in again.stderr
    assert len(json.loads((tmp_path / "run" / "training_history.json").read_text())["epochs"]) == 3
    again_weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], again_weights[name]) for name in weights)


def test_embedding_cache_of_a_frozen_encoder_changes_nothing(prepared_folder, roberta_folder, tmp_path):
    data = shutil.copytree(prepared_folder, tmp_path / "data")
    given = {"chunk_policy": "random", "max_chunks": 2, "dropout": 0.0, "class_weights": "none"}
    for name in ("first", "second"):
        done = train(data, roberta_folder, tmp_path / name, "--freeze_encoder", **given)
        assert done.returncode == 0, done.stderr
        assert (str(data / ".chunk_vectors") in done.stderr) == (name == "second")  # says whence they come
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    encoder = load_file(roberta_folder / "model.safetensors")
    assert all(
        torch.equal(first[f"encoder.{name}"], encoder[name]) for name in encoder if not name.startswith("pooler")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_dir": "nowhere"}, "nowhere"),
        ({"encoder": "no/such-encoder"}, "no/such-encoder"),
        ({"chunk_overlap": 600, "chunk_length": 512}, r"chunk_overlap.*600.*510"),
        ({"chunk_length": 65}, r"chunk_length.*65.*\b64\b"),
        ({"max_chunks": 0}, "max_chunks"),
        ({"class_weights": "General=1"}, "General, Teen, Mature"),
        ({"learning_rate": "fast"}, "learning_rate.*fast"),
        ({"learning_rat": 1}, "--learning_rat 1"),
        ({"pooling": "median"}, "pooling.*attention, mean, max"),
        ({"chunk_prefix": "lamp " * 20}, r"chunk_prefix.*\b16\b.*chunk_length"),
        ({"token_pooling": "first"}, "token_pooling.*mean, cls, last"),
        ({"config": "scripts/recipes/none.yaml"}, "scripts/recipes/none.yaml"),
        ({"resume_from_checkpoint": "nothing"}, "nothing"),
        ({"severity_weights": "1,2"}, r"severity_weights.*\b3\b|\b3\b.*weights"),
        ({"decision_metric": "recall_Matur=0.95"}, "decision_metric.*recall_Matur=0.95.*General, Teen, Mature"),
        ({"decision_metric": "f1"}, "decision_metric.*f1.*f1_macro, severity_f1"),
        ({"label_smoothing_factor": 2}, "label_smoothing_factor"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"save_only_model": True}, "save_only_model"),
        ({"pooling_size": -5}, "pooling_size"),
        (
            {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "chunk_policy": "random"},
            "(?i)persistent",
        ),
        ({"dropout": 1.5}, "(?i)dropout"),
        ({"metric_for_best_model": "f2"}, "metric_for_best_model.*loss, accuracy, f1_macro.*f2"),
    ],
)
def test_mistaken_option_is_named(arguments, message, prepared_folder, roberta_folder, tmp_path, call_command):
    given = training_command(prepared_folder, roberta_folder, tmp_path / "out", **arguments)[2:]
    with pytest.raises(USER_ERRORS) as error:
        call_command(train_hf.command, *given)
    assert re.search(message, " ".join(str(error.value).split()))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_mistake_ends_the_command_with_a_paragraph_and_status_1(prepared_folder, roberta_folder, tmp_path):
    command = training_command(prepared_folder, roberta_folder, tmp_path / "out", pooling="median")
    assert_refused(run(command, cwd=ROOT, cold=True), "pooling.*attention, mean, max")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_recipe_gives_defaults_and_the_command_line_overrides_them(prepared_folder, roberta_folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "learning_rate: 5.0e-4\nnum_train_epochs: 1\npooling: mean\nlr_scheduler_kwargs: {num_cycles: 0.5}\n"
    )
    arguments = {name: value for name, value in TRAINING.items() if name not in ("learning_rate", "num_train_epochs")}
    folders = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": tmp_path / "out"}
    command = [sys.executable, "train_hf.py", *options(config=recipe, pooling="max", **folders, **arguments)]
    done = run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "training_history.json").read_text())["config"]
    assert (config["learning_rate"], config["num_train_epochs"], config["pooling"]) == (5e-4, 1, "max")
    recipe.write_text("learning_rat: 1\n")
    assert_refused(run(command, cwd=ROOT), r"\blearning_rat\b")


def test_output_dir_of_an_earlier_run_is_refused(finished_run, prepared_folder, roberta_folder):
    done = train(prepared_folder, roberta_folder, finished_run)
    assert_refused(done, str(finished_run), "--overwrite_output_dir")
    assert (finished_run / "model.safetensors").exists()


def test_overwrite_keeps_the_earlier_run_where_the_new_one_cannot_begin(run_copy, roberta_folder):
    assert_refused(train("nowhere", roberta_folder, run_copy, "--overwrite_output_dir"), "nowhere")
    assert (run_copy / "model.safetensors").exists()
    assert list(run_copy.glob("checkpoint-*"))


def test_hub_token_is_not_written_down():
    assert command_without_tokens(["train_hf.py", "--hub_token", "hf_x", "--hub_token=hf_x", "--seed", "1"]) == (
        "train_hf.py --hub_token *** --hub_token=*** --seed 1"
    )


def test_non_finite_loss_ends_the_run_and_leaves_finite_checkpoints(prepared_folder, roberta_folder, tmp_path):
    done = train(
        prepared_folder,
        roberta_folder,
        tmp_path / "run",
        learning_rate="1e30",
        warmup_steps=0,
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    assert_refused(done, "nan_loss")
    for weights in (load_file(path) for path in (tmp_path / "run").glob("checkpoint-*/model.safetensors")):
        assert all(torch.isfinite(value).all() for value in weights.values())


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "scripts/recipes").glob("*.yaml")))
def test_every_recipe_is_read(recipe, prepared_folder, tmp_path, call_command):
    given = {"encoder": "no/such", "dataset_dir": prepared_folder, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match="no/such"):
        call_command(train_hf.command, config=ROOT / "scripts/recipes" / recipe, **given)
