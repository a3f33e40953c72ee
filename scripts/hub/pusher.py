"""Pushes a run to the hub while it trains: nothing is lost in silence, and training never dies of it nor waits for it.

Each save is staged (see scripts/hub/upload.py) and pushed by a process of its own, `python -m scripts.push_to_hub`, which a hub
that hangs cannot keep from being ended. Trainer's own pushing is off: it drops failures and the last push.
"""

import logging
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.hub.upload import configure_client_timeout, ensure_repo, fetch_last_checkpoint, stage

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]
FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0  # seconds between two attempts
ATTEMPTS_AT_END = 5


class HubPusher(TrainerCallback):
    """Stages and pushes what `hub_strategy` says. On the first process only.

    Args:
        timeout: seconds that one push may take before it is ended and tried again.
        grace_seconds: how long pushes may go on when the run was stopped.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str,
        strategy: str,
        revision: str | None,
        timeout: float,
        grace_seconds: float,
    ):
        self.output_dir, self.repo_id, self.strategy = output_dir, repo_id, strategy
        self.revision, self.timeout, self.grace_seconds = revision, timeout, grace_seconds
        self.folder = output_dir / ".hub"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.waiting: deque[tuple[Path, str]] = deque()
        self.changed = threading.Condition()
        self.process: subprocess.Popen | None = None
        self.is_idle, self.is_ending, self.is_closed = True, False, False
        threading.Thread(target=self._work, daemon=True).start()

    def __enter__(self) -> "HubPusher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Where an error ended the run, what was saved before it is still pushed, for so long as a signal would leave;
        a second Ctrl-C waits for nothing. Either way it is said what the hub lacks."""
        if not self.is_closed:
            self.finish(None, seconds=0.0 if kind is KeyboardInterrupt else self.grace_seconds, final=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.strategy == "end":
            return
        checkpoint = self.output_dir / f"checkpoint-{state.global_step}"
        best = Path(state.best_model_checkpoint or checkpoint)
        with_checkpoint = checkpoint if self.strategy in ("checkpoint", "all_checkpoints") else None
        staged = self.folder / f"step-{state.global_step}"
        try:
            model = best if best.is_dir() else checkpoint
            stage(staged, model, self.output_dir, with_checkpoint, self.strategy == "all_checkpoints")
        except OSError as error:  # a full disk, say: no reason to end the training
            logger.warning(f"Step {state.global_step} is not pushed: it could not be laid out ({error}).")
            return
        self._submit(staged, f"Step {state.global_step}")

    def _submit(self, staged: Path, message: str) -> None:
        with self.changed:
            # What a newer push holds too need not be pushed before it.
            if self.strategy != "all_checkpoints":
                for older, _ in self.waiting:
                    shutil.rmtree(older, ignore_errors=True)
                self.waiting.clear()
            self.waiting.append((staged, message))
            self.is_idle = False
            self.changed.notify_all()

    def _work(self) -> None:
        wait, attempts_at_end = 0.0, 0
        while not self.is_closed:
            with self.changed:
                self.is_idle = not self.waiting
                self.changed.notify_all()
                while not self.waiting:
                    self.changed.wait()
                staged, message = self.waiting.popleft()
            reason = self._push(staged, message)
            with self.changed:
                if self.is_closed:
                    return
                if reason is None:
                    logger.info(f"Pushed to {self.repo_id}: {message}.")
                if reason is None or (self.waiting and self.strategy != "all_checkpoints"):
                    wait = 0.0
                    shutil.rmtree(staged, ignore_errors=True)
                else:
                    self.waiting.appendleft((staged, message))
                    wait = min(max(FIRST_WAIT, 2 * wait), LONGEST_WAIT)
                    attempts_at_end += self.is_ending
                    self.is_closed = attempts_at_end >= ATTEMPTS_AT_END
                if reason is not None:
                    then = f"again in {wait:.0f} s" if wait else "a newer one follows"
                    logger.warning(f"Push to {self.repo_id} failed ({message}): {reason} Training goes on; {then}.")
                    self.changed.notify_all()
                    if not self.is_closed:
                        self.changed.wait(timeout=wait)

    def _push(self, staged: Path, message: str) -> str | None:
        """Why it failed, or None."""
        command = [sys.executable, "-m", "scripts.push_to_hub", *self._options(), "--attempts", "1"]
        command += ["--staged", str(staged.resolve()), "--message", message]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        # In a session of its own, so that what ends the run, a Ctrl-C say, leaves it the time that `finish` gives.
        try:
            self.process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        except OSError as error:  # no memory, no process or no file is left for it
            return f"it could not be started ({error})."
        try:
            _, said = self.process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return f"no end after {self.timeout:.0f} s (--hub_timeout)."
        return None if self.process.returncode == 0 else (said.strip().splitlines() or ["it ended without a word."])[-1]

    def _options(self) -> list[str]:
        options = ["--output_dir", str(self.output_dir.resolve()), "--hub_model_id", self.repo_id]
        options += ["--hub_timeout", f"{self.timeout:g}"]
        return options + (["--hub_revision", self.revision] if self.revision else [])

    @property
    def command(self) -> str:
        """What a person types to end the job."""
        extra = ["--last_checkpoint"] if self.strategy in ("checkpoint", "all_checkpoints") else []
        return shlex.join(["python", "-m", "scripts.push_to_hub", *self._options(), "--hub_allow_public", *extra])

    def finish(self, last_checkpoint: Path | None, seconds: float | None = None, final: bool = True) -> bool:
        """Push the run's end state, wait for it, and say whether the hub has it.

        Args:
            last_checkpoint: the newest checkpoint of the run.
            seconds: how long to wait at the most (None: for three pushes that time out).
            final: False where the run was stopped, and what its last save staged is what there is to push.
        """
        if final:
            staged = self.folder / "final"
            with_checkpoint = last_checkpoint if self.strategy in ("checkpoint", "all_checkpoints") else None
            stage(staged, self.output_dir, self.output_dir, with_checkpoint)
            self._submit(staged, "End of training")
        deadline = time.monotonic() + (3 * self.timeout + 10 if seconds is None else seconds)
        with self.changed:
            self.is_ending = True
            self.changed.notify_all()
            while not self.is_idle and not self.is_closed and (left := deadline - time.monotonic()) > 0:
                self.changed.wait(timeout=left)
            done, self.is_closed = self.is_idle, True
        if not done and self.process is not None:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not done:
            ended = f"When it can be reached: {self.command}"
            stopped = "Its last save is pushed when the run goes on: --resume_from_checkpoint auto."
            logger.error(f"The hub does not have the end of this run. {ended if final else stopped}")
        return done


def start_pushing(args: HierarchicalTrainingArguments) -> HubPusher | None:
    """What pushes the run to the hub, on the first process, once it is sure that it may; and with
    `--resume_from_checkpoint hub` the checkpoint from there. Trainer itself is told to push nothing.

    Raises:
        ValueError: on every process, where the hub cannot be pushed to.
    """
    wants_push, args.push_to_hub = args.push_to_hub, False
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    is_sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    if wants_push and is_sharded and strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            "Sharded checkpoints cannot be gone on from by way of the hub: use --hub_strategy every_save or end."
        )
    if args.dry_run or (not wants_push and args.resume_from_checkpoint != "hub"):
        return None
    repo_id, error = args.hub_model_id or Path(args.output_dir).resolve().name, None
    if args.process_index == 0:
        try:
            configure_client_timeout(args.hub_timeout)
            if wants_push:
                whose = (args.hub_private_repo, args.hub_allow_public, args.hub_revision, args.license)
                repo_id = ensure_repo(repo_id, *whose)
            if args.resume_from_checkpoint == "hub":
                args.resume_from_checkpoint = str(
                    fetch_last_checkpoint(repo_id, args.hub_revision, Path(args.output_dir))
                )
        except ValueError as reason:
            error = reason
    # The very checkpoint that was fetched: one that did not arrive whole is an error, and not a new beginning.
    [repo_id, error, args.resume_from_checkpoint] = broadcast_object_list([repo_id, error, args.resume_from_checkpoint])
    if error is not None:
        raise error
    if not wants_push or args.process_index:
        return None
    logger.info(f"Pushing to {repo_id} on the hub, {strategy}.")
    times = (args.hub_timeout, args.grace_seconds)
    return HubPusher(Path(args.output_dir), repo_id, strategy, args.hub_revision, *times)
