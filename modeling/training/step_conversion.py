"""Resume with another effective batch, or another number of documents: checkpoints in steps of the new size.

Trainer finds its place in the data by the number of steps. Here a place is a number of epochs, and of documents of the
next one; a step that holds documents of both kinds trains on the unseen ones.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from ..file_utils import write_json
from .checkpointing import STAGING_DIR, checkpoint_problem, commit_checkpoint, discard, list_checkpoints

logger = logging.getLogger(__name__)


class EpochSize(NamedTuple):
    """Documents of an optimizer step over all processes; steps (0: a stream has no epochs) and documents of an epoch."""

    documents_per_step: int
    steps_per_epoch: int
    num_documents: int = 0


class Place(NamedTuple):
    """Whole epochs, documents of the next one, and the number of the step at which training continues."""

    epoch: int
    documents: int
    step: int


def find_place(state: dict[str, Any], old: EpochSize, new: EpochSize) -> Place:
    """Where a checkpoint stands, in steps of the new size.

    Args:
        state: content of its trainer_state.json.
    """
    epoch = state["global_step"] // old.steps_per_epoch
    documents = state["global_step"] % old.steps_per_epoch * old.documents_per_step
    if (seen := _resume_state(state).get("seen")) and seen[0] == epoch:  # it was converted, and saved no step since
        documents = max(documents, seen[1])
    if old.num_documents != new.num_documents:  # in another order: the epoch starts again
        documents = 0
    step = epoch * new.steps_per_epoch + min(documents // new.documents_per_step, new.steps_per_epoch - 1)
    return Place(epoch, documents, step)


def saved_epoch_size(checkpoint: Path) -> EpochSize | None:
    """Epoch size with which a checkpoint was written; None if an older version wrote it."""
    saved = _resume_state(_read_state(checkpoint)).get("epoch_size")
    return EpochSize(*saved) if saved else None


def _resume_state(state: dict[str, Any]) -> dict[str, Any]:
    saved = state.get("stateful_callbacks", {}).get("ResumeState")
    return saved.get("attributes", {}) if isinstance(saved, dict) else {}


def convert_run(checkpoint: Path, output_dir: Path, old: EpochSize, new: EpochSize, accelerator: Accelerator) -> Path:
    """Convert a checkpoint, and the best one of its run, to steps of the new size, and delete the others of `output_dir`.

    Killed at any moment, it can be called again, since the original is deleted last. Every process must call it; the main
    process writes.

    Returns:
        The converted checkpoint, in `output_dir`.

    Raises:
        ValueError: both fall on the same step, or the documents are a stream.
    """
    sizes = "{0.documents_per_step} documents a step and {0.steps_per_epoch} steps an epoch"
    change = f"{sizes.format(new)} (before: {sizes.format(old)})"
    if not (old.steps_per_epoch and new.steps_per_epoch):
        raise ValueError(
            f"{checkpoint} cannot be resumed with {new.documents_per_step} documents a step (before: "
            f"{old.documents_per_step}), since the place in a stream is a number of steps: keep the effective batch."
        )
    state = _read_state(checkpoint)
    place, best = find_place(state, old, new), _best_of(checkpoint, state)
    target = output_dir / f"checkpoint-{place.step}"
    is_done = checkpoint_problem(target) is None and saved_epoch_size(target) == new
    if is_done:  # killed before everything else was deleted
        state = _read_state(target)
        best = _best_of(target, state)
    conversions: list[tuple[Path, Path, dict[str, Any], Place | None]] = [(checkpoint, target, state, place)]
    if best is not None:
        best_target = target
        if is_done:
            best_target = best
            conversions.append((best, best, {}, None))
        elif best.resolve() != checkpoint.resolve():
            best_state = _read_state(best)
            # Below both, so that neither `auto` nor the original takes it for something else.
            best_step = min(find_place(best_state, old, new).step, place.step - 1, state["global_step"] - 1)
            if best_step < 0:
                raise ValueError(
                    f"{checkpoint} cannot be resumed with {change}: it and the best checkpoint fall on the same step. Resume "
                    "with the effective batch that it had, or with a smaller one."
                )
            best_target = output_dir / f"checkpoint-{best_step}"
            conversions.insert(0, (best, best_target, best_state, None))
        for _, _, one, _ in () if is_done else conversions:
            one["best_global_step"] = int(best_target.name.split("-")[1])
            one["best_model_checkpoint"] = str(best_target)
    accelerator.wait_for_everyone()  # all have read
    if accelerator.is_main_process:
        kept = [folder for _, folder, _, _ in conversions]
        obsolete = [folder for folder in list_checkpoints(str(output_dir))[::-1] if folder not in kept]
        for source, folder, one, where in [] if is_done else conversions:
            partial = output_dir / STAGING_DIR / folder.name
            _stage(source, partial, one | {"global_step": int(folder.name.split("-")[1])}, new, where)
            commit_checkpoint(partial, folder)
        for folder in obsolete:  # the original is the last
            discard(folder)
        deleted = f" Deleted: {', '.join(folder.name for folder in obsolete)}." if obsolete else ""
        logger.info(
            f"Resuming with {change}: {checkpoint.name} has become {target.name}, after epoch {place.epoch} and "
            f"{place.documents} documents of the next.{deleted}"
        )
    accelerator.wait_for_everyone()
    return target


def is_being_converted(checkpoint: Path) -> bool:
    """Whether a conversion of the run was interrupted: another of its checkpoints counts other steps."""
    sizes = {
        saved_epoch_size(folder)
        for folder in list_checkpoints(str(checkpoint.parent))
        if not checkpoint_problem(folder)
    }
    return len(sizes | {saved_epoch_size(checkpoint)}) > 1


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def _best_of(checkpoint: Path, state: dict[str, Any]) -> Path | None:
    beside = checkpoint.parent / f"checkpoint-{state['best_global_step']}"
    recorded = Path(state["best_model_checkpoint"] or beside)
    return next((folder for folder in (beside, recorded) if folder.is_dir()), None)


def _stage(source: Path, partial: Path, state: dict[str, Any], new: EpochSize, place: Place | None) -> Path:
    """Copy a checkpoint to the staging folder, with this state and with everything else that counts steps."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial)
    except shutil.Error as error:
        [(_, _, reason), *_] = error.args[0]
        raise ValueError(
            f"{source} cannot be copied to {partial} ({reason}): make room on the disk and resume."
        ) from error
    scheduler_file, old_step = partial / SCHEDULER_NAME, _read_state(source)["global_step"]
    scheduler = torch.load(scheduler_file, weights_only=True) if scheduler_file.exists() else {}
    if scheduler and "num_bad_epochs" not in scheduler:  # a schedule by steps, not by evaluations
        # Not simply the step: a schedule stands still in steps that fp16's gradient scaler skips.
        last_epoch = round(scheduler["last_epoch"] * state["global_step"] / max(old_step, 1))
        torch.save(scheduler | {"last_epoch": last_epoch, "_step_count": last_epoch + 1}, scheduler_file)

    def renumbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [record | {"step": round(record["epoch"] * new.steps_per_epoch)} for record in records]

    callbacks = state["stateful_callbacks"]
    callbacks["ResumeState"]["attributes"] |= {"epoch_size": new, "seen": place and (place.epoch, place.documents)}
    if history := callbacks.get("HistoryCallback"):
        history["attributes"]["epochs"] = renumbered(history["attributes"]["epochs"])
    write_json(partial / TRAINER_STATE_NAME, state | {"log_history": renumbered(state["log_history"])})
    return partial
