"""A Trainer whose run can be stopped anywhere and gone on with as if it had not been.

Checkpoints are whole or not there; a step, or an evaluation, for which there is no time is given up, and is what a resumed
run begins with. Used through WeightedTrainer.
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
    """What ends a run on a signal: SignalCallback.

    Attributes:
        received: the signal that this process was sent, or None.
        agreed: the one that all processes stop for, or None.
    """

    received: int | None
    agreed: int | None

    def deadline_reached(self) -> bool:
        """Whether there is no time left to end the step. Every process asks, before each micro-batch."""


class TrainingInterrupted(Exception):
    """A step or an evaluation is not ended, since the run has to stop."""


class ResumeState(TrainerCallback, ExportableState):
    """What a checkpoint tells the run that goes on from it, beside Trainer's own state.

    Attributes:
        has_pending_evaluation: the evaluation after its step was given up, and comes first.
        skipped: the steps in a row, up to this one, that were not taken: (step, what was wrong, ids of documents).
        losses: of the last steps that were taken.
    """

    def __init__(self) -> None:
        self.has_pending_evaluation = False
        self.skipped: list[tuple[int, str, list[str]]] = []
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": vars(self).copy()}


class ResumableTrainer(Trainer):
    """`Trainer` with whole checkpoints and exact resuming, wherever the run was stopped.

    Attributes:
        stop: what may end the run on a signal.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop: StopSignal | None = None
        self.sampler: Sampler | None = None
        self.carried = ResumeState()
        self.add_callback(self.carried)
        self.control: TrainerControl
        self._is_saving = self._has_given_up = self._epoch_begins = False
        self._step_rng_state: list[torch.Tensor] = []
        self._resumed_from: str | None = None

    # ---- stopping within a step or an evaluation ----

    def raise_if_interrupted(self) -> None:
        """Raises TrainingInterrupted where the run has to stop now, on every process alike."""
        if self.stop is not None and self.stop.deadline_reached():
            raise TrainingInterrupted

    def discard_step_stats(self) -> None:
        """Forget what was counted of the present step. (Nothing is, here.)"""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, after keeping the random state: what a checkpoint must hold if this step is given up."""
        if not self._epoch_begins:
            self._step_rng_state = random_state(self.args.device)
        self._epoch_begins = False
        return super().get_batch_samples(*args, **kwargs)

    def _run_epoch(self, *, epoch: int, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        """As Trainer's, with mends: accelerate's loader does not tell the epoch to every sampler and data set that it
        wraps; a run that had stopped early would train one step more when it is resumed; and a step may be given up."""
        for part in (self.sampler, self.train_dataset):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self._run_pending_evaluation(model, trial, epoch):
            kwargs["resume_from_checkpoint"] = self._resumed_from
        if self.control.should_training_stop:
            return
        if epoch == kwargs["epochs_trained"]:
            self._load_rng_state(kwargs["resume_from_checkpoint"])
        # The loader draws a number when it begins: a checkpoint before an epoch's first step has the state before that.
        self._step_rng_state, self._epoch_begins = random_state(self.args.device), True
        try:
            super()._run_epoch(epoch=epoch, model=model, trial=trial, **kwargs)
        except (TrainingInterrupted, RuntimeError) as error:
            self._raise_unless_stopped(error)
            self.discard_step_stats()
            self._save_interrupt_checkpoint(model, trial)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kw: Any
    ) -> None:
        """As Trainer's; an evaluation that is given up is due when the run is resumed."""
        if self._has_given_up:
            return
        evaluates = self.control.should_evaluate
        if evaluates:
            self._step_rng_state = random_state(self.args.device)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kw)
            is_best = self.state.best_global_step == self.state.global_step
            is_stopped = self.stop is not None and self.stop.agreed is not None
            if evaluates and is_stopped and self.args.save_strategy == "best" and not is_best:
                # Trainer has taken back that the stopped run is to be saved.
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        except (TrainingInterrupted, RuntimeError) as error:
            self._raise_unless_stopped(error)
            self.carried.has_pending_evaluation = True
            self._save_interrupt_checkpoint(model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; the best is saved whatever the strategy, where it is to be loaded in the end."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _raise_unless_stopped(self, error: Exception) -> None:
        """Any error but a step that is given up; or a loader's worker that the same signal has ended while it was starting."""
        lost_worker = self.stop is not None and self.stop.received is not None and "DataLoader worker" in str(error)
        if not isinstance(error, TrainingInterrupted) and not (lost_worker and self.args.world_size == 1):
            raise error

    def _save_interrupt_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save the state after the last whole step, unless it is saved, and end the training."""
        self._has_given_up = self.control.should_training_stop = True
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.state.global_step and (self.carried.has_pending_evaluation or checkpoint_problem(folder)):
            set_random_state(self.args.device, self._step_rng_state)
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        self._resumed_from = checkpoint
        done = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        for folder in (Path(checkpoint or "").parent, Path(self._get_output_dir(trial))):
            self._resolve_best_checkpoint(folder)
        return done

    # ---- rates ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's; a schedule that follows the metric is told which way is better (torch's own mode is min)."""
        given = self.args.lr_scheduler_kwargs
        if self.args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            mode = {"mode": "max" if self.args.greater_is_better else "min"}
            self.args.lr_scheduler_kwargs = mode | dict(given or {})
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = given

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's; rates and weight decay that were given anew count, where the checkpoint's would. (Not of a schedule
        that follows the metric, whose rate is what it has come to.)"""
        assert self.optimizer is not None
        given = [(group.get("initial_lr"), group["weight_decay"]) for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for number, (group, (rate, decay)) in enumerate(zip(self.optimizer.param_groups, given, strict=True)):
            group["weight_decay"] = decay
            if rate is not None and rate != group["initial_lr"]:
                group["lr"] *= rate / group["initial_lr"] if group["initial_lr"] else 0.0
                group["initial_lr"] = self.lr_scheduler.base_lrs[number] = rate
                self.lr_scheduler._last_lr[number] = group["lr"]  # what is logged first

    def _resolve_best_checkpoint(self, run_dir: Path, being_saved: Path | None = None) -> None:
        """Where the best checkpoint is now: the run may have moved, and Trainer looks in `.saving`."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == being_saved or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _run_pending_evaluation(self, model: nn.Module, trial: Any, epoch: int) -> bool:
        """The evaluation that was given up, if one was; the checkpoint then is what it would have been without the stop, and
        what the run goes on from."""
        if not self.carried.has_pending_evaluation:
            return False
        logger.info(f"Evaluating after step {self.state.global_step} first: the run was stopped in that evaluation.")
        self.carried.has_pending_evaluation = False
        self._load_rng_state(self._resumed_from)
        self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, True
        self._maybe_log_save_evaluate(self._tr_loss, None, model, trial, epoch, None, 0.0)
        self.control.should_evaluate = self.control.should_save = False
        self._resumed_from = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
        return True

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but the last checkpoint stays, whatever `save_total_limit`: what a stopped run goes on from, and
        what the hub is given. (transformers 5.23 deletes it where only one may be kept and another is the best.) A run that
        was stopped has no use for its best model."""
        is_stopped = self._has_given_up or (self.stop is not None and self.stop.agreed is not None)
        if not is_stopped:
            self._run_pending_evaluation(self.model_wrapped, trial, int(self.args.num_train_epochs))
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit, self.args.load_best_model_at_end = None, best and not is_stopped
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best

    # A signal to the whole group of processes shall not take the loader's workers from a run that is saving itself.
    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """As Trainer's, with workers that leave SIGTERM and Ctrl-C to the process that they work for; an incomplete batch
        is dropped in training only."""
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
        """As Trainer's, in a folder beside; it gets its name, with a manifest, when every byte is on disk. Older ones
        are deleted only then.

        Raises:
            ValueError: it cannot be written.
        """
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder, partial = (place / f"checkpoint-{step}" for place in (run_dir, run_dir / STAGING_DIR))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self._resolve_best_checkpoint(run_dir, being_saved=folder)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))  # with the name that the folder will have
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
        """As Trainer's, of a checkpoint that is whole."""
        if reason := checkpoint_problem(Path(self.state.best_model_checkpoint or "")):
            raise ValueError(
                f"The best checkpoint, {self.state.best_model_checkpoint}, cannot be used: {reason}. The last one can: "
                "--resume_from_checkpoint auto --load_best_model_at_end False."
            )
        super()._load_best_model()

    def _load_callback_state(self) -> None:
        """Restores what callbacks counted. (Trainer builds them anew with the checkpoint's arguments, which would undo
        a patience given now.)"""
        for callback in self.callback_handler.callbacks:
            if self.args.restore_callback_states_from_checkpoint and isinstance(callback, ExportableState):
                saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in (saved if isinstance(saved, dict) else {}).get("attributes", {}).items():
                    setattr(callback, name, value)


def ignore_signals(then: Callable[[int], None] | None, worker: int) -> None:
    """What a loader's worker begins with: it leaves SIGTERM and Ctrl-C to the process that it works for."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _save_error_message(error: OSError, folder: Path) -> str:
    """For people, where a checkpoint could not be written."""
    mend = (
        "Make room on the disk (the disk is full)" if is_disk_full(error) else "See that the folder can be written to"
    )
    return (
        f"{folder} could not be saved ({' '.join(str(error).split())[:200]}). The checkpoints saved before it are as they were. "
        f"{mend}, and go on with --resume_from_checkpoint auto."
    )


def format_ids(ids: list[str], most: int = 10) -> str:
    """The first ids of a list, and how many more there are."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return (", ".join(ids[:most]) or "without ids") + more
