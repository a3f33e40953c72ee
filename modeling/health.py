"""The health watch: names what goes wrong in training, and says what to do about it."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .trainer import WeightedTrainer

logger = logging.getLogger(__name__)

# Sign → what it means and what helps. docs/guide.md explains each at more length.
REMEDIES = {
    "frozen_model": "no parameter is trained. Leave --freeze_encoder out, or unfreeze the head.",
    "extreme_class_weights": "one document of a rare class outweighs many others and makes training jumpy. Gather more "
    "of that class, or give softer --class_weights.",
    "nan_loss": "the arithmetic broke down. Lower --learning_rate, use --bf16 (or fp32: --bf16 False --fp16 False) in "
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


class HealthWatch(TrainerCallback, ExportableState):
    """Warns of each sign once, and ends a run whose loss is no number before it can be saved.

    Attributes:
        signs: the signs seen, in order.
        failure: why the run was ended, or None.
    """

    def __init__(self, trainer: WeightedTrainer):
        self.trainer = trainer
        self.signs: list[str] = []
        self.failure: str | None = None
        self.losses: list[float] = []
        self.evaluations: list[tuple[float, float]] = []

    def state(self) -> dict[str, Any]:
        """What it has seen so far: a resumed run must not begin to watch anew."""
        seen = {"losses": self.losses, "evaluations": self.evaluations, "signs": self.signs}
        return {"args": {}, "attributes": seen}

    def warn(self, sign: str, detail: str) -> None:
        """Log a sign, once."""
        if sign not in self.signs:
            self.signs.append(sign)
            logger.warning(f"health: {sign}: {detail}: {REMEDIES[sign]}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            self.fail(args, state, control, f"the loss is {loss}")
            return
        self.losses.append(loss)
        start = sum(self.losses[:3]) / len(self.losses[:3])
        if len(self.losses) > 3 and min(self.losses[-2:]) > 3 * max(start, 0.1):
            self.warn("exploding_loss", f"it was {start:.3f} at first and is {loss:.3f} at step {state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Looking at the norm waits for the device: only where something is about to be logged or saved. Under fp16 an
        # infinite norm is the scaler's business, which skips the step.
        norm = self.trainer.last_grad_norm
        looks = control.should_save or control.should_evaluate or control.should_log
        if looks and norm is not None and not args.fp16 and not math.isfinite(float(norm)):
            self.fail(args, state, control, f"the gradient norm is {float(norm)}")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        norm = self.trainer.last_grad_norm
        if self.failure is None and norm is not None and not args.fp16 and not math.isfinite(float(norm)):
            self.fail(args, state, control, f"the gradient norm is {float(norm)}")
        if self.failure is not None:
            control.should_save, control.should_evaluate = False, False

    def fail(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, detail: str) -> None:
        """End the run without saving or evaluating what it has become."""
        if self.failure is None:
            self.signs.append("nan_loss")
            self.failure = (
                f"health: nan_loss: {detail} at step {state.global_step}: {REMEDIES['nan_loss']} The checkpoints saved "
                f"before it in {args.output_dir} are good: go on from them with --resume_from_checkpoint auto."
            )
        control.should_training_stop = True
        control.should_save, control.should_evaluate = False, False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        totals = self.trainer.totals
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
    return f"health: extreme_class_weights: {shown}: {REMEDIES['extreme_class_weights']}"


def frozen_model_message(model: torch.nn.Module) -> str | None:
    """The error for a model with nothing to train, or None."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return None
    return f"health: frozen_model: {REMEDIES['frozen_model']}"
