"""What is logged: plain on the terminal, with its origin in training.log."""

import re
import subprocess
import sys

CODE = """
import logging, sys
from pathlib import Path
from tqdm.auto import tqdm
from scripts.common.log_setup import set_up_logging
set_up_logging(Path(sys.argv[1]), logging.INFO)
logger = logging.getLogger("some.module")
with tqdm(total=2) as bar:
    bar.update()
    logger.info("epoch 1 of 2")
    logger.info("a detail", extra={"detail": True})
    logger.warning("the loss is NaN")
"""


def test_the_terminal_shows_messages_and_the_file_their_origin(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in re.split(r"[\r\n]+", done.stderr)]
    assert "epoch 1 of 2" in lines  # on a line of its own, whatever the bar showed
    assert "warning: the loss is NaN" in lines
    assert "some.module" not in done.stderr
    assert "a detail" not in done.stderr
    assert "\x1b" not in done.stderr
    log = (tmp_path / "training.log").read_text()
    for said in (
        "INFO some.module: epoch 1 of 2",
        "INFO some.module: a detail",
        "WARNING some.module: the loss is NaN",
    ):
        assert re.search(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {said}$", log, re.MULTILINE)
