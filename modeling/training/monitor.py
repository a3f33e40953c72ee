"""The health watch: names what goes wrong in training, and says what to do about it."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .resumable_trainer import format_ids
from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)

# Steps in a row that are not taken before the run is ended. Under fp16 the scaler looks for its scale that way.
MOST_SKIPPED, MOST_SKIPPED_FP16 = 3, 50
# Sign → what it means and what helps. docs/guide.md explains each at more length.
SUGGESTIONS = {
    "frozen_model": "no parameter is trained. Leave --freeze_encoder out, or unfreeze the head.",
    "extreme_class_weights": "one document of a rare class outweighs many others and makes training jumpy. Gather more "
    "of that class, or give softer --class_weights.",
    "nan_loss": "The arithmetic broke down, or the loss leapt. Lower --learning_rate, use --bf16 (or fp32: --bf16 False --fp16 False) in "
    "place of fp16, look for broken documents.",
    "exploding_loss": "the loss is far above where it began. Lower --learning_rate, lengthen --warmup_steps, lower "
    "--max_grad_norm.",
    "not_learning": "the training loss does not fall. Raise --learning_rate (1e-3 with a frozen encoder), check that "
    "labels belong to their texts, train on more of each document (--max_chunks).",
    "overfitting": "the training loss falls and the validation loss rises. Stop earlier (--early_stopping_patience), "
    "raise --weight_decay or --dropout, draw chunks at random (--chunk_policy random), gather more documents.",
    "underfitting": "training and validation loss are both still high. Train longer or faster (--num_train_epochs, "
    "--learning_rate), lower --dropout, unfreeze the encoder, read more chunks.",
}


class TrainingMonitor(TrainerCallback, ExportableState):
    """Warns of each sign once, and ends a run whose steps cannot be taken.

    Attributes:
        signs: the signs seen, in order.
        failure: why the run was ended, or None.
    """

    def __init__(self, trainer: WeightedTrainer):
        self.trainer = trainer
        self.warnings: list[str] = []
        self.failure: str | None = None
        self.losses: list[float] = []
        self.evaluations: list[tuple[float, float]] = []

    def state(self) -> dict[str, Any]:
        """What it has seen so far: a resumed run must not begin to watch anew."""
        seen = {"losses": self.losses, "evaluations": self.evaluations, "signs": self.warnings}
        return {"args": {}, "attributes": seen}

    def warn(self, sign: str, detail: str) -> None:
        """Log a sign, once."""
        if sign not in self.warnings:
            self.warnings.append(sign)
            logger.warning(f"health: {sign}: {detail}: {SUGGESTIONS[sign]}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        self.losses.append(loss)
        start = sum(self.losses[:3]) / len(self.losses[:3])
        if len(self.losses) > 3 and min(self.losses[-2:]) > 3 * max(start, 0.1):
            self.warn("exploding_loss", f"it was {start:.3f} at first and is {loss:.3f} at step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        skipped = self.trainer.carried.skipped
        if len(skipped) >= (MOST_SKIPPED_FP16 if args.fp16 else MOST_SKIPPED) and self.failure is None:
            ids = list(dict.fromkeys(id_ for _, _, of_step in skipped for id_ in of_step))
            self.warnings.append("nan_loss")
            self.failure = (
                f"health: nan_loss: {len(skipped)} steps in a row could not be taken, the last of them step "
                f"{skipped[-1][0]} ({skipped[-1][1]}). Their documents: {format_ids(ids)}. {SUGGESTIONS['nan_loss']} The "
                f"checkpoints in {args.output_dir} are from before it: go on with --resume_from_checkpoint auto."
            )
        if self.failure is not None:
            # Without saving or evaluating what it has become.
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
        chance = math.log(self.trainer.model.config.num_labels)
        count = len(train)
        if count >= 4 and all(train[-k] < train[-k - 1] and evaluated[-k] > evaluated[-k - 1] for k in (1, 2, 3)):
            self.warn("overfitting", f"three evaluations in a row, to {train[-1]:.3f} against {evaluated[-1]:.3f}")
        if count >= 3 and min(train[1:]) > 0.99 * train[0] and train[-1] > 0.9 * chance:
            self.warn(
                "not_learning", f"it was {train[0]:.3f} in the first epoch and is {train[-1]:.3f} in number {count}"
            )
        halfway = count >= 5 and (state.epoch or 0) >= args.num_train_epochs / 2
        if halfway and train[-1] > 0.85 * chance and evaluated[-1] > 0.85 * chance:
            self.warn("underfitting", f"{train[-1]:.3f} and {evaluated[-1]:.3f}, where guessing gives {chance:.3f}")


def extreme_weights_message(weights: dict[str, float], counts: dict[str, int]) -> str | None:
    """The warning for a class weight above 10, with the documents of each class, or None."""
    if max(weights.values()) <= 10:
        return None
    shown = ", ".join(f"{label} weighs {weight:.1f} ({counts[label]} documents)" for label, weight in weights.items())
    return f"health: extreme_class_weights: {shown}: {SUGGESTIONS['extreme_class_weights']}"


def frozen_model_message(model: torch.nn.Module) -> str | None:
    """The error for a model with nothing to train, or None."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return None
    return f"health: frozen_model: {SUGGESTIONS['frozen_model']}"
