"""A forked process is to a test what a cold one is."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT, run, start, start_ranks, wait_for

SHOW = """
import json, os, sys
print(json.dumps([sys.argv, sys.orig_argv, os.getcwd(), os.environ["SHOWN"], __name__, sys.stdin.read()]))
print("said", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_forked_process_has_its_own_argv_folder_environment_streams_and_status(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    environment = {**os.environ, "SHOWN": "here"}
    for command in ([sys.executable, "-c", SHOW, "3"], [sys.executable, "show.py", "4"]):
        cold, forked = (run(command, cwd=tmp_path, env=environment, input="in", cold=cold) for cold in (True, False))
        assert (forked.returncode, forked.stdout) == (cold.returncode, cold.stdout)
        # In the forked process, a library may report its leaks after what the command said.
        assert cold.stderr == forked.stderr[:5] == "said\n"
        assert json.loads(forked.stdout)[1] == command
        assert forked.returncode in (3, 4)


def test_forked_module_is_main():
    cold, forked = (
        run([sys.executable, "-m", "scripts.push_to_hub", "--help"], cwd=ROOT, cold=cold) for cold in (1, 0)
    )
    assert cold.stdout == forked.stdout
    assert cold.returncode == forked.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_a_forked_process(tmp_path, number):
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    process = start([sys.executable, "-c", code], start_new_session=True)
    wait_for(tmp_path, "begun", process)
    assert process.poll() is None
    os.killpg(process.pid, number)
    assert process.wait(10) == -number


def test_forked_process_that_outlasts_the_timeout_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)


def test_uncaught_exception_gives_status_1_and_a_traceback_and_atexit_runs():
    code = "import atexit; atexit.register(print, 'at exit'); 1 / 0"
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout) == (1, "at exit\n")
    assert "ZeroDivisionError" in done.stderr


def test_nothing_of_the_project_is_imported_before_the_command_and_no_thread_runs():
    code = "import os, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}), len(os.listdir('/proc/self/task')))"
    *names, threads = run([sys.executable, "-c", code], cwd=ROOT).stdout.split()
    assert {"torch", "transformers", "datasets", "sklearn"} <= set(names)
    assert not {"data", "modeling", "scripts", "train_hf"} & set(names)
    assert threads == "1"


def test_start_ranks_gives_each_process_its_place():
    code = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['MASTER_PORT'])"
    ranks = start_ranks([[sys.executable, "-c", code]] * 2, stdout=subprocess.PIPE)
    (first, size, port), (second, *same) = (rank.communicate()[0].split() for rank in ranks)
    assert [first, second, size] == ["0", "1", "2"]
    assert same == [size, port]
