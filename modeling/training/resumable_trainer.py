"""A Trainer that can be interrupted at any point and resumed exactly.

Checkpoints are written atomically. A step or evaluation that would exceed the grace period is interrupted and repeated
when the run is resumed. Base class of WeightedTrainer.
"""

import copy
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..file_utils import disk_error, is_disk_full
from .checkpointing import STAGING_DIR, checkpoint_problem, commit_checkpoint, find_checkpoint, rotate
from .step_conversion import EpochSize, convert_run, saved_epoch_size

if TYPE_CHECKING:
    from .callbacks import SignalCallback

logger = logging.getLogger(__name__)


class TrainingInterrupted(Exception):
    """Raised to end training within a step or an evaluation, or before an epoch's first step."""


class ResumeState(TrainerCallback, ExportableState):
    """State saved with a checkpoint in addition to Trainer's own; restores everything that Trainer does not.

    Attributes:
        has_pending_evaluation: the evaluation after the checkpoint's step was interrupted and runs first on resume.
        skipped: the latest consecutive skipped steps: (step, reason, ids of documents).
        losses: losses of the last completed steps.
        seen: (epoch, documents): how many of that epoch's documents were seen before the effective batch was changed.
    """

    def __init__(self, trainer: "ResumableTrainer") -> None:
        self.trainer = trainer
        self.seen: tuple[int, int] | None = None
        self.first_step = 0  # of this process
        self.has_pending_evaluation = False
        self.skipped: list[tuple[int, str, list[str]]] = []
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        names = ("has_pending_evaluation", "skipped", "losses", "seen")
        attributes = {name: getattr(self, name) for name in names} | {"epoch_size": self.trainer.epoch_size()}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        self.first_step = state.global_step
        self.trainer._saved_step = None
        checkpoint = self.trainer.resumed_from
        if checkpoint is None:
            return
        old_lr = optimizer.param_groups[0]["lr"]
        saved = TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}")
        # Trainer would keep the checkpoint's.
        state.compute_steps(args, state.max_steps)
        state.train_batch_size = args.train_batch_size
        # The run may have moved.
        for folder in (Path(checkpoint).parent, Path(args.output_dir)):
            self.trainer.resolve_best_checkpoint(folder)
        restore_callbacks(self.trainer.callback_handler.callbacks, state)
        if self.trainer.group_settings:
            update_groups(optimizer, lr_scheduler, self.trainer.group_settings)
        if saved.num_train_epochs != state.num_train_epochs:
            logger.info(
                f"The schedule now ends after {state.num_train_epochs} epochs (before: {saved.num_train_epochs}): the "
                f"learning rate changes from {old_lr:.3g} to {optimizer.param_groups[0]['lr']:.3g}."
            )
        if self.has_pending_evaluation:
            self.trainer.run_pending_evaluation()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.seen = self.seen
        size = self.trainer.epoch_size()
        epoch = state.global_step // size.steps_per_epoch if size and size.steps_per_epoch else int(state.epoch or 0)
        # accelerate's loader reaches neither a sampler that it has sharded nor a stream.
        for part in (self.trainer.sampler, self.trainer.train_dataset):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Save the best checkpoint under any save strategy, if it is loaded at the end."""
        value = metrics.get(f"eval_{(args.metric_for_best_model or '').removeprefix('eval_')}")
        if value is None or not (self.trainer.is_in_train and args.load_best_model_at_end and state.global_step):
            return
        best = state.best_metric
        is_best = best is None or (value > best if args.greater_is_better else value < best)
        control.should_save = control.should_save or is_best


def restore_callbacks(callbacks: list[TrainerCallback], state: TrainerState) -> None:
    """Restore the callbacks' attributes from a checkpoint. (Trainer would replace the callbacks, and restore e.g. an old
    patience too.)"""
    current = {type(callback).__name__: callback for callback in callbacks if isinstance(callback, ExportableState)}
    if unknown := sorted(set(state.stateful_callbacks) - set(current) - {TrainerControl.__name__}):
        logger.warning(
            f"The checkpoint holds the state of {', '.join(unknown)}, which this version does not know: the history, "
            "warnings and counters of before are not restored. Weights, optimizer and data order are."
        )
    for name, callback in current.items():
        # Trainer expects one of each when it saves.
        set_attributes(callback, state.stateful_callbacks.setdefault(name, callback.state()))


def set_attributes(callback: TrainerCallback, saved: Any) -> None:
    """Set the attributes of a callback's saved state."""
    for name, value in (saved if isinstance(saved, dict) else {}).get("attributes", {}).items():
        setattr(callback, name, value)


def update_groups(optimizer: Any, lr_scheduler: Any, settings: list[tuple[float | None, float]]) -> None:
    """Let a new learning rate, schedule or weight decay override a checkpoint's.

    Metric-driven schedulers keep the learning rate.

    Args:
        settings: learning rate at the start of the schedule, and weight decay, of each parameter group.
    """
    for index, (group, (lr, decay)) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        group["weight_decay"] = decay
        if isinstance(lr_scheduler, LambdaLR) and lr is not None:
            group["initial_lr"] = lr_scheduler.base_lrs[index] = lr
            group["lr"] = lr * lr_scheduler.lr_lambdas[index](lr_scheduler.last_epoch)
            lr_scheduler._last_lr[index] = group["lr"]  # logged before the first scheduler step


class ResumableTrainer(Trainer):
    """`Trainer` with atomic checkpoints and exact resuming from any interruption.

    Attributes:
        stop: signal handler that may end the run.
        sampler: the order of the training documents.
        resumed_from: checkpoint that training resumed from.
        group_settings: learning rate and weight decay of each of the optimizer's groups, as configured.
        has_failed: whether a callback has ended training because it diverged: the model is not saved.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop: SignalCallback | None = None
        self.sampler: Any = None
        self.resumed_from: str | None = None
        self.group_settings: list[tuple[float | None, float]] = []
        self.has_failed = False
        self.resume_state = ResumeState(self)
        self.add_callback(self.resume_state)
        self.control: TrainerControl
        self.args.restore_callback_states_from_checkpoint = False  # `ResumeState` restores them
        self._is_saving = False
        self._saved_step: int | None = None
        self._initial_states: dict[TrainerCallback, Any] = {}

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal has ended the run."""
        return self.stop is not None and self.stop.agreed is not None

    def raise_if_interrupted(self) -> None:
        """Raise TrainingInterrupted, on every process alike, if the run must stop now."""
        if self.stop is not None and self.stop.deadline_reached():
            raise TrainingInterrupted

    def epoch_size(self) -> EpochSize | None:
        """Documents of a step and steps of an epoch, for resuming with another effective batch; a hook for subclasses."""
        return None

    def restore_step_start(self) -> None:
        """Undo the current step's statistics and random numbers; a hook for subclasses."""

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but an interrupted run ends with a checkpoint of its last completed step.

        `eval_on_start` evaluates at the start of a run only, not whenever it is resumed.
        """
        started = time.time()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_checkpoint(self.args.output_dir, "auto")
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} holds no checkpoint to resume from.")
        self.resumed_from = checkpoint = self._checkpoint_for_this_epoch(resume_from_checkpoint or None)
        # Last of the callbacks, so that the others are ready when it runs an evaluation.
        self.remove_callback(self.resume_state)
        self.add_callback(self.resume_state)
        self._reset_callbacks()
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and checkpoint is None
        try:
            return super().train(checkpoint, trial, *args, **kwargs)
        except (TrainingInterrupted, RuntimeError) as error:
            self._raise_unless_interrupted(error)
            self.restore_step_start()
            return self._finalize_training(trial, 0, started)
        finally:
            self.args.eval_on_start = eval_on_start

    def _reset_callbacks(self) -> None:
        """Give the callbacks the state that they had before the first training."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                initial = self._initial_states.setdefault(callback, copy.deepcopy(callback.state()))
                set_attributes(callback, copy.deepcopy(initial))

    # Trainer would delete the last checkpoint if only one is kept and another is the best: it is for resuming, and for the
    # hub. An interrupted run is saved before trackers and other callbacks end.
    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but keep the last checkpoint, and save an interrupted run first."""
        if self.stop is not None:
            self.stop.sync()  # a signal since the last step
        if self.is_interrupted and not self.has_failed:
            self._save_if_missing(trial)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _checkpoint_for_this_epoch(self, checkpoint: str | None) -> str | None:
        """The checkpoint, converted if it was written with other steps an epoch or documents a step."""
        old, new = checkpoint and saved_epoch_size(Path(checkpoint)), self.epoch_size()
        if not checkpoint or not old or new is None or old == new:
            return checkpoint
        return str(convert_run(Path(checkpoint), Path(self.args.output_dir), old, new, self.accelerator))

    def _raise_unless_interrupted(self, error: Exception) -> None:
        """Re-raise errors other than an interruption, or a loader worker killed by the same signal during startup."""
        if isinstance(error, TrainingInterrupted):
            return
        is_worker_killed = (
            self.stop is not None and self.stop.received is not None and "DataLoader worker" in str(error)
        )
        if not is_worker_killed or self.args.world_size > 1:
            raise error
        assert self.stop is not None
        self.stop.sync()

    def _save_if_missing(self, trial: Any) -> None:
        """Save the state after the last completed step, unless it is already saved."""
        step, first_step = self.state.global_step, self.resume_state.first_step
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"  # resumed from another run's otherwise
        is_saved = step in (0, self._saved_step) or (step == first_step and folder.is_dir())
        if self.resume_state.has_pending_evaluation or not is_saved:
            self._save_checkpoint(self.model_wrapped, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Like Trainer's, but an evaluation of training that is interrupted runs first on resume."""
        self.resume_state.has_pending_evaluation = self.is_in_train and self.state.global_step > 0
        metrics = super().evaluate(*args, **kwargs)
        self.resume_state.has_pending_evaluation = False
        return metrics

    def run_pending_evaluation(self) -> None:
        """Run an interrupted evaluation, and save the checkpoint as it would have been without the interruption."""
        logger.info(f"Running the interrupted evaluation of step {self.state.global_step}.")
        self.resume_state.has_pending_evaluation = False
        self._load_rng_state(self.resumed_from)  # saved again with the checkpoint
        self.control.should_log, self.control.should_evaluate, self.control.should_save = False, True, True
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, 0.0)
        self.control.should_evaluate = self.control.should_save = False

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

    # ---- checkpoints ----

    def resolve_best_checkpoint(self, run_dir: Path, being_saved: Path | None = None) -> None:
        """Update the best checkpoint's path: the run may have moved, and Trainer records the staging folder."""
        best = run_dir / f"checkpoint-{self.state.best_global_step}"
        if best == being_saved or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return f"{folder}/{STAGING_DIR}" if self._is_saving else folder

    # Trainer writes in place: a killed run would leave an incomplete checkpoint.
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like Trainer's, but atomic: write to a staging folder, flush, add a manifest, rename, then rotate.

        Raises:
            ValueError: the checkpoint cannot be written.
        """
        run_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder, partial = (parent / f"checkpoint-{step}" for parent in (run_dir, run_dir / STAGING_DIR))
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self.resolve_best_checkpoint(run_dir, being_saved=folder)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))  # with the best checkpoint's final path
                commit_checkpoint(partial, folder)
                best = self.state.best_model_checkpoint
                rotate(run_dir, self.args.save_total_limit, {folder, Path(best)} if best else {folder})
        except Exception as error:
            if (reason := disk_error(error)) is None:
                raise
            raise ValueError(_save_error_message(reason, folder)) from error
        finally:
            self._is_saving = False
        self._saved_step = step
        self.accelerator.wait_for_everyone()

    # Trainer would keep the last model if the best checkpoint is missing.
    def _load_best_model(self) -> None:
        """Like Trainer's, after validating the checkpoint; an interrupted run does not need its best model."""
        if self.is_interrupted:
            return
        if reason := checkpoint_problem(Path(self.state.best_model_checkpoint or "")):
            raise ValueError(
                f"The best checkpoint, {self.state.best_model_checkpoint}, cannot be loaded: {reason}. To use the last "
                "one: --resume_from_checkpoint auto --load_best_model_at_end False."
            )
        super()._load_best_model()


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
