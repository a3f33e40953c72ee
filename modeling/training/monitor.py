"""Training monitor: detects common training problems and suggests remedies."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .resumable_trainer import format_ids
from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)

# Consecutive skipped steps that end the run. Under fp16 the gradient scaler skips steps to find its scale.
MAX_SKIPPED, MAX_SKIPPED_FP16 = 3, 50
# Warning → suggestion. See docs/guide.md for details.
SUGGESTIONS = {
    "frozen_model": "Remove --freeze_encoder or unfreeze the head.",
    "extreme_class_weights": "A single document of a rare class dominates its batch, which makes training unstable. "
    "Collect more documents of that class or set milder --class_weights.",
    "nan_loss": "Lower --learning_rate, use --bf16 (or fp32: --bf16 False --fp16 False) instead of fp16, and check the "
    "documents.",
    "exploding_loss": "Lower --learning_rate, increase --warmup_steps or lower --max_grad_norm.",
    "not_learning": "Raise --learning_rate (1e-3 with a frozen encoder), check that labels match their texts, or read "
    "more of each document (--max_chunks).",
    "overfitting": "Stop earlier (--early_stopping_patience), raise --weight_decay or --dropout, sample chunks "
    "(--chunk_policy random) or collect more documents.",
    "underfitting": "Train longer (--num_train_epochs), raise --learning_rate, lower --dropout, unfreeze the encoder "
    "or read more chunks (--max_chunks).",
}


class TrainingMonitor(TrainerCallback, ExportableState):
    """Log each warning once, and end a run after too many consecutive skipped steps.

    Args:
        chance, perfect: see `chance_loss`; without them losses that stay high are not reported.

    Attributes:
        warnings: names of the warnings issued, in order.
        failure: why the run was ended, or None.
    """

    def __init__(self, trainer: WeightedTrainer, chance: float = math.inf, perfect: float = 0.0):
        self.trainer, self.chance, self.perfect = trainer, chance, perfect
        self.warnings: list[str] = []
        self.failure: str | None = None
        self.losses: list[float] = []
        self.evaluations: list[tuple[float, float]] = []

    def state(self) -> dict[str, Any]:
        """Everything observed so far, so that a resumed run continues with it."""
        attributes = {"losses": self.losses, "evaluations": self.evaluations, "warnings": self.warnings}
        return {"args": {}, "attributes": attributes}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.failure, self.trainer.has_failed = None, False

    def warn(self, name: str, detail: str) -> None:
        """Log a warning once."""
        if name not in self.warnings:
            self.warnings.append(name)
            if self.trainer.is_world_process_zero():
                logger.warning(f"{name}: {detail}. {SUGGESTIONS[name]}")

    def is_high(self, loss: float, share: float) -> bool:
        """Whether the loss has come less than 1 − share of the way from chance to perfect scores."""
        return loss > self.perfect + share * (self.chance - self.perfect)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        self.losses.append(loss)
        start = sum(self.losses[:3]) / len(self.losses[:3])
        if len(self.losses) > 3 and min(self.losses[-2:]) > 3 * max(start, 0.1):
            detail = f"training loss rose from {start:.3f} to {loss:.3f} (step {state.global_step})"
            self.warn("exploding_loss", detail)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        skipped = self.trainer.resume_state.skipped
        if len(skipped) >= (MAX_SKIPPED_FP16 if args.fp16 else MAX_SKIPPED) and self.failure is None:
            ids = list(dict.fromkeys(id_ for _, _, step_ids in skipped for id_ in step_ids))
            self.warnings.append("nan_loss")
            self.trainer.has_failed = True
            self.failure = (
                f"nan_loss: {len(skipped)} consecutive steps were skipped, most recently step {skipped[-1][0]} "
                f"({skipped[-1][1]}). Documents: {format_ids(ids)}. {SUGGESTIONS['nan_loss']} The checkpoints in "
                f"{args.output_dir} predate these steps; resume with --resume_from_checkpoint auto."
            )
        if self.failure is not None:
            # Do not save or evaluate the diverged model.
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.failure is not None:
            control.should_save = control.should_evaluate = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        totals = self.trainer.stats.totals
        if "eval_loss" not in metrics or not totals["steps"]:
            return
        self.evaluations.append((totals["loss"] / totals["steps"], metrics["eval_loss"]))
        train, evaluated = (list(values) for values in zip(*self.evaluations, strict=True))
        count = len(train)
        if count >= 4 and all(train[-k] < train[-k - 1] and evaluated[-k] > evaluated[-k - 1] for k in (1, 2, 3)):
            self.warn(
                "overfitting",
                "training loss fell while validation loss rose in three consecutive evaluations (now "
                f"{train[-1]:.3f} and {evaluated[-1]:.3f})",
            )
        if count >= 3 and min(train[1:]) > 0.99 * train[0] and self.is_high(train[-1], 0.9):
            self.warn(
                "not_learning",
                f"training loss has not decreased (evaluation 1: {train[0]:.3f}, evaluation {count}: {train[-1]:.3f})",
            )
        halfway = count >= 5 and (state.epoch or 0) >= args.num_train_epochs / 2
        if halfway and self.is_high(min(train[-1], evaluated[-1]), 0.85):
            self.warn(
                "underfitting",
                f"training and validation loss are still high ({train[-1]:.3f} and {evaluated[-1]:.3f}; guessing gives "
                f"{self.chance:.3f})",
            )


def extreme_weights_message(weights: dict[str, float], counts: dict[str, int]) -> str | None:
    """Warning for class weights above 10, or None."""
    if max(weights.values()) <= 10:
        return None
    listed = ", ".join(f"{label} {weight:.1f} ({counts[label]} documents)" for label, weight in weights.items())
    return f"extreme_class_weights: class weights are {listed}. {SUGGESTIONS['extreme_class_weights']}"


def frozen_model_message(model: torch.nn.Module) -> str | None:
    """Error for a model without trainable parameters, or None."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return None
    return f"frozen_model: the model has no trainable parameters. {SUGGESTIONS['frozen_model']}"
