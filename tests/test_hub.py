"""What arrives on the hub, asserted on what it holds: our double of it, the real client, training in a process of its own."""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from modeling.training.checkpointing import commit_checkpoint, find_checkpoint
from scripts.hub.pusher import HubPusher
from scripts.hub.upload import stage
from tests.conftest import ROOT, TRAINING, launcher, options, tiny_rows, train
from tests.hub_repos import Repo
from tests.hub_server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.hub]

TOKEN = "hf_marker0123456789SECRETtoken"
MODES = pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])


@pytest.fixture
def server():
    with HubServer() as server:
        server.add_user("alice", token=TOKEN, orgs=["org"])
        server.add_user("bob", token="hf_bob")
        yield server


def push(
    server, home, data, encoder, output_dir, /, *extra, xet=False, token=TOKEN, wait=True, processes=1, **arguments
):
    """Train with --push_to_hub; the finished process, or the running one."""
    given = {"dataset_dir": data, "encoder": encoder, "output_dir": output_dir, **TRAINING, "hub_model_id": "org/model"}
    command = [*launcher(processes), "train_hf.py", *options(**(given | arguments)), "--push_to_hub", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **server.environment(home, token=token, xet=xet)}
    environment |= {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if not wait:
        return process
    said, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(command, process.returncode, said, said)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def last(server, branch="main"):
    return server.repos["org/model"].commits(branch)[-1]


def holds_the_end_of(commit, run: Path, checkpoint: bool = True) -> None:
    """The commit's root is the run's final model, and its last-checkpoint/ the run's newest checkpoint."""
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.json", "pipeline.py"):
        assert sha256(commit.read(name)) == sha256((run / name).read_bytes()), name
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    names = {name for name in commit.files if name.startswith("last-checkpoint/")}
    assert bool(names) == checkpoint
    for name in names:
        assert sha256(commit.read(name)) == sha256((newest / Path(name).name).read_bytes()), name
    if checkpoint:
        step = json.loads(commit.read("last-checkpoint/trainer_state.json"))["global_step"]
        assert step == int(newest.name.split("-")[1])


@MODES
def test_the_hub_holds_the_best_model_and_the_last_checkpoint(server, prepared_folder, roberta_folder, tmp_path, xet):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".env").write_text("PASSWORD=1")
    (run / ".cache").mkdir()
    (run / ".cache" / "junk").write_text("junk")
    extra = ("--hub_token", TOKEN)
    done = push(
        server, tmp_path / "home", prepared_folder, roberta_folder, run, *extra,
        xet=xet, token=None, hub_strategy="checkpoint", save_total_limit=1, num_train_epochs=3,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    commit = last(server)
    holds_the_end_of(commit, run)
    assert server.repos["org/model"].private
    allowed = {".gitattributes", "README.md", "training.tex", "training_history.json", "metrics.json", "config.json"}
    names = {name for name in commit.files if "/" not in name} - allowed
    assert all(name.endswith((".py", ".safetensors", ".json")) for name in names), names
    assert not any("predictions" in name or "training_args" in name or ".env" in name for name in commit.files)
    events = [name for name in commit.files if name.startswith("runs/")]
    assert events
    host = os.uname().nodename
    assert not any(host in name for name in events) or len(host) < 3
    # The secret is nowhere: not in what was pushed, nor in any file that the run left, nor in what it said.
    assert server.bytes_seen(TOKEN.encode()) == []
    assert TOKEN not in done.stdout
    for path in tmp_path.rglob("*"):
        if path.is_file() and tmp_path / "home" not in path.parents:
            assert TOKEN.encode() not in path.read_bytes(), path
    # Anyone who may read it can use it by its name alone.
    code = (
        "import json, sys\nfrom transformers import pipeline\n"
        "rate = pipeline('text-classification', model='org/model', trust_remote_code=True)\n"
        "print(json.dumps(rate(sys.argv[1])['scores']))\n"
    )
    text = tiny_rows()[0]["text"]
    environment = {**os.environ, **server.environment(tmp_path / "other", token=TOKEN, xet=xet), "PYTHONPATH": ""}
    for offline in ("0", "1"):
        environment["HF_HUB_OFFLINE"] = offline
        loaded = subprocess.run(
            [sys.executable, "-c", code, text],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
        )
        assert loaded.returncode == 0, loaded.stderr
        here = subprocess.run(
            [sys.executable, "-c", code.replace("org/model", str(run)), text],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        assert json.loads(loaded.stdout) == json.loads(here.stdout)


@pytest.mark.parametrize(("strategy", "folders"), [("end", set()), ("every_save", set()), ("all_checkpoints", {4, 8})])
def test_every_strategy_leaves_what_it_says(server, prepared_folder, roberta_folder, tmp_path, strategy, folders):
    given = {"hub_strategy": strategy, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 0, done.stdout
    commit = last(server)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    holds_the_end_of(commit, tmp_path / "run", checkpoint=strategy == "all_checkpoints")
    if strategy == "all_checkpoints":  # each push can be gone on from, not the last one only
        for earlier in server.repos["org/model"].commits("main")[1:]:
            assert "last-checkpoint/trainer_state.json" in earlier.files
    found = {name.split("/")[0] for name in commit.files if name.startswith("checkpoint-")}
    assert found == ({f"checkpoint-{step}" for step in steps} if folders else set())
    if strategy == "end":
        assert len(server.repos["org/model"].commits("main")) == 2  # the empty repo, and the end


def test_a_run_goes_on_from_the_hub_on_another_machine(server, prepared_folder, roberta_folder, tmp_path):
    given = {"hub_strategy": "checkpoint", "num_train_epochs": 3}
    whole = push(
        server, tmp_path / "h1", prepared_folder, roberta_folder, tmp_path / "whole", **given, hub_model_id="org/a"
    )
    assert whole.returncode == 0, whole.stdout
    process = push(
        server,
        tmp_path / "h2",
        prepared_folder,
        roberta_folder,
        tmp_path / "first",
        **given,
        wait=False,
        logging_steps=1,
    )
    server.wait_for("commit", count=len(server.requests_of("commit")) + 1, timeout=120)
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "first")
    done = push(
        server,
        tmp_path / "h3",
        prepared_folder,
        roberta_folder,
        tmp_path / "second",
        "--resume_from_checkpoint",
        "hub",
        **given,
    )
    assert done.returncode == 0, done.stdout
    assert "last-checkpoint" in done.stdout  # resumed from it
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "second"))
    assert all((expected[name] == found[name]).all() for name in expected)
    histories = [json.loads((tmp_path / name / "training_history.json").read_text()) for name in ("whole", "second")]
    assert histories[0]["best"] == histories[1]["best"]
    assert [epoch["step"] for epoch in histories[0]["epochs"]] == [epoch["step"] for epoch in histories[1]["epochs"]]
    holds_the_end_of(last(server), tmp_path / "second")


@MODES
@pytest.mark.parametrize(
    "fault", [{"status": 500, "nth": 1}, {"drop": True, "nth": 1}, {"status": 500, "nth": {1, 2, 3}}]
)
def test_a_push_that_failed_is_tried_again(server, prepared_folder, roberta_folder, tmp_path, fault, xet):
    server.faults.add("commit", **fault)
    given = {"hub_strategy": "checkpoint", "xet": xet}
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 0, done.stdout
    assert "failed" in done.stdout
    holds_the_end_of(last(server), tmp_path / "run")


def test_a_hub_that_refuses_in_mid_run_costs_the_exit_status_and_a_command_ends_the_job(
    server, prepared_folder, roberta_folder, tmp_path
):
    server.faults.add("commit", status=403)
    run = tmp_path / "run"
    given = {"hub_strategy": "checkpoint", "hub_timeout": 5}
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, run, **given)
    assert done.returncode == 1
    assert (run / "model.safetensors").is_file()
    [command] = re.findall(r"python -m scripts\.push_to_hub .*", done.stdout)
    assert len(server.repos["org/model"].commits("main")) == 1
    server.faults.clear()
    environment = {**os.environ, **server.environment(tmp_path / "home", token=TOKEN, xet=False)}
    ended = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    holds_the_end_of(last(server), run)


def test_a_hub_that_hangs_is_not_waited_for_without_bound(server, prepared_folder, roberta_folder, tmp_path):
    server.faults.add("commit", hang=True)
    given = {"hub_strategy": "every_save", "hub_timeout": 4}
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    server.release()
    assert done.returncode == 1
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert "python -m scripts.push_to_hub" in done.stdout


def test_a_slow_hub_gets_the_end_though_saves_are_faster(server, prepared_folder, roberta_folder, tmp_path):
    server.faults.add("commit", delay=3.0)
    given = {"hub_strategy": "checkpoint", "save_total_limit": 1, "num_train_epochs": 4}
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 0, done.stdout
    holds_the_end_of(last(server), tmp_path / "run")
    for commit in server.repos["org/model"].commits("main")[1:]:  # each is what was saved at its step
        step = json.loads(commit.read("last-checkpoint/trainer_state.json"))["global_step"]
        assert commit.message == "End of training" or re.search(rf"(?i)step {step}\b", commit.message)
        manifest = json.loads(commit.read("last-checkpoint/checkpoint_manifest.json"))
        for name, entry in manifest.items():
            assert sha256(commit.read(f"last-checkpoint/{name}")) == entry["sha256"]


def test_an_error_in_mid_run_leaves_what_was_saved_before_it_on_the_hub(server, tmp_path, monkeypatch, caplog):
    for name, value in server.environment(tmp_path / "home", token=TOKEN, xet=False).items():
        monkeypatch.setenv(name, value)
    run, state = tmp_path / "run", SimpleNamespace(global_step=4, best_model_checkpoint=None)
    for name in ("model.safetensors", "config.json", "trainer_state.json", "checkpoint_manifest.json"):
        (run / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        (run / "checkpoint-4" / name).write_text(json.dumps({"global_step": 4}))
    server.repos["org/model"] = Repo("org/model", True, "alice")

    def stopped_by(error: BaseException, grace_seconds: float) -> None:
        with suppress(type(error)), HubPusher(run, "org/model", "checkpoint", None, 60, grace_seconds) as pusher:
            pusher.on_save(None, state, None)
            raise error

    server.faults.add("commit", delay=1.0)
    stopped_by(KeyboardInterrupt(), 60)  # the second Ctrl-C: nothing is waited for
    assert any(record.levelname == "ERROR" for record in caplog.records)
    stopped_by(ValueError("anything"), 60)
    assert json.loads(last(server).read("last-checkpoint/trainer_state.json"))["global_step"] == 4


@pytest.mark.distributed
def test_two_processes_that_are_stopped_push_what_they_saved(server, prepared_folder, roberta_folder, tmp_path):
    server.faults.add("commit", delay=2.0)
    given = {"hub_strategy": "checkpoint", "num_train_epochs": 200, "early_stopping_patience": 0}
    given |= {"wait": False, "processes": 2}
    process = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    server.wait_for("commit", timeout=120)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    step = json.loads(last(server).read("last-checkpoint/trainer_state.json"))["global_step"]
    assert find_checkpoint(str(tmp_path / "run"), "auto").endswith(f"checkpoint-{step}"), said
    assert re.search(rf"step {step}\b", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_stopped_in_a_push_leaves_the_hub_whole(server, prepared_folder, roberta_folder, tmp_path, number):
    server.faults.add("commit", delay=2.0)
    given = {"hub_strategy": "checkpoint", "num_train_epochs": 30}
    process = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given, wait=False)
    server.wait_for("commit", timeout=120)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 143, said
    time.sleep(3)  # what was on its way when the run was killed may still arrive
    for commit in server.repos["org/model"].commits("main")[1:]:
        manifest = json.loads(commit.read("last-checkpoint/checkpoint_manifest.json"))
        for name, entry in manifest.items():
            assert sha256(commit.read(f"last-checkpoint/{name}")) == entry["sha256"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": "hf_wrong"}, "401"),
        ({"token": None}, "token"),
        ({"hub_model_id": "strangers/model"}, "403"),
        ({"hub_model_id": "org/public"}, "--hub_allow_public"),
        ({"hub_model_id": "bad name!"}, "bad name!"),
        ({"license": "apache"}, "--license apache"),
        ({"endpoint": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
    ],
)
def test_what_stands_in_the_way_is_said_before_the_first_step(
    server, prepared_folder, roberta_folder, tmp_path, given, message, monkeypatch
):
    code = "from huggingface_hub import HfApi; HfApi().create_repo('org/public', private=False)"
    environment = {**os.environ, **server.environment(tmp_path / "owner", token=TOKEN, xet=False)}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)
    endpoint = given.pop("endpoint", None) if "endpoint" in given else None
    if endpoint:
        monkeypatch.setattr(
            server,
            "environment",
            lambda home, token, xet: {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"},
        )
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", **given)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_public_repo_and_a_branch_are_pushed_to_when_that_is_meant(server, prepared_folder, roberta_folder, tmp_path):
    given = {"hub_private_repo": "False", "hub_revision": "trial", "hub_strategy": "end", "num_train_epochs": 1}
    for extra in ((), ("--hub_allow_public", "--overwrite_output_dir")):
        done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", *extra, **given)
        assert done.returncode == 0, done.stdout
    assert not server.repos["org/model"].private
    holds_the_end_of(last(server, "trial"), tmp_path / "run", checkpoint=False)
    assert "model.safetensors" not in last(server).files


def test_a_pickle_that_would_run_code_is_refused(prepared_folder, roberta_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    encoder = shutil.copytree(roberta_folder, tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    command = [
        sys.executable,
        "train_hf.py",
        *options(dataset_dir=prepared_folder, encoder=encoder, output_dir=tmp_path / "r"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_such_a_pickle_is_refused_though_its_manifest_fits(prepared_folder, roberta_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    done = train(prepared_folder, roberta_folder, tmp_path / "run", num_train_epochs=1)
    assert done.returncode == 0, done.stderr
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    commit_checkpoint(checkpoint.rename(tmp_path / checkpoint.name), checkpoint)
    done = train(prepared_folder, roberta_folder, tmp_path / "run", resume_from_checkpoint="auto")
    assert done.returncode == 1
    assert checkpoint.name in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_dry_run_touches_no_hub(server, prepared_folder, roberta_folder, tmp_path):
    done = push(server, tmp_path / "home", prepared_folder, roberta_folder, tmp_path / "run", "--dry_run")
    assert done.returncode == 0, done.stdout
    assert not server.requests


def test_what_is_staged_names_no_machine_and_nothing_that_is_not_allowed(tmp_path):
    run, events = tmp_path / "run", tmp_path / "run" / "runs" / "2026-01-01"
    events.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", ".env", "predictions_test.csv", "training_args.bin"):
        (run / name).write_text(name)
    (events / "events.out.tfevents.1700000000.node-17.cluster.example.123.0").write_text("events")
    stage(tmp_path / "staged", run, run, None)
    found = {
        path.relative_to(tmp_path / "staged").as_posix() for path in (tmp_path / "staged").rglob("*") if path.is_file()
    }
    assert found == {"model.safetensors", "config.json", "runs/2026-01-01/events.out.tfevents.1700000000.run.123.0"}


@pytest.mark.skipif("HUB_TEST_TOKEN" not in os.environ, reason="HUB_TEST_TOKEN, a token that may write, is not set")
def test_the_real_hub_takes_a_run_and_gives_it_back(prepared_folder, roberta_folder, tmp_path, monkeypatch):
    """Opt-in: makes a private repo under the token's name, and deletes it again."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(token=os.environ["HUB_TEST_TOKEN"])
    repo_id = f"{api.whoami()['name']}/hierarchical-roberta-test-{os.getpid()}"
    environment = {"HF_TOKEN": os.environ["HUB_TEST_TOKEN"], "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    real = SimpleNamespace(environment=lambda *_, **__: environment)
    given = {"hub_model_id": repo_id, "hub_strategy": "checkpoint"}
    try:
        done = push(real, None, prepared_folder, roberta_folder, tmp_path / "run", **given)
        assert done.returncode == 0, done.stdout
        assert api.model_info(repo_id).private
        found = api.hf_hub_download(repo_id, "model.safetensors", local_dir=tmp_path / "back")
        assert sha256(Path(found).read_bytes()) == sha256((tmp_path / "run" / "model.safetensors").read_bytes())
    finally:
        api.delete_repo(repo_id, missing_ok=True)
