"""Resume with another effective batch: a run's checkpoints, counted in steps of the new batch.

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
from .checkpointing import STAGING_DIR, commit_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)


class EpochSize(NamedTuple):
    """Documents of an optimizer step over all processes, and steps of an epoch (0: a stream has no epochs)."""

    documents_per_step: int
    steps_per_epoch: int


class Place(NamedTuple):
    """Whole epochs, documents of the next one, and the number of the step at which training continues."""

    epoch: int
    documents: int
    step: int


def find_place(state: dict[str, Any], old: EpochSize, new: EpochSize) -> Place:
    """Where a checkpoint stands, in steps of the new batch.

    Args:
        state: content of its trainer_state.json.
    """
    epoch = state["global_step"] // old.steps_per_epoch
    documents = state["global_step"] % old.steps_per_epoch * old.documents_per_step
    step = epoch * new.steps_per_epoch + min(documents // new.documents_per_step, new.steps_per_epoch - 1)
    return Place(epoch, documents, step)


def saved_epoch_size(checkpoint: Path) -> EpochSize | None:
    """Epoch size with which a checkpoint was written; None if an older version wrote it."""
    resume_state = _read_state(checkpoint).get("stateful_callbacks", {}).get("ResumeState")
    saved = resume_state.get("attributes", {}).get("epoch_size") if isinstance(resume_state, dict) else None
    return EpochSize(*saved) if saved else None


def convert_run(checkpoint: Path, output_dir: Path, old: EpochSize, new: EpochSize, accelerator: Accelerator) -> Path:
    """Convert a checkpoint, and the best one of its run, to steps of the new batch, and delete the others of `output_dir`.

    A kill leaves the original in place until its converted copy is complete. Every process must call it; the main process
    writes.

    Returns:
        The converted checkpoint, in `output_dir`.

    Raises:
        ValueError: both fall on the same step, or the documents are a stream.
    """
    batches = f"an effective batch of {new.documents_per_step} documents (it had {old.documents_per_step})"
    if not (old.steps_per_epoch and new.steps_per_epoch):
        raise ValueError(
            f"A stream cannot be resumed with {batches}, since its place is a number of steps: keep the batch."
        )
    state = _read_state(checkpoint)
    place, best = find_place(state, old, new), _best_of(checkpoint, state)
    target = output_dir / f"checkpoint-{place.step}"
    conversions: dict[Path, tuple[Path, dict[str, Any], Place | None]] = {target: (checkpoint, state, place)}
    if best is not None and best.resolve() != checkpoint.resolve():
        best_state = _read_state(best)
        best_step = min(find_place(best_state, old, new).step, place.step - 1)
        if best_step < 0:
            raise ValueError(
                f"{checkpoint} cannot be resumed with {batches}: it and the best checkpoint fall on the same step. Resume "
                "with the batch that it had, or with a smaller one."
            )
        conversions[output_dir / f"checkpoint-{best_step}"] = (best, best_state, None)
    accelerator.wait_for_everyone()  # all have read
    if accelerator.is_main_process:
        best_target = [*conversions][-1]
        staged = {}
        for folder, (source, source_state, source_place) in conversions.items():
            if best is not None:
                source_state["best_global_step"] = int(best_target.name.split("-")[1])
                source_state["best_model_checkpoint"] = str(best_target)
            source_state["global_step"] = int(folder.name.split("-")[1])
            staged[folder] = _stage(source, output_dir / STAGING_DIR / folder.name, source_state, new, source_place)
        obsolete = list_checkpoints(str(output_dir))[::-1]
        # The best one first, unless it takes the name of the original.
        for folder in [*staged] if best_target == checkpoint else [*staged][::-1]:
            commit_checkpoint(staged[folder], folder)
        for folder in obsolete:  # from the oldest to the one resumed from
            if folder not in staged:
                shutil.rmtree(folder)
    logger.info(
        f"Resuming with {batches}: {checkpoint.name} is {target.name} in the new steps, after epoch {place.epoch} and "
        f"{place.documents} documents of the next."
    )
    accelerator.wait_for_everyone()
    return target


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def _best_of(checkpoint: Path, state: dict[str, Any]) -> Path | None:
    beside = checkpoint.parent / f"checkpoint-{state['best_global_step']}"
    recorded = Path(state["best_model_checkpoint"] or beside)
    return next((folder for folder in (beside, recorded) if folder.is_dir()), None)


def _stage(source: Path, partial: Path, state: dict[str, Any], new: EpochSize, place: Place | None) -> Path:
    """Copy a checkpoint to the staging folder, with this state and with everything else that counts steps."""
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    scheduler_file = partial / SCHEDULER_NAME
    scheduler = torch.load(scheduler_file, weights_only=True) if scheduler_file.exists() else {}
    if scheduler.get("last_epoch") == _read_state(source)["global_step"]:  # a schedule by steps, not by evaluations
        step = state["global_step"]
        torch.save(scheduler | {"last_epoch": step, "_step_count": step + 1}, scheduler_file)

    def renumbered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [record | {"step": round(record["epoch"] * new.steps_per_epoch)} for record in records]

    callbacks = state["stateful_callbacks"]
    callbacks["ResumeState"]["attributes"] |= {"epoch_size": new, "seen": place and (place.epoch, place.documents)}
    if history := callbacks.get("HistoryCallback"):
        history["attributes"]["epochs"] = renumbered(history["attributes"]["epochs"])
    write_json(partial / TRAINER_STATE_NAME, state | {"log_history": renumbered(state["log_history"])})
    return partial
