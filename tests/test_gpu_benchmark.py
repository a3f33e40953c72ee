"""The command that measures on a GPU: its checks run here with tiny models, and its runner loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from scripts.benchmark import gpu
from scripts.benchmark.gpu_runner import Check, Runner, Settings, begin, finish
from scripts.benchmark.gpu_table import is_met, markdown, read_lines
from tests.processes import ROOT, run, start

NAMES = [check.name for check in gpu.CHECKS]


# ---- checks that stand in for real ones, by name in the child's process ----


def quick(settings, report):
    report.figure("answer", 42)
    report.figure("nothing", float("nan"))


def slow(settings, report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    report.figure("child", child.pid)
    time.sleep(60)


def partly(settings, report):
    report.measure("first", lambda: {"a": 1.5, "b": True})
    report.measure("second", lambda: [][0])
    report.measure("third", lambda: 7)


def wrong(settings, report):
    report.figure("before", 1)
    raise ValueError("it is wrong")


def dies(settings, report):
    os.kill(os.getpid(), signal.SIGKILL)


def check(function, seconds=30.0) -> Check:
    return Check(function.__name__, f"tests.test_gpu_benchmark:{function.__name__}", seconds)


def lines_of(tmp_path, checks, seconds=120.0) -> list[dict]:
    runner = Runner(Settings("cpu", True, tmp_path), seconds)
    runner.run(checks)
    return read_lines(tmp_path / "checks.jsonl")


def is_dead(pid: int) -> bool:
    """Whether a process has ended; whoever inherits it may be slow to reap it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_check_that_fails_or_hangs_or_dies_does_not_stop_the_others(tmp_path):
    names = (quick, slow, partly, wrong, dies)
    found = lines_of(tmp_path, [check(function, 4.0 if function is slow else 60.0) for function in names])
    by_name = {line["check"]: line for line in found}
    assert [line["check"] for line in found] == [function.__name__ for function in names]
    assert by_name["quick"]["ok"]
    assert by_name["quick"]["figures"] == {"answer": 42, "nothing": "nan"}
    assert by_name["slow"]["error"].startswith("stopped after 4 s")
    assert is_dead(by_name["slow"]["figures"]["child"])  # killed with what it had started
    assert by_name["partly"]["figures"] == {"first: a": 1.5, "first: b": True, "third": 7}
    assert by_name["partly"]["failed"]["second"].startswith("IndexError")
    assert not by_name["partly"]["ok"]
    assert by_name["wrong"]["error"] == "ValueError: it is wrong"
    assert by_name["wrong"]["figures"] == {"before": 1}
    assert str(-signal.SIGKILL) in by_name["dies"]["error"]
    assert "answer = 42" in (tmp_path / "quick.log").read_text()


def test_checks_that_get_no_turn_are_not_run(tmp_path):
    found = lines_of(tmp_path, [check(slow, 60.0), check(quick)], seconds=7.0)
    assert found[0]["error"]
    assert found[1]["error"] == "not run"


def test_a_process_of_its_own_gives_its_result_or_its_error(tmp_path):
    settings = Settings("cpu", True, tmp_path)
    assert finish(begin(settings, os.getenv, "OF_ITS_OWN", OF_ITS_OWN="yes")) == "yes"
    with pytest.raises(RuntimeError, match="ValueError"):
        finish(begin(settings, int, "x"))
    with pytest.raises(RuntimeError, match=r"0\.2|0 s"):
        finish(begin(settings, time.sleep, 30), seconds=0.2)


# ---- the table ----


def test_the_table_shows_aims_and_what_did_not_run():
    lines = [
        {
            "check": "environment",
            "ok": True,
            "seconds": 3.0,
            "figures": {"device type": "cuda", "device": "A card", "torch": "2.11"},
        },
        {
            "check": "exactness",
            "ok": True,
            "seconds": 20.0,
            "figures": {"logits, CPU ↔ device": 3e-6, "gradients, CPU ↔ device": 1e-3},
        },
        {
            "check": "memory",
            "ok": False,
            "seconds": 5.0,
            "figures": {
                "bf16: allocated, GiB": 5.5,
                "bf16: planned ÷ allocated": 1.02,
                "fp32: allocated, GiB": "does not fit",
                "fp32: planned ÷ allocated": "does not fit",
            },
            "failed": {"fp16": "RuntimeError: no"},
        },
        {"check": "speed", "ok": False, "seconds": 0, "figures": {}, "error": "not run"},
    ]
    text = markdown([json.loads(json.dumps(line)) for line in lines], [line["check"] for line in lines] + ["demo"])
    assert "device A card, device type cuda, torch 2.11." in text
    assert "| exactness | ok | 20 | 1 of 2 |" in text
    assert "| memory | 1 parts failed | 5 | 1 of 1 |" in text
    assert "| speed | not run | 0 |  |" in text
    assert "| logits, CPU ↔ device | 3.00e-06 | ≤ 2e-05 | yes |" in text
    assert "- exactness, gradients, CPU ↔ device: 1.00e-03, aim ≤ 2e-05" in text
    assert "| bf16 | 5.5 | 1.02 (aim 0.85 to 1.15: met) |" in text
    assert "| fp32 | does not fit | does not fit |" in text
    assert "**fp16** failed: RuntimeError: no" in text
    assert ": demo." in text


@pytest.mark.parametrize(
    ("value", "aim", "expected"),
    [
        (1.1, ("≤", 1.1), True),
        (0.29, ("≥", 0.3), False),
        (1.2, ("between", (0.9, 1.1)), False),
        ("nan", ("≤", 1.0), False),
        (True, ("=", True), True),
        ("cpu", ("starts with", "DEVICE"), False),
        ("cuda:0", ("starts with", "DEVICE"), True),
    ],
)
def test_an_aim_is_met_or_not(value, aim, expected):
    assert is_met(value, aim, "cuda") is expected


# ---- the command ----


def benchmark(*arguments, timeout=100) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.benchmark.gpu", *arguments]
    return run(command, cwd=ROOT, timeout=timeout, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_without_a_gpu_or_with_an_unknown_check_it_says_so(tmp_path):
    done = benchmark("--output_dir", tmp_path)
    assert done.returncode == 1
    assert re.match("error: .*GPU", done.stderr)
    assert "Traceback" not in done.stderr
    done = benchmark("--output_dir", tmp_path, "--only", "speed,sped")
    assert done.returncode == 1
    assert re.search(r"--only.*\bsped\b.*environment, exactness", done.stderr)


@pytest.mark.slow
def test_every_check_runs_on_a_cpu_with_tiny_models(tmp_path):
    done = benchmark("--output_dir", tmp_path, "--device", "cpu", "--tiny", timeout=540)
    assert done.returncode == 0, done.stderr
    found = {line["check"]: line for line in read_lines(tmp_path / "checks.jsonl")}
    assert list(found) == NAMES
    for name, line in found.items():
        assert line["ok"], (name, line.get("error"), line.get("failed"))
        assert line["figures"]
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"| {name} | ok |" in text
        assert f"## {name}\n" in text
    assert text.strip() in done.stdout
    # What does not depend on the speed of this machine is as it should be.
    assert found["exactness"]["figures"]["final weights, 16 × 1 ↔ 1 × 16"] < 1e-5
    assert found["precision"]["figures"]["fp32: same bits after resume"]
    assert found["ranks"]["figures"]["two processes: largest weight difference"] < 1e-5
    assert found["predict"]["figures"]["contributions, CPU ↔ device"] < 1e-4


@pytest.mark.slow
def test_interrupted_it_still_writes_its_tables(tmp_path):
    command = [sys.executable, "-m", "scripts.benchmark.gpu", "--output_dir", tmp_path, "--device", "cpu", "--tiny"]
    process = start(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "checks.jsonl"
    for _ in range(600):
        if path.is_file() and path.read_text():
            break
        time.sleep(0.1)
    time.sleep(1)  # into the second check
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    found = {line["check"]: line.get("error") for line in read_lines(path)}
    assert list(found) == NAMES
    assert found["environment"] is None
    assert "interrupted" in found.values()
    assert found["demo"] == "not run"
    assert "| demo | not run |" in (tmp_path / "gpu.md").read_text()
