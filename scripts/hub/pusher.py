"""Push a run to the Hub in the background while it trains. Failures are reported, and never block or end training.

Each save is staged (see scripts/hub/upload.py) and pushed by a separate process, `python -m scripts.push_to_hub`, which
can be killed if the Hub hangs. Trainer's own pushing is disabled: it ignores failures and may skip the last push.
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
    """Stages and pushes checkpoints according to `hub_strategy`. Rank 0 only.

    Args:
        timeout: seconds after which a push is killed and retried.
        grace_seconds: how long to wait for pending pushes after an interrupt or error.
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
        """After an error, wait up to `grace_seconds` for what was saved to be pushed; after a second Ctrl-C, do not
        wait. Either way, log what was not pushed."""
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
        except OSError as error:  # e.g. a full disk, which should not end training
            logger.warning(f"Step {state.global_step} is not pushed: staging failed ({error}).")
            return
        self._submit(staged, f"Step {state.global_step}")

    def _submit(self, staged: Path, message: str) -> None:
        with self.changed:
            # A newer push includes what the pending ones contain.
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
                    retry = f"retrying in {wait:.0f} s" if wait else "superseded by a newer push"
                    logger.warning(f"Push to {self.repo_id} failed ({message}; {retry}): {reason}")
                    self.changed.notify_all()
                    if not self.is_closed:
                        self.changed.wait(timeout=wait)

    def _push(self, staged: Path, message: str) -> str | None:
        """Push in a subprocess; the reason of the failure, or None."""
        command = [sys.executable, "-m", "scripts.push_to_hub", *self._options(), "--attempts", "1"]
        command += ["--staged", str(staged.resolve()), "--message", message]
        environment = {
            key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        # In a new session: a Ctrl-C must not kill it before the grace period in `finish` is over.
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
        except OSError as error:  # out of memory, processes or file descriptors
            return f"the push process could not be started ({error})."
        try:
            _, stderr = self.process.communicate(timeout=self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return f"timed out after {self.timeout:.0f} s (--hub_timeout)."
        if self.process.returncode == 0:
            return None
        return (stderr.strip().splitlines() or [f"exit status {self.process.returncode}."])[-1]

    def _options(self) -> list[str]:
        options = ["--output_dir", str(self.output_dir.resolve()), "--hub_model_id", self.repo_id]
        options += ["--hub_timeout", f"{self.timeout:g}"]
        return options + (["--hub_revision", self.revision] if self.revision else [])

    @property
    def command(self) -> str:
        """The command to retry the push by hand."""
        extra = ["--last_checkpoint"] if self.strategy in ("checkpoint", "all_checkpoints") else []
        return shlex.join(["python", "-m", "scripts.push_to_hub", *self._options(), "--hub_allow_public", *extra])

    def finish(self, last_checkpoint: Path | None, seconds: float | None = None, final: bool = True) -> bool:
        """Push the final state of the run and wait for it.

        Args:
            last_checkpoint: the latest checkpoint of the run.
            seconds: maximum time to wait (None: long enough for three pushes to time out).
            final: False after an interrupt or error: only wait for what was already staged.

        Returns:
            Whether everything was pushed.
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
            if final:
                logger.error(f"Final push to {self.repo_id} failed. Retry with: {self.command}")
            else:
                resume = "it is pushed when the run resumes (--resume_from_checkpoint auto)"
                logger.error(f"The latest save was not pushed to {self.repo_id}; {resume}.")
        return done


def start_pushing(args: HierarchicalTrainingArguments) -> HubPusher | None:
    """Check access to the Hub, fetch the checkpoint for `--resume_from_checkpoint hub`, and start the pusher on rank 0.
    Disables Trainer's own pushing.

    Raises:
        ValueError: on every rank, if the repo cannot be pushed to or the checkpoint cannot be fetched.
    """
    wants_push, args.push_to_hub = args.push_to_hub, False
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    is_sharded = "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))
    if wants_push and is_sharded and strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(f"--hub_strategy {strategy} does not support sharded checkpoints: use every_save or end.")
    if args.dry_run or (not wants_push and args.resume_from_checkpoint != "hub"):
        return None
    repo_id, error = args.hub_model_id or Path(args.output_dir).resolve().name, None
    if args.process_index == 0:
        try:
            configure_client_timeout(args.hub_timeout)
            if wants_push:
                options = (args.hub_private_repo, args.hub_allow_public, args.hub_revision, args.license)
                repo_id = ensure_repo(repo_id, *options)
            if args.resume_from_checkpoint == "hub":
                args.resume_from_checkpoint = str(
                    fetch_last_checkpoint(repo_id, args.hub_revision, Path(args.output_dir))
                )
        except ValueError as reason:
            error = reason
    # Resume from this path, not from `auto`: an incomplete download must fail, not restart training.
    [repo_id, error, args.resume_from_checkpoint] = broadcast_object_list([repo_id, error, args.resume_from_checkpoint])
    if error is not None:
        raise error
    if not wants_push or args.process_index:
        return None
    logger.info(f"Pushing to {repo_id} on the Hub (hub_strategy={strategy}).")
    times = (args.hub_timeout, args.grace_seconds)
    return HubPusher(Path(args.output_dir), repo_id, strategy, args.hub_revision, *times)
