"""A Trainer that can be interrupted at any point and resumed exactly.

Checkpoints are written atomically. A step or evaluation that would exceed the grace period is interrupted and repeated
when the run is resumed. Base class of WeightedTrainer.
"""

import logging
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..file_utils import disk_error, is_disk_full
from ..hierarchical_roberta.recomputation import random_state, set_random_state
from .checkpointing import STAGING_DIR, checkpoint_problem, commit_checkpoint, rotate

logger = logging.getLogger(__name__)


class StopSignal(Protocol):
    """Interface of SignalCallback.

    Attributes:
        received: signal received by this process, or None.
        agreed: signal on which all processes stop, or None.
    """

    received: int | None
    agreed: int | None

    def deadline_reached(self) -> bool:
        """Whether the current step must be interrupted. Called on every process before each micro-batch."""


class TrainingInterrupted(Exception):
    """Raised to interrupt a step or an evaluation when the run must stop."""


class ResumeState(TrainerCallback, ExportableState):
    """State saved with a checkpoint in addition to Trainer's own.

    Attributes:
        has_pending_evaluation: the evaluation after the checkpoint's step was interrupted and runs first on resume.
        skipped: the latest consecutive skipped steps: (step, reason, ids of documents).
        losses: losses of the last completed steps.
    """

    def __init__(self) -> None:
        self.has_pending_evaluation = False
        self.skipped: list[tuple[int, str, list[str]]] = []
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": vars(self).copy()}


class ResumableTrainer(Trainer):
    """`Trainer` with atomic checkpoints and exact resuming from any interruption.

    Attributes:
        stop: signal handler that may end the run.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop: StopSignal | None = None
        self.sampler: Sampler | None = None
        self.resume_state = ResumeState()
        self.add_callback(self.resume_state)
        self.control: TrainerControl
        self._is_saving = self._is_interrupted = self._at_epoch_start = False
        self._step_rng_state: list[torch.Tensor] = []
        self._resumed_from: str | None = None

    # ---- interrupting a step or an evaluation ----

    def raise_if_interrupted(self) -> None:
        """Raise TrainingInterrupted, on every process alike, if the run must stop now."""
        if self.stop is not None and self.stop.deadline_reached():
            raise TrainingInterrupted

    def discard_step_stats(self) -> None:
        """Undo the statistics of the current step; a hook for subclasses."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but first record the RNG state, which is saved if this step is interrupted."""
        if not self._at_epoch_start:
            self._step_rng_state = random_state(self.args.device)
        self._at_epoch_start = False
        return super().get_batch_samples(*args, **kwargs)

    def _run_epoch(self, *, epoch: int, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        """Like Trainer's, with fixes.

        Sets the epoch on samplers and datasets that accelerate's loader does not reach, trains no further step when
        resuming a run that had stopped early, and handles interrupted steps.
        """
        for part in (self.sampler, self.train_dataset):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self._run_pending_evaluation(model, trial, epoch):
            kwargs["resume_from_checkpoint"] = self._resumed_from
        if self.control.should_training_stop:
            return
        if epoch == kwargs["epochs_trained"]:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
        # The loader draws a random number when it starts: a checkpoint before the first step needs the state before.
        self._step_rng_state, self._at_epoch_start = random_state(self.args.device), True
        try:
            super()._run_epoch(epoch=epoch, model=model, trial=trial, **kwargs)
        except (TrainingInterrupted, RuntimeError) as error:
            self._raise_unless_interrupted(error)
            self.discard_step_stats()
            self._save_interrupt_checkpoint(model, trial)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        """Like Trainer's, but an interrupted evaluation is marked as pending and runs on resume."""
        if self._is_interrupted:
            return
        should_evaluate = self.control.should_evaluate
        if should_evaluate:
            self._step_rng_state = random_state(self.args.device)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
            is_best = self.state.best_global_step == self.state.global_step
            is_stopped = self.stop is not None and self.stop.agreed is not None
            if should_evaluate and is_stopped and self.args.save_strategy == "best" and not is_best:
                # Trainer has reset should_save, which was set on the signal.
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        except (TrainingInterrupted, RuntimeError) as error:
            self._raise_unless_interrupted(error)
            self.resume_state.has_pending_evaluation = True
            self._save_interrupt_checkpoint(model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Like Trainer's, but save the best checkpoint under any save strategy if it is loaded at the end."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _raise_unless_interrupted(self, error: Exception) -> None:
        """Re-raise errors other than an interruption, or a loader worker killed by the same signal during startup."""
        worker_killed = self.stop is not None and self.stop.received is not None and "DataLoader worker" in str(error)
        if not isinstance(error, TrainingInterrupted) and not (worker_killed and self.args.world_size == 1):
            raise error

    def _save_interrupt_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the state after the last completed step, unless already saved, and end training."""
        self._is_interrupted = self.control.should_training_stop = True
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and (self.resume_state.has_pending_evaluation or checkpoint_problem(folder)):
            set_random_state(self.args.device, self._step_rng_state)
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        self._resumed_from = checkpoint
        result = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        for folder in (Path(checkpoint or "").parent, Path(self._get_output_dir(trial))):
            self._resolve_best_checkpoint(folder)
        return result

    # ---- learning rates ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Like Trainer's, but set the mode of metric-driven schedulers (torch's default is min)."""
        kwargs = self.args.lr_scheduler_kwargs
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            mode = {"mode": "max" if self.args.greater_is_better else "min"}
            self.args.lr_scheduler_kwargs = mode | dict(kwargs or {})
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = kwargs

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Like Trainer's, but a new learning rate or weight decay overrides the checkpoint's.

        Metric-driven schedulers keep the checkpoint's learning rate.
        """
        assert self.optimizer is not None
        settings = [(group.get("initial_lr"), group["weight_decay"]) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for index, (group, (lr, decay)) in enumerate(zip(self.optimizer.param_groups, settings, strict=True)):
            group["weight_decay"] = decay
            if lr is not None and lr != group["initial_lr"]:
                group["lr"] *= lr / group["initial_lr"] if group["initial_lr"] else 0.0
                group["initial_lr"] = self.lr_scheduler.base_lrs[index] = lr
                self.lr_scheduler._last_lr[index] = group["lr"]  # logged before the first scheduler step

    def _resolve_best_checkpoint(self, run_dir: Path, being_saved: Path | None = None) -> None:
        """Update the best checkpoint's path: the run may have moved, and Trainer records the staging folder."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == being_saved or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _run_pending_evaluation(self, model: nn.Module, trial: Any, epoch: int) -> bool:
        """Run an interrupted evaluation, if any.

        The checkpoint is then saved as it would have been without the interruption, and the run resumes from it.
        """
        if not self.resume_state.has_pending_evaluation:
            return False
        logger.info(f"Running the interrupted evaluation of step {self.state.global_step}.")
        self.resume_state.has_pending_evaluation = False
        self._load_rng_state(self._resumed_from)
        self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, True
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, None, 0.0)
        self.control.should_evaluate = self.control.should_save = False
        self._resumed_from = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
        return True

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but keep the last checkpoint whatever `save_total_limit` is, for resuming and for the hub.

        (transformers 5.23 deletes it if only one is kept and another is the best.) An interrupted run does not load its
        best model.
        """
        is_interrupted = self._is_interrupted or (self.stop is not None and self.stop.agreed is not None)
        if not is_interrupted:
            self._run_pending_evaluation(self.model_wrapped, trial, int(self.args.num_train_epochs))
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit, self.args.load_best_model_at_end = None, best and not is_interrupted
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best

    # A signal to the process group must not kill the loader's workers while the run is saving.
    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """Like Trainer's, but workers ignore SIGTERM and SIGINT, and `drop_last` applies to training only."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last
        loader.worker_init_fn = partial(ignore_signals, loader.worker_init_fn)
        return loader

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}/{STAGING_DIR}" if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like Trainer's, but atomic: write to a staging folder, flush, add a manifest, rename, then rotate.

        Raises:
            ValueError: the checkpoint cannot be written.
        """
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder, partial = (parent / f"checkpoint-{step}" for parent in (run_dir, run_dir / STAGING_DIR))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._resolve_best_checkpoint(run_dir, being_saved=folder)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))  # with the best checkpoint's final path
                commit_checkpoint(partial, folder)
                best = self.state.best_model_checkpoint
                rotate(run_dir, limit, {folder, Path(best)} if best else {folder})
        except Exception as error:
            if (reason := disk_error(error)) is None:
                raise
            raise ValueError(_save_error_message(reason, folder)) from error
        finally:
            self._is_saving, self.args.save_total_limit = False, limit
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        """Like Trainer's, after validating the checkpoint."""
        if reason := checkpoint_problem(Path(self.state.best_model_checkpoint or "")):
            raise ValueError(
                f"The best checkpoint, {self.state.best_model_checkpoint}, cannot be loaded: {reason}. To use the last "
                "one: --resume_from_checkpoint auto --load_best_model_at_end False."
            )
        super()._load_best_model()

    def _load_callback_state(self) -> None:
        """Restore the callbacks' state. (Trainer would also restore their arguments, e.g. an old patience.)"""
        saved = self.state.stateful_callbacks
        current = {type(callback).__name__ for callback in [*self.callback_handler.callbacks, self.control]}
        if unknown := sorted(set(saved) - current):
            logger.warning(
                f"The checkpoint holds the state of {', '.join(unknown)}, which this version does not know: the history, "
                "warnings and counters of before are not restored. Weights, optimizer and data order are."
            )
        for callback in self.callback_handler.callbacks:
            if self.args.restore_callback_states_from_checkpoint and isinstance(callback, ExportableState):
                state = saved.setdefault(type(callback).__name__, callback.state())  # Trainer expects one when it saves
                for name, value in (state if isinstance(state, dict) else {}).get("attributes", {}).items():
                    setattr(callback, name, value)


def ignore_signals(worker_init: Callable[[int], None] | None, worker: int) -> None:
    """`worker_init_fn` that ignores SIGTERM and SIGINT, then calls `worker_init`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if worker_init is not None:
        worker_init(worker)


def _save_error_message(error: OSError, folder: Path) -> str:
    """Error message for a checkpoint that could not be written."""
    remedy = "Free disk space (the disk is full)" if is_disk_full(error) else "Check that the directory is writable"
    return (
        f"Saving {folder} failed ({' '.join(str(error).split())[:200]}). Earlier checkpoints are unaffected. "
        f"{remedy} and resume with --resume_from_checkpoint auto."
    )


def format_ids(ids: list[str], most: int = 10) -> str:
    """Join the first ids of a list, and count the rest."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return (", ".join(ids[:most]) or "none") + more
