"""What surrounds a training: the locked output_dir, logging and pushing, callbacks, signals. Used by train_hf.py."""

import logging
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback

from data.labels import MULTI
from modeling.training.callbacks import (
    EarlyStopping,
    EvaluationLogCallback,
    HistoryCallback,
    ProgressLogCallback,
    SignalCallback,
)
from modeling.training.checkpointing import find_checkpoint
from modeling.training.losses import chance_loss
from modeling.training.monitor import TrainingMonitor
from modeling.training.runtime import set_num_threads
from modeling.training.tensorboard import TensorBoard
from modeling.training.trackers import FigureCallback
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.common.log_setup import set_up_logging
from scripts.hub.pusher import HubPusher, start_pushing
from scripts.training.output_dir import lock_output_dir

logger = logging.getLogger("train_hf")
# gloo's errors have no type of their own: these words in one mean that another rank is gone.
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")


@contextmanager
def run_context(args: HierarchicalTrainingArguments) -> Iterator[HubPusher | None]:
    """Lock output_dir, set up logging and threads, start pushing. Gives the pusher, None where nothing is pushed.

    Raises:
        ValueError: also for errors of a lost rank or of a checkpoint that holds more than tensors.
    """
    writes = args.process_index == 0 and not args.dry_run
    with ExitStack() as stack:
        if writes:
            stack.enter_context(lock_output_dir(Path(args.output_dir)))
        with_details = args.log_level in ("debug", "info")
        set_up_logging(Path(args.output_dir) if writes else None, terminal_level(args), with_details)
        logger.info(f"Precision: {args.precision} ({args.precision_reason}).", extra={"detail": True})
        if args.device.type == "cpu":
            logger.info(f"CPU threads: {set_num_threads(args.cpu_threads)}.", extra={"detail": True})
        try:
            pusher = start_pushing(args)
            yield stack.enter_context(pusher) if pusher else None
        except RuntimeError as error:
            if args.world_size > 1 and (isinstance(error, DistError) or any(s in str(error) for s in CONNECTION_LOST)):
                raise ValueError(lost_connection_message(args.process_index, error)) from error
            raise
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"A file of the checkpoint {args.resume_from_checkpoint} holds more than tensors and is not loaded, since it "
                f"could run code ({str(error).splitlines()[0]})."
            ) from error


def lost_connection_message(rank: int, error: RuntimeError) -> str:
    """Error message of a rank whose collective call failed."""
    return (
        f"Rank {rank} lost its connection to the other ranks ({' '.join(str(error).split())[:200]}): one of them ended, as "
        "the launcher reports below, or its machine is unreachable. Restart all of them with --resume_from_checkpoint auto."
    )


def terminal_level(args: HierarchicalTrainingArguments) -> int:
    """Minimum log level on this process's terminal."""
    if args.process_index == 0 and args.log_level == "passive":
        return logging.INFO
    return args.get_process_log_level()


@dataclass
class Watchers:
    """Callbacks whose state the run reads."""

    history: HistoryCallback
    monitor: TrainingMonitor
    signals: SignalCallback


def add_callbacks(
    trainer: WeightedTrainer,
    labels: list[str],
    config: dict[str, Any],
    args: HierarchicalTrainingArguments,
    pusher: HubPusher | None,
) -> Watchers:
    """Add the run's callbacks.

    The monitor comes after the signals, as a diverged model must not be saved, and before the history, which resets the
    totals that it reads.
    """
    early_stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_min_delta)
    counts = list(config["label_counts"]["train"].values())
    chance = chance_loss(
        counts,
        config["num_documents"]["train"],
        trainer.class_weights,
        config["problem_type"] == MULTI,
        args.label_smoothing_factor,
    )
    monitor, signals = TrainingMonitor(trainer, *chance), SignalCallback(args.grace_seconds, args.ddp_timeout)
    trainer.stop = signals
    history = HistoryCallback(trainer, early_stopping, config)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    board = TensorBoard(trainer, config) if trainer.pop_callback(TensorBoardCallback) else None
    figures = FigureCallback(trainer, labels)
    evaluation_log = EvaluationLogCallback(history, labels)
    for callback in (
        ProgressLogCallback(),
        early_stopping,
        board,
        figures,
        signals,
        monitor,
        history,
        evaluation_log,
        pusher,
    ):
        if callback is not None:
            trainer.add_callback(callback)
    return Watchers(history, monitor, signals)


def train(trainer: WeightedTrainer, checkpoint: str | None, watchers: Watchers, pusher: HubPusher | None) -> int:
    """Train to the end or to a signal. Returns the exit status: 0, or 128 plus the signal that ended it.

    Raises:
        ValueError: the monitor ended the training.
    """
    args: Any = trainer.args
    monitor, signals = watchers.monitor, watchers.signals
    with signals.listening(), without_loader_workers(args) if args.freeze_encoder else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
        signals.sync()
    trainer.stop = None
    if monitor.failure or signals.exit_status:
        if pusher is not None:
            seconds_left = signals.seconds_left if signals.exit_status else args.grace_seconds
            pusher.finish(None, seconds=max(seconds_left, 1.0), final=False)
        # A launcher ends the other ranks as soon as one has failed: rank 0 pushes what it has first.
        trainer.accelerator.wait_for_everyone()
    if monitor.failure:
        raise ValueError(monitor.failure)
    if signals.exit_status:
        step = trainer.state.global_step
        saved = f"at step {step}, checkpoint saved" if step else "before the first step, nothing to save"
        logger.warning(f"Interrupted {saved}. Resume with --resume_from_checkpoint auto.")
    return signals.exit_status or 0


@contextmanager
def without_loader_workers(args: HierarchicalTrainingArguments) -> Iterator[None]:
    """A step on cached embeddings is faster than a worker can send a batch: train without workers."""
    options = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None}
    before = {name: getattr(args, name) for name in options}
    for name, value in options.items():
        setattr(args, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def push_final(pusher: HubPusher | None, output_dir: str) -> int:
    """Push the finished run. Returns the exit status."""
    if pusher is None:
        return 0
    last = find_checkpoint(output_dir, "auto")
    return 0 if pusher.finish(Path(last) if last else None) else 1
