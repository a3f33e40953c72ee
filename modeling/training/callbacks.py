"""Callbacks: early stopping, training history, logging and signals.

TensorBoard is in tensorboard.py, warnings about unhealthy training in monitor.py.
"""

import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import has_length

from ..file_utils import write_json
from .runtime import format_duration, peak_memory
from .sharding import gloo_group
from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)


class EarlyStopping(EarlyStoppingCallback):
    """Stop after `patience` consecutive evaluations without improvement.

    The metric must exceed the reference value by more than `min_delta`, and only such an improvement updates the
    reference (Prechelt 1998; as in Keras). The callback in transformers compares with the best value so far, which can
    drift by steps below the threshold. An evaluation before the first step does not count.

    Args:
        patience: number of evaluations; 0 disables early stopping.
        min_delta: minimum improvement of `args.metric_for_best_model`.
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.001):
        super().__init__(patience or sys.maxsize, min_delta)
        self.best: float | None = None

    def state(self) -> dict[str, Any]:
        names = ("best", "early_stopping_patience_counter")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: without evaluations, or without the best model at the end, it has nothing to do."""

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.has_stopped:  # before this run was resumed
            logger.info(
                f"{self.early_stopping_patience_counter} evaluations without improvement already: to train on, raise "
                f"--early_stopping_patience ({self.early_stopping_patience})."
            )
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> None:
        if args.metric_for_best_model is not None:
            super().on_evaluate(args, *rest, **kwargs)

    def check_metric_value(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metric_value: float
    ) -> None:
        if state.global_step == 0:
            return
        sign = 1 if args.greater_is_better else -1
        if self.best is None or (metric_value - self.best) * sign > (self.early_stopping_threshold or 0.0):
            self.best, self.early_stopping_patience_counter = metric_value, 0
        else:
            self.early_stopping_patience_counter += 1


class HistoryCallback(TrainerCallback, ExportableState):
    """Write training_history.json: config, a record per evaluation, the best one, and whether the run stopped early.

    A record of step 0 (`eval_on_start`) is a baseline: it is never the best.

    Args:
        config: stored unchanged under "config".
    """

    def __init__(self, trainer: WeightedTrainer, early_stopping: EarlyStopping, config: dict[str, Any]):
        self.trainer, self.early_stopping, self.config = trainer, early_stopping, config
        self.epochs: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"epochs": self.epochs}}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        totals = self.trainer.stats.totals
        seconds = max(totals["seconds"], 1e-9)
        grad_norm = self.trainer.last_grad_norm
        self.epochs.append(
            {
                "epoch": round(state.epoch or 0.0, 4),
                "step": state.global_step,
                "train_loss": totals["loss"] / totals["steps"] if totals["steps"] else None,
                **{name: value for name, value in metrics.items() if not is_timing(name)},
                "learning_rate": self.trainer.learning_rates(),
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "skipped_steps": round(totals["skipped"]),
                "seconds": totals["seconds"],
                "eval_seconds": metrics.get("eval_runtime"),
                "documents_per_second": totals["documents"] / seconds,
                "chunks_per_second": totals["chunks"] / seconds,
                "data_wait_share": totals["data_seconds"] / seconds,
                "padding_share": self.trainer.padding_share(),
                **peak_memory(args.device),
            }
        )
        self.trainer.stats.reset_totals()
        self.write(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.write(args, state)

    def record(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Content of the file."""
        name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        scored = [epoch for epoch in self.epochs if epoch["step"] and epoch.get(name) is not None]
        pick = max if args.greater_is_better else min
        best = pick(scored, key=lambda epoch: epoch[name]) if scored else None
        return {
            "config": self.config,
            "epochs": self.epochs,
            "best": best and {key: best[key] for key in ("epoch", "step", name)},
            "stopped_early": self.early_stopping.has_stopped,
        }

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_json(Path(args.output_dir) / "training_history.json", self.record(args, state))


def is_timing(name: str) -> bool:
    """Whether an evaluation's metric is how long it took, or when it was, and no measure of the model."""
    timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    return name.removeprefix("eval_") in timing


class SignalCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C, finish the step, save a checkpoint and end training.

    A step or evaluation that takes longer than half the grace period (on GPUs, plus a micro-batch) is interrupted (see
    resumable_trainer.py). A second Ctrl-C stops immediately. In distributed training it must be created on all
    processes together.

    Args:
        grace_seconds: seconds from the signal to the exit.
        timeout: seconds to wait for the other ranks (`ddp_timeout`).

    Attributes:
        received: signal received by this process.
        agreed: signal on which all processes stop, after the same step.
    """

    def __init__(self, grace_seconds: float = 30.0, timeout: float = 1800.0) -> None:
        self.grace_seconds = grace_seconds
        self.received: int | None = None
        self.received_at = 0.0
        self.agreed: int | None = None
        self.group = gloo_group(timeout) if torch.distributed.is_initialized() else None
        # Micro-batches on a GPU are short, so ranks do not wait for each other at each of them.
        self.asks_ahead = self.group is not None and "nccl" in torch.distributed.get_backend()
        self._pending_reduce: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        handlers = [signal.signal(number, self._receive) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, handlers, strict=True):
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()

    def sync(self) -> int | None:
        """Synchronize the received signal across processes. A collective call: every process must take part."""
        self.agreed = self.agreed or self._all_reduce_max(self.received or 0) or None
        return self.agreed

    def deadline_reached(self) -> bool:
        """Whether half the grace period has passed on any rank. A collective call: every rank must take part.

        With `asks_ahead` it returns the result of the previous call, so that no rank waits.
        """
        is_late = int(self.received is not None and self.seconds_left <= self.grace_seconds / 2)
        if not self.asks_ahead:
            return bool(self._all_reduce_max(is_late)) and self.sync() is not None
        was_late = self._finish_reduce()
        greatest = torch.tensor(is_late)
        work = torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, self.group, async_op=True)
        self._pending_reduce = (greatest, work)
        return was_late and self.sync() is not None

    def _finish_reduce(self) -> bool:
        if self._pending_reduce is None:
            return False
        greatest, work = self._pending_reduce
        self._pending_reduce = None
        work.wait()
        return bool(greatest)

    @property
    def seconds_left(self) -> float:
        """Seconds left of the grace period."""
        return self.grace_seconds - (time.monotonic() - self.received_at)

    def _all_reduce_max(self, number: int) -> int:
        if self.group is None:
            return number
        self._finish_reduce()  # collectives of a group complete in order
        greatest = torch.tensor(number)
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX, self.group)
        return int(greatest)

    @property
    def exit_status(self) -> int | None:
        """130 for Ctrl-C, 143 for SIGTERM, None without a signal."""
        return None if self.agreed is None else 128 + self.agreed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.sync():
            control.should_training_stop = True
            # At the end of an epoch an evaluation may follow; the trainer saves after it.
            if not (_epoch_has_ended(state) and args.save_strategy in ("epoch", "best")):
                control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # In mid-epoch the checkpoint of this step has been saved; do nothing more within the grace period.
        if self.agreed is not None and not _epoch_has_ended(state):
            control.should_evaluate, control.should_save = False, False


def _epoch_has_ended(state: TrainerState) -> bool:
    """Whether an epoch is over, or the last one, which may be cut short."""
    return float(state.epoch or 0.5).is_integer() or state.global_step >= state.max_steps


class ProgressLogCallback(ProgressCallback):
    """Progress bar, on terminals only; logged values become lines, also in training.log."""

    prediction_bar: Any

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm or None)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self.prediction_bar is None:
            # On the line of the training bar: a second line would need cursor movements, which leave escape codes.
            total = len(eval_dataloader)
            disable = args.disable_tqdm or None
            self.prediction_bar = tqdm(total=total, position=0, leave=False, dynamic_ncols=True, disable=disable)
        self.prediction_bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        values = {name.removeprefix("eval_"): value for name, value in logs.items() if isinstance(value, float)}
        kind = "evaluation" if "eval_loss" in logs else "training"
        listed = ", ".join(
            f"{name} {value:.4g}"
            for name, value in values.items()
            if not is_timing(name) and name != "learning_rate" and not name.startswith("support_")
        )
        line = f"step {state.global_step}, epoch {state.epoch:.2f}: {kind}: {listed}"
        logger.info(line, extra={"detail": True})


class EvaluationLogCallback(TrainerCallback):
    """Log one summary line per evaluation: losses, the best metric so far, and the remaining time.

    Must be added after `history`, whose latest record it reads.
    """

    def __init__(self, history: HistoryCallback, labels: list[str]):
        self.history, self.labels = history, labels

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or not self.history.epochs:
            return
        records = self.history.epochs
        new, previous = records[-1], records[-2] if len(records) > 1 else {"step": 0}
        name = (args.metric_for_best_model or "loss").removeprefix("eval_")
        parts = [f"epoch {new['epoch']:g} of {args.num_train_epochs:g}"]
        if args.max_steps > 0:
            parts = [f"step {state.global_step} of {state.max_steps}"]
        train_loss = "" if new["train_loss"] is None else f"train loss {new['train_loss']:.3f}, "
        parts.append(f"{train_loss}validation loss {new.get('eval_loss', math.nan):.3f}")
        best = self.history.record(args, state)["best"]
        if f"eval_{name}" in new and name != "loss":
            rank = "before training"
            if best is not None:
                is_new = best["step"] == new["step"]
                rank = "best so far" if is_new else f"best {best[f'eval_{name}']:.3f} in epoch {best['epoch']:g}"
            parts.append(f"{name} {new[f'eval_{name}']:.3f} ({rank})")
        recalls = [(label, new.get(f"eval_recall_{label}")) for label in self.labels]
        if len(recalls) <= 6 and all(recall is not None for _, recall in recalls):
            parts.append("recall " + ", ".join(f"{label} {recall:.2f}" for label, recall in recalls))
        seconds = new["seconds"] + (new["eval_seconds"] or 0)
        steps = new["step"] - previous["step"]
        parts.append(format_duration(seconds))
        if control.should_training_stop or state.global_step >= state.max_steps:
            parts[-1] += ", finished"
        elif steps > 0:
            parts[-1] += f", at most {format_duration(seconds / steps * (state.max_steps - state.global_step))} left"
        logger.info("; ".join(parts))
