"""What arrives on the hub, asserted on what it holds: our double of it, the real client, training in a process of its own."""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from modeling.training.checkpointing import commit_checkpoint, find_checkpoint, list_checkpoints
from scripts.hub.pusher import HubPusher
from scripts.hub.upload import stage
from tests.conftest import assert_refused, launched, options, run_command, tiny_rows, train, training_command
from tests.hub_repos import Repo
from tests.hub_server import HubServer
from tests.processes import ROOT, run, start

pytestmark = [pytest.mark.slow, pytest.mark.hub]

# train_hf.py, whose first wait between two attempts to push is short.
IMPATIENT = """
import runpy, sys, scripts.hub.pusher
scripts.hub.pusher.FIRST_WAIT = 0.1
sys.argv[0] = "train_hf.py"
runpy.run_path("train_hf.py", run_name="__main__")
"""
TOKEN = "hf_marker0123456789SECRETtoken"
MODES = pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A name for HF_HOME, of which each push makes a link: what is read at import stays the same for all tests."""
    return tmp_path_factory.mktemp("hub") / "home"


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def server(port):
    with HubServer(port) as server:
        server.add_user("alice", token=TOKEN, orgs=["org"])
        server.add_user("bob", token="hf_bob")
        yield server


@pytest.fixture
def on_hub(server, home, tmp_path):
    """The environment of a machine, by its name, that knows the hub; its caches are empty at first."""

    def environment(machine: str = "here", token: str | None = TOKEN, xet: bool = False) -> dict[str, str]:
        cache = tmp_path / "machines" / machine
        cache.mkdir(parents=True, exist_ok=True)
        home.unlink(missing_ok=True)
        home.symlink_to(cache)
        fast = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
        return {**os.environ, **server.environment(home, token=token, xet=xet), **fast}

    return environment


@pytest.fixture
def push(on_hub, prepared_folder, roberta_folder):
    """Trains with --push_to_hub; the finished process, or the running one."""

    def push(output_dir, *extra, machine="here", xet=False, token=TOKEN, wait=True, env=None, cold=False, **arguments):
        given = {"hub_model_id": "org/model", **arguments}
        command = training_command(prepared_folder, roberta_folder, output_dir, "--push_to_hub", *extra, **given)
        command = [sys.executable, "-c", IMPATIENT, *command[2:]]
        how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cold": cold}
        process = start(command, env={**on_hub(machine, token, xet), **(env or {})}, **how)
        if not wait:
            return process
        said, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(command, process.returncode, said, "")

    return push


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def last(server, branch="main"):
    return server.repos["org/model"].commits(branch)[-1]


def holds_the_end_of(commit, run: Path, checkpoint: bool = True) -> None:
    """The commit's root is the run's final model, and its last-checkpoint/ the run's newest checkpoint."""
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "metrics.json",
        "pipeline.py",
        "handler.py",
    ):
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
def test_hub_holds_the_best_model_and_the_last_checkpoint(server, push, on_hub, tmp_path, xet):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".env").write_text("PASSWORD=1")
    (run_dir / ".cache").mkdir()
    (run_dir / ".cache" / "junk").write_text("junk")
    given = {"hub_strategy": "checkpoint", "save_total_limit": 1, "num_train_epochs": 3}
    # A token on the command line starts the command anew, cold.
    way = {} if xet else {"token": None, "hub_token": TOKEN}
    done = push(run_dir, xet=xet, **given, **way)
    assert done.returncode == 0, done.stdout
    commit = last(server)
    holds_the_end_of(commit, run_dir)
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
        if path.is_file() and tmp_path / "machines" not in path.parents:
            assert TOKEN.encode() not in path.read_bytes(), path
    # Anyone who may read it can use it by its name alone.
    code = (
        "import json, sys\nfrom transformers import pipeline\n"
        "rate = pipeline('text-classification', model='org/model', trust_remote_code=True)\n"
        "print(json.dumps(rate(sys.argv[1])[0]['scores']))\n"
    )
    text = tiny_rows()[0]["text"]
    environment, scores = on_hub("other", xet=xet), []
    for model, more in (("org/model", {}), ("org/model", {"HF_HUB_OFFLINE": "1"}), (str(run_dir), {})):
        command = [sys.executable, "-c", code.replace("org/model", model), text]
        loaded = run(command, cwd=tmp_path, env={**environment, **more}, cold=bool(more))
        assert loaded.returncode == 0, loaded.stderr
        scores.append(json.loads(loaded.stdout))
    assert scores[0] == scores[1] == scores[2]


def test_a_model_on_the_hub_is_an_encoder(server, push, on_hub, prepared_folder, tmp_path):
    done = push(tmp_path / "run", num_train_epochs=1)
    assert done.returncode == 0, done.stdout
    command = training_command(
        prepared_folder, "org/model", tmp_path / "next", freeze_encoder=True, num_train_epochs=1, pooling="mean"
    )
    done = run(command, cwd=ROOT, env=on_hub("other"))
    assert done.returncode == 0, done.stderr
    assert "org/model" in next(line for line in done.stderr.splitlines() if "Starting from the encoder" in line)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("next", "run"))
    assert all(ours[name].equal(theirs[name]) for name in ours if name.startswith("encoder."))
    assert not any(name.startswith("pooling.") for name in ours)


@pytest.mark.parametrize(("strategy", "folders"), [("end", set()), ("every_save", set()), ("all_checkpoints", {4, 8})])
def test_hub_strategy(server, push, tmp_path, strategy, folders):
    given = {"hub_strategy": strategy, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    done = push(tmp_path / "run", **given)
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


def test_resume_from_the_hub_on_another_machine(server, push, tmp_path):
    given = {"hub_strategy": "checkpoint", "num_train_epochs": 3}
    whole = push(tmp_path / "whole", machine="first", **{**given, "hub_model_id": "org/a"})
    assert whole.returncode == 0, whole.stdout
    process = push(tmp_path / "first", machine="second", wait=False, **given)
    deadline = time.monotonic() + 120
    while "org/model" not in server.repos or len(server.repos["org/model"].commits("main")) == 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "first")
    done = push(tmp_path / "second", machine="third", resume_from_checkpoint="hub", **given)
    assert done.returncode == 0, done.stdout
    assert str(tmp_path / "second" / "checkpoint-") in done.stdout  # resumed from it
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
def test_failed_push_is_tried_again(server, push, tmp_path, fault, xet):
    server.faults.add("commit", **fault)
    done = push(tmp_path / "run", hub_strategy="checkpoint", xet=xet)
    assert done.returncode == 0, done.stdout
    assert "failed" in done.stdout
    holds_the_end_of(last(server), tmp_path / "run")


def test_refused_push_costs_the_exit_status_and_the_named_command_ends_the_job(server, push, on_hub, tmp_path):
    server.faults.add("commit", status=403)
    run_dir = tmp_path / "run"
    done = push(run_dir, hub_strategy="checkpoint", hub_timeout=5, grace_seconds=1)
    assert done.returncode == 1
    assert (run_dir / "model.safetensors").is_file()
    [command] = re.findall(r"python -m scripts\.push_to_hub .*", done.stdout)
    assert len(server.repos["org/model"].commits("main")) == 1
    server.faults.clear()
    ended = run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, env=on_hub())
    assert ended.returncode == 0, ended.stderr
    holds_the_end_of(last(server), run_dir)


def test_a_space_is_pushed_beside_the_model(server, on_hub, run_copy):
    pytest.importorskip("gradio", reason="gradio, which comes with the extra `app`, is not installed")
    given = options(output_dir=run_copy, hub_model_id="org/model", space="org/model-page")
    command = [sys.executable, "-m", "scripts.push_to_hub", *given]
    done = run(command, cwd=ROOT, env=on_hub())
    assert done.returncode == 0, done.stderr
    holds_the_end_of(last(server), run_copy, checkpoint=False)
    space = server.repos["org/model-page"]
    assert space.private
    pushed = space.commits("main")[-1]
    assert {"app.py", "README.md", "requirements.txt", "data/document_files.py"} <= set(pushed.files)
    assert b"MODEL = 'org/model'" in pushed.read("app.py")
    assert b"models:\n  - org/model" in pushed.read("README.md")
    assert not (run_copy / ".hub" / "space").exists()
    # A run whose code cannot say what each chunk contributes.
    (run_copy / "pipeline.py").write_text("# earlier")
    assert_refused(run(command, cwd=ROOT, env=on_hub()), "has the code of an earlier version", "for --space")


def test_an_export_is_pushed_beside_the_model_and_predicts_from_there(server, on_hub, run_copy, tmp_path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs the extra onnx: pip install -e '.[onnx]'")
    export = tmp_path / "exported"
    done = run_command("scripts.export_onnx", model=run_copy, output_dir=export)
    assert done.returncode == 0, done.stderr
    (export / "stories.csv").write_text("private")
    command = [sys.executable, "-m", "scripts.push_to_hub", *options(output_dir=run_copy, hub_model_id="org/model")]
    done = run([*command, "--onnx", export], cwd=ROOT, env=on_hub())
    assert done.returncode == 0, done.stderr
    holds_the_end_of(last(server), run_copy, checkpoint=False)  # its card is the run's
    pulled = tmp_path / "pulled"
    code = "import sys; from huggingface_hub import snapshot_download as get; get('org/model', local_dir=sys.argv[1])"
    done = run([sys.executable, "-c", code, pulled], cwd=ROOT, env=on_hub("elsewhere"))
    assert done.returncode == 0, done.stderr
    names = {path.relative_to(export) for path in export.rglob("*") if path.is_file()} - {Path("stories.csv")}
    assert {path.relative_to(pulled / "onnx") for path in (pulled / "onnx").rglob("*") if path.is_file()} == names
    (tmp_path / "story.txt").write_text(tiny_rows()[0]["text"])
    predict = [sys.executable, pulled / "onnx" / "predict_onnx.py", tmp_path / "story.txt"]
    done = subprocess.run(predict, capture_output=True, text=True, check=True)
    expected = run_command("scripts.predict", model=run_copy, source=tmp_path / "story.txt")
    assert json.loads(done.stdout)["scores"] == pytest.approx(json.loads(expected.stdout)["scores"], abs=1e-4)


def test_hub_that_hangs_is_not_waited_for_without_bound(server, push, tmp_path):
    server.faults.add("commit", hang=True)
    done = push(tmp_path / "run", hub_strategy="every_save", hub_timeout=2)
    server.release()
    assert done.returncode == 1
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert "python -m scripts.push_to_hub" in done.stdout


def test_slow_hub_gets_the_end_though_saves_are_faster(server, push, tmp_path):
    server.faults.add("commit", delay=1.5)
    given = {"hub_strategy": "checkpoint", "save_total_limit": 1, "num_train_epochs": 4}
    done = push(tmp_path / "run", **given)
    assert done.returncode == 0, done.stdout
    holds_the_end_of(last(server), tmp_path / "run")
    for commit in server.repos["org/model"].commits("main")[1:]:  # each is what was saved at its step
        step = json.loads(commit.read("last-checkpoint/trainer_state.json"))["global_step"]
        assert commit.message == "End of training" or re.search(rf"(?i)step {step}\b", commit.message)
        manifest = json.loads(commit.read("last-checkpoint/checkpoint_manifest.json"))
        for name, entry in manifest.items():
            assert sha256(commit.read(f"last-checkpoint/{name}")) == entry["sha256"]


def test_error_in_mid_run_leaves_what_was_saved_before_it_on_the_hub(server, tmp_path, monkeypatch, caplog):
    for name, value in server.environment(tmp_path / "home", token=TOKEN, xet=False).items():
        monkeypatch.setenv(name, value)
    run_dir, state = tmp_path / "run", SimpleNamespace(global_step=4, best_model_checkpoint=None)
    for name in ("model.safetensors", "config.json", "trainer_state.json", "checkpoint_manifest.json"):
        (run_dir / "checkpoint-4").mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoint-4" / name).write_text(json.dumps({"global_step": 4}))
    server.repos["org/model"] = Repo("org/model", True, "alice")

    def stopped_by(error: BaseException, grace_seconds: float) -> None:
        with suppress(type(error)), HubPusher(run_dir, "org/model", "checkpoint", None, 60, grace_seconds) as pusher:
            pusher.on_save(None, state, None)
            raise error

    server.faults.add("commit", delay=1.0)
    stopped_by(KeyboardInterrupt(), 60)  # the second Ctrl-C: nothing is waited for
    assert any(record.levelname == "ERROR" for record in caplog.records)
    stopped_by(ValueError("anything"), 60)
    assert json.loads(last(server).read("last-checkpoint/trainer_state.json"))["global_step"] == 4


@pytest.mark.distributed
def test_two_processes_that_are_stopped_push_what_they_saved(server, on_hub, prepared_folder, roberta_folder, tmp_path):
    """By a launcher, which ends every process as soon as one has failed."""
    server.faults.add("commit", delay=2.0)
    given = {"hub_strategy": "checkpoint", "num_train_epochs": 200, "early_stopping_patience": 0}
    given |= {"hub_model_id": "org/model"}
    command = training_command(prepared_folder, roberta_folder, tmp_path / "run", "--push_to_hub", **given)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = start(launched(command, 2), cwd=ROOT, env=on_hub(), cold=True, **pipes)
    server.wait_for("commit", timeout=120)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    step = json.loads(last(server).read("last-checkpoint/trainer_state.json"))["global_step"]
    assert find_checkpoint(str(tmp_path / "run"), "auto").endswith(f"checkpoint-{step}"), said
    assert re.search(rf"step {step}\b", said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_run_stopped_in_a_push_leaves_the_hub_consistent(server, push, tmp_path, number):
    server.faults.add("commit", delay=1.0)
    process = push(tmp_path / "run", hub_strategy="checkpoint", num_train_epochs=30, wait=False)
    server.wait_for("commit", timeout=120)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert process.returncode == 143, said
    time.sleep(1.5)  # what was on its way when the run was killed may still arrive
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
    ],
)
def test_what_prevents_a_push_is_named_before_the_first_step(server, push, tmp_path, given, message):
    server.repos["org/public"] = Repo("org/public", False, "alice")
    assert_refused(push(tmp_path / "run", **given), re.escape(message))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_unreachable_hub_is_named_before_the_first_step(push, tmp_path):
    done = push(tmp_path / "run", env={"HF_ENDPOINT": "http://127.0.0.1:9"}, cold=True)
    assert_refused(done, "http://127.0.0.1:9")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_public_repo_and_branch_are_pushed_to_when_that_is_meant(server, push, tmp_path):
    given = {"hub_private_repo": "False", "hub_revision": "trial", "hub_strategy": "end", "num_train_epochs": 1}
    for extra in ((), ("--hub_allow_public", "--overwrite_output_dir")):
        done = push(tmp_path / "run", *extra, **given)
        assert done.returncode == 0, done.stdout
    assert not server.repos["org/model"].private
    holds_the_end_of(last(server, "trial"), tmp_path / "run", checkpoint=False)
    assert "model.safetensors" not in last(server).files


class Evil:
    """A pickle that runs code."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_encoder_with_a_pickle_that_would_run_code_is_refused(prepared_folder, roberta_folder, tmp_path):
    encoder = shutil.copytree(roberta_folder, tmp_path / "encoder")
    (encoder / "model.safetensors").unlink()
    (encoder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert_refused(train(prepared_folder, encoder, tmp_path / "run"))
    assert not (tmp_path / "ran").exists()


def test_checkpoint_with_such_a_pickle_is_refused_though_its_manifest_fits(
    run_copy, prepared_folder, roberta_folder, tmp_path
):
    newest, *_ = list_checkpoints(str(run_copy))
    (newest / "optimizer.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    commit_checkpoint(newest.rename(tmp_path / newest.name), newest)
    done = train(prepared_folder, roberta_folder, run_copy, resume_from_checkpoint="auto", num_train_epochs=4)
    assert_refused(done, newest.name)
    assert not (tmp_path / "ran").exists()


def test_dry_run_touches_no_hub(server, push, tmp_path):
    done = push(tmp_path / "run", "--dry_run")
    assert done.returncode == 0, done.stdout
    assert not server.requests


def test_stage_takes_only_what_is_allowed_and_names_no_machine(tmp_path):
    run_dir, events = tmp_path / "run", tmp_path / "run" / "runs" / "2026-01-01"
    events.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", ".env", "predictions_test.csv", "training_args.bin"):
        (run_dir / name).write_text(name)
    (events / "events.out.tfevents.1700000000.node-17.cluster.example.123.0").write_text("events")
    stage(tmp_path / "staged", run_dir, run_dir, None)
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
    given = {"hub_model_id": repo_id, "hub_strategy": "checkpoint"}
    command = training_command(prepared_folder, roberta_folder, tmp_path / "run", "--push_to_hub", **given)
    try:
        done = run(command, cwd=ROOT, env={**os.environ, **environment}, cold=True)
        assert done.returncode == 0, done.stderr
        assert api.model_info(repo_id).private
        found = api.hf_hub_download(repo_id, "model.safetensors", local_dir=tmp_path / "back")
        assert sha256(Path(found).read_bytes()) == sha256((tmp_path / "run" / "model.safetensors").read_bytes())
    finally:
        api.delete_repo(repo_id, missing_ok=True)
