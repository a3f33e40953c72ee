"""Kills real training and real preparation of data, again and again, and looks whether anything was lost.

    python -m tests.faults --kills 200          (make faults)

Each life of a run is killed up to seven times, at a moment drawn by chance in a phase drawn by chance, resumed each time,
and then let go to its end. It must end as the run that was never killed: the same bits in the model, in the last checkpoint
and in the predictions, each epoch once in the history, no partial file left. Processes are forked off one that has
imported everything, so that a kill costs a second; what runs is train_hf.py and scripts.prepare_dataset as they stand.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import data.preparation
import modeling.training.resumable_trainer
import scripts.prepare_dataset
import scripts.training.export
import scripts.training.run
import scripts.training.setup
import train_hf
from data.prepared_dataset import load_prepared, sha256_of
from modeling.training.checkpointing import checkpoint_problem, list_checkpoints
from modeling.training.trainer import WeightedTrainer
from scripts.common.cli import run_main
from tests.conftest import LABELS, make_roberta, options, tiny_rows, write_csv

KILLS_IN_A_LIFE = 7
TRAINING = {
    "chunk_length": 16,
    "max_chunks": 2,
    "chunk_policy": "random",
    "num_train_epochs": 3,
    "learning_rate": 1e-3,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 1,
    "cpu_threads": 1,
}
# Phase → the function in which it happens (an owner and a name), how often at most it is entered before the kill, and the
# longest wait in it, in seconds.
PHASES: dict[str, tuple[Any, str, int, float]] = {
    "start": (WeightedTrainer, "__init__", 1, 0.3),
    "forward": (WeightedTrainer, "training_step", 12, 0.005),
    "evaluation": (WeightedTrainer, "prediction_step", 12, 0.005),
    "save": (WeightedTrainer, "_save_checkpoint", 4, 0.03),
    "putting in place": (modeling.training.resumable_trainer, "commit_checkpoint", 4, 0.01),
    "rotating": (modeling.training.resumable_trainer, "rotate", 4, 0.002),
    "export": (scripts.training.export, "export", 1, 0.03),
    "preparing": (data.preparation, "prepare_dataset", 1, 0.4),
}


def killed_in(phase: str, number: int, chance: random.Random) -> None:
    """From now on this process sends itself a signal at a moment drawn by chance, in this phase."""
    owner, name, most, longest = PHASES[phase]
    entries, wait = chance.randint(1, most), chance.random() * longest
    function, entered = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal entered
        entered += 1
        if entered == entries:
            threading.Timer(wait, os.kill, (os.getpid(), number)).start()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


def forked(command: Callable[[], int | None], argv: list[str], before: Callable[[], None], log: Path) -> int:
    """Run a command in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        with open(log, "a", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.argv = sys.orig_argv = argv
            before()
            os._exit(run_main(command))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Faults:
    """Data, an encoder, a run that was never killed, and what was seen of those that were."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        self.log = folder / "log.txt"
        self.encoder, self.data = folder / "encoder", folder / "data"
        self.kills: Counter[str] = Counter()
        self.lives = 0
        self.source = write_csv(folder / "stories.csv", tiny_rows())
        make_roberta(self.encoder)

    def prepare(self, output_dir: Path, before: Callable[[], None] = lambda: None) -> int:
        given = {"source": self.source, "tokenizer": self.encoder, "output_dir": output_dir, "labels": ",".join(LABELS)}
        return forked(scripts.prepare_dataset.main, ["prepare_dataset", *options(**given)], before, self.log)

    def train(self, output_dir: Path, before: Callable[[], None] = lambda: None) -> int:
        given = {"dataset_dir": self.data, "encoder": self.encoder, "output_dir": output_dir, **TRAINING}
        argv = ["train_hf.py", *options(**given), "--resume_from_checkpoint", "auto"]
        return forked(train_hf.command, argv, before, self.log)

    def kill(self, phase: str, run: Callable[[Path, Callable[[], None]], int], output_dir: Path) -> bool:
        """One kill, if the phase comes; whether it did."""
        number = self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        seed = self.chance.random()
        status = run(output_dir, lambda: killed_in(phase, number, random.Random(seed)))
        if status not in (0, 143, -signal.SIGKILL):
            raise AssertionError(f"{phase}: exit status {status}\n{self.log.read_text()[-3000:]}")
        self.kills[phase] += status != 0
        return status != 0

    def life_of_a_run(self, reference: Path) -> None:
        """Kills, resumes, the end, and whether it is the reference's."""
        output_dir = self.folder / f"run-{self.lives}"
        self.lives += 1
        phases = [phase for phase in PHASES if phase != "preparing"]
        for _ in range(KILLS_IN_A_LIFE):
            phase = "export" if (output_dir / "checkpoint-18").exists() else self.chance.choice(phases)
            if not self.kill(phase, self.train, output_dir):
                break
        status = self.train(output_dir)
        assert status == 0, f"exit status {status}\n{self.log.read_text()[-3000:]}"
        compare(output_dir, reference)
        shutil.rmtree(output_dir)

    def life_of_a_data_set(self) -> None:
        """A preparation that is killed leaves the folder whole or absent, and the next one makes what it always makes."""
        output_dir = self.folder / "prepared again"
        if self.kill("preparing", self.prepare, output_dir) and output_dir.exists():
            load_prepared(str(output_dir))
        shutil.rmtree(output_dir, ignore_errors=True)
        assert self.prepare(output_dir) == 0, self.log.read_text()[-3000:]
        fingerprints = [load_prepared(str(path))[1]["data_fingerprint"] for path in (self.data, output_dir)]
        assert fingerprints[0] == fingerprints[1]
        assert not list(self.folder.glob(".prepared again*"))
        shutil.rmtree(output_dir)


def compare(run: Path, reference: Path) -> None:
    """Raises AssertionError where a run did not end as the reference did."""
    for name in ("model.safetensors", "predictions_validation.csv", "predictions_test.csv", "metrics.json"):
        assert sha256_of(run / name) == sha256_of(reference / name), f"{run / name} is another"
    ours, theirs = (list_checkpoints(str(path))[0] for path in (run, reference))
    assert ours.name == theirs.name
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert sha256_of(ours / name) == sha256_of(theirs / name), f"{ours / name} is another"
    for checkpoint in list_checkpoints(str(run)):
        assert checkpoint_problem(checkpoint) is None, checkpoint
    facts = [
        [(epoch["epoch"], epoch["step"], epoch["train_loss"], epoch["eval_loss"]) for epoch in history["epochs"]]
        for history in (json.loads((path / "training_history.json").read_text()) for path in (run, reference))
    ]
    assert facts[0] == facts[1], facts
    assert not [path for path in run.rglob("*") if "partial" in path.name or path.name == ".export"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    # tqdm's own lock is one for all processes that are forked from here: one that is killed while it holds it would leave
    # the others waiting for ever.
    tqdm.set_lock(threading.RLock())
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), given.seed)
        reference = Path(folder) / "reference"
        assert faults.prepare(faults.data) == 0, faults.log.read_text()
        assert faults.train(reference) == 0, faults.log.read_text()
        while faults.kills.total() < given.kills:
            faults.life_of_a_run(reference)
            faults.life_of_a_data_set()
            print(f"{faults.kills.total()} kills, {faults.lives} runs ended as if nothing had been", flush=True)
    print(json.dumps({"seed": given.seed, "lives": faults.lives, "kills": faults.kills.total(), **faults.kills}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
