"""Kill -9 and SIGTERM at any moment lose nothing: the harness of tests/faults, for 24 kills (make faults: 200)."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_runs_that_are_killed_again_and_again_end_as_if_nothing_had_been():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--kills", "24"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= 24
