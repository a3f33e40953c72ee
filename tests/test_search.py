"""The search: a resumable study in a file, pruned trials, the best one as a recipe that train_hf.py takes."""

import csv
import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import yaml

from scripts.common.cli import Terminated
from scripts.hpo.space import read_space
from scripts.hpo.trials import InterruptionCallback
from tests.conftest import TRAINING, assert_refused, options, run_command, train
from tests.processes import ROOT, start

pytestmark = pytest.mark.slow


def arguments_of(folder, encoder, output_dir, space: dict, **arguments) -> dict:
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(space))
    given = {
        **TRAINING,
        "freeze_encoder": True,
        "num_train_epochs": 3,
        "dropout": 0.0,
        "max_chunks": 99,
        "lr_scheduler_type": "linear",
    }
    return given | {"space": path, "dataset_dir": folder, "encoder": encoder, "output_dir": output_dir, **arguments}


def search(*given, **arguments):
    return run_command("scripts.search", **arguments_of(*given, **arguments))


def trials_of(output_dir) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{output_dir / 'study.db'}").trials


def age_heartbeats(output_dir) -> None:
    """As if a killed process had been killed an hour ago."""
    with sqlite3.connect(output_dir / "study.db") as study:
        study.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")
    study.close()


def test_search_resumes_prunes_and_writes_the_best_recipe(prepared_folder, roberta_folder, tmp_path):
    # One choice learns, the other cannot: after the first trials those that drew it fall behind.
    space = {"learning_rate": [1e-9, 3e-2], "lexical_features": [0, 20], "max_grad_norm": {"low": 0.5, "high": 2.0}}
    first = search(prepared_folder, roberta_folder, tmp_path / "s", space, num_trials=3)
    assert first.returncode == 0, first.stderr
    again = search(prepared_folder, roberta_folder, tmp_path / "s", space, num_trials=12)
    assert again.returncode == 0, again.stderr
    trials = trials_of(tmp_path / "s")
    assert [trial.number for trial in trials] == list(range(12))
    states = [trial.state.name for trial in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    recipe = yaml.safe_load((tmp_path / "s" / "best.yaml").read_text())
    best = max((trial for trial in trials if trial.value is not None), key=lambda trial: trial.value)
    assert {name: recipe[name] for name in space} == best.params
    assert recipe["num_train_epochs"] == 3
    assert recipe["lr_scheduler_type"] == "linear"
    # The model's options are those of the trial: with the words all is told, without them it is not.
    assert best.params["lexical_features"] == 20
    assert best.value == 1.0
    assert all(t.value < 1.0 for t in trials if t.value is not None and t.params["lexical_features"] == 0)
    assert not {"dataset_dir", "output_dir", "encoder", "save_strategy", "num_trials"} & set(recipe)
    told = (tmp_path / "s" / "search.md").read_text()
    assert re.search(rf"12 trials.*\b{states.count('COMPLETE')} complete.*\b{states.count('PRUNED')} pruned", told)
    assert "test split" in told
    # The recipe, run, is as good on validation as the trial was (without dropout, whose draws differ).
    done = train(
        prepared_folder,
        roberta_folder,
        tmp_path / "run",
        config=tmp_path / "s" / "best.yaml",
        **{name: recipe[name] for name in ("learning_rate", "num_train_epochs", "max_chunks", "lr_scheduler_type")},
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "run" / "training_history.json").read_text())
    assert history["best"]["eval_f1_macro"] == pytest.approx(best.value)
    with open(tmp_path / "run" / "predictions_validation.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_searches_that_share_a_study_draw_what_one_alone_draws(prepared_folder, roberta_folder, tmp_path):
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "max_grad_norm": {"low": 0.5, "high": 2.0}}
    given = {"num_trials": 4, "num_train_epochs": 1}
    alone = search(prepared_folder, roberta_folder, tmp_path / "alone", space, **given)
    assert alone.returncode == 0, alone.stderr
    with ThreadPoolExecutor() as pool:
        shared = [
            pool.submit(search, prepared_folder, roberta_folder, tmp_path / "shared", space, **given) for _ in range(2)
        ]
        for done in shared:
            assert done.result().returncode == 0, done.result().stderr
    drawn = [trial.params for trial in trials_of(tmp_path / "shared")]
    # Two processes may both begin the last trial that was asked for.
    assert len(drawn) in (4, 5)
    assert drawn[:4] == [trial.params for trial in trials_of(tmp_path / "alone")]
    assert len({params["learning_rate"] for params in drawn}) == len(drawn)


def test_a_signal_ends_a_trial_after_its_step_and_a_second_one_at_once():
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    callback = InterruptionCallback()
    with pytest.raises(Terminated), callback.listening():
        callback.on_step_end()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Terminated):
            callback.on_prediction_step()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGINT)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_interrupted_trial_is_run_again(prepared_folder, roberta_folder, tmp_path):
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
    given = prepared_folder, roberta_folder, tmp_path / "s", space
    long = {"num_train_epochs": 60, "early_stopping_patience": 0}
    command = [sys.executable, "-m", "scripts.search", *options(**arguments_of(*given, num_trials=3, **long))]

    def epochs_told() -> int:
        if not (tmp_path / "s" / "study.db").exists():
            return 0
        with sqlite3.connect(tmp_path / "s" / "study.db") as study:
            try:
                return study.execute("SELECT count(*) FROM trial_intermediate_values").fetchone()[0]
            except sqlite3.OperationalError:  # its tables are being created
                return 0

    statuses = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
    for number, status in statuses.items():
        before = epochs_told()
        with start(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and epochs_told() == before:
                time.sleep(0.02)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert process.returncode == status, said
    assert [trial.state.name for trial in trials_of(tmp_path / "s")] == ["FAIL", "FAIL", "RUNNING"]
    age_heartbeats(tmp_path / "s")
    done = search(*given, num_trials=3, **long)
    assert done.returncode == 0, done.stderr
    trials = trials_of(tmp_path / "s")
    assert [trial.state.name for trial in trials][:4] == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert len({trial.params["learning_rate"] for trial in trials[:4]}) == 1
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials) == 3
    assert "3 trials" in (tmp_path / "s" / "search.md").read_text()


def test_last_trial_that_was_killed_is_run_again_and_no_other(prepared_folder, roberta_folder, tmp_path):
    space = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}
    given = prepared_folder, roberta_folder, tmp_path / "s", space
    done = search(*given, num_trials=1, num_train_epochs=1)
    assert done.returncode == 0, done.stderr
    # What a kill leaves: a trial that runs, whose heart beat until a moment ago.
    with sqlite3.connect(tmp_path / "s" / "study.db") as study:
        study.execute("UPDATE trials SET state = 'RUNNING'")
        study.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-57 seconds')")
    study.close()
    done = search(*given, num_trials=1, num_train_epochs=1)
    assert done.returncode == 0, done.stderr
    killed, again = trials_of(tmp_path / "s")
    assert [killed.state.name, again.state.name] == ["FAIL", "COMPLETE"]
    assert killed.params == again.params
    assert "1 trials" in (tmp_path / "s" / "search.md").read_text()


def test_study_that_cannot_be_read_is_named(prepared_folder, roberta_folder, tmp_path):
    given = prepared_folder, roberta_folder, tmp_path / "s", {"max_grad_norm": [1.0, 2.0]}
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.db").write_text("not a database, but long enough to be read as one" * 99)
    assert_refused(search(*given, num_trials=1), "study.db", "not a database")
    (tmp_path / "s" / "study.log").touch()
    assert_refused(search(*given, num_trials=1), "study.log", "output_dir")


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"chunk_length": [16, 32]}, "chunk_length"),
        ({"learning_rate": {"low": 1.0, "high": 0.1}}, "learning_rate"),
        ({"learning_rate": 3}, "learning_rate"),
        ([1, 2], "space.yaml"),
    ],
)
def test_impossible_space_is_named(tmp_path, space, said):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    with pytest.raises(ValueError, match=said):
        read_space(str(tmp_path / "space.yaml"))


def test_space_takes_numbers_spelled_as_in_a_recipe(tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: {low: 1e-5, high: 1e-3, log: true}\nweight_decay: [0, 1e-2]\n")
    space = read_space(str(tmp_path / "space.yaml"))
    trial = optuna.trial.FixedTrial({"learning_rate": 1e-4, "weight_decay": 0.01})
    assert {name: draw(trial) for name, draw in space.items()} == {"learning_rate": 1e-4, "weight_decay": 0.01}


def test_study_is_not_resumed_with_other_options(prepared_folder, roberta_folder, tmp_path):
    space = {"max_grad_norm": [1.0, 2.0]}
    done = search(prepared_folder, roberta_folder, tmp_path / "s", space, num_trials=1, num_train_epochs=1)
    assert done.returncode == 0, done.stderr
    for other in ({"num_train_epochs": 2}, {"per_device_train_batch_size": 2}, {"token_pooling": "cls"}):
        given = {"num_train_epochs": 1, **other}
        done = search(prepared_folder, roberta_folder, tmp_path / "s", space, num_trials=2, **given)
        assert_refused(done, str(tmp_path / "s"))
    same = {"num_train_epochs": 1, "token_pooling": "mean", "chunk_prefix": ""}  # what the encoder chose
    done = search(prepared_folder, roberta_folder, tmp_path / "s", space, num_trials=1, **same)
    assert done.returncode == 0, done.stderr


def test_best_recipe_keeps_the_given_recipe_and_options(prepared_folder, roberta_folder, tmp_path):
    odd = {"log_level": "info", "accelerator_config": {"non_blocking": False}}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**TRAINING, "freeze_encoder": True, "lexical_features": 7, **odd})
    )
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"learning_rate": [1e-3]}))
    words = [f"--config={tmp_path / 'recipe.yaml'}", "--max-grad-norm", "0.5", "--num_trials", "1"]
    given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": tmp_path / "s"}
    done = run_command("scripts.search", *words, space=tmp_path / "space.yaml", **given)
    assert done.returncode == 0, done.stderr
    best = yaml.safe_load((tmp_path / "s" / "best.yaml").read_text())
    told = ("lexical_features", "freeze_encoder", "max_grad_norm", "learning_rate")
    assert [best[name] for name in told] == [7, True, 0.5, 1e-3]
    assert best["accelerator_config"]["non_blocking"] is False
    assert "log_level" not in best


def test_the_features_that_select_chunks_are_not_searched(prepared_folder, roberta_folder, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"lexical_features": [7, 20]}))
    given = {"dataset_dir": prepared_folder, "encoder": roberta_folder, "output_dir": tmp_path / "s"}
    given |= {
        "chunk_policy": "lexical",
        "lexical_features": 7,
        "max_chunks": 2,
        "chunk_length": 16,
        "space": tmp_path / "space.yaml",
    }
    done = run_command("scripts.search", **given)
    assert done.returncode == 1
    assert "lexical_features" in done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"learning_rate": [1e-3]}))
    done = run_command("scripts.search", **given, freeze_encoder=True, num_trials=1, num_train_epochs=1)
    assert done.returncode == 0, done.stderr


def test_missing_space_is_named(prepared_folder, roberta_folder, tmp_path):
    done = run_command(
        "scripts.search", dataset_dir=prepared_folder, encoder=roberta_folder, output_dir=tmp_path, space="none.yaml"
    )
    assert_refused(done, "none.yaml")
