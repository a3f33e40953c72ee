"""A run's output_dir: locked while in use; an earlier run is resumed or replaced, never mixed with a new one."""

import errno
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from modeling.file_utils import is_disk_full
from modeling.training.checkpointing import STAGING_DIR, find_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)

# Staging folder of the exported model.
EXPORT = ".export"
# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
RESULTS = ("model.safetensors", "training_history.json", "metrics.json", "README.md", "training.tex")


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Released when the process ends, however it ends: loader workers do not inherit it
    (since filelock 3.30). On a file system without locks, a warning.

    Raises:
        ValueError: another run holds the lock, or the folder is not writable.
    """
    lock = FileLock(folder / ".lock", fallback_to_soft=False)  # a soft lock would outlive a killed run
    owner = folder / ".lock_owner"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        name = owner.read_text(encoding="utf-8") if owner.is_file() else "just started"
        raise ValueError(
            f"{folder} is locked by another run ({name}): wait for it to finish, or choose another output_dir."
        ) from None
    except OSError as error:
        if is_disk_full(error):
            raise
        if error.errno not in NO_LOCKS:
            reason = "is a file" if folder.is_file() else f"cannot be written to ({error.strerror})"
            raise ValueError(f"output_dir {folder} {reason}: expected a writable folder or a new path.") from None
        logger.warning(
            f"The file system of {folder} has no locks ({error.strerror}): make sure that no other run uses this output_dir."
        )
    try:
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        clear_unfinished(folder)
        yield
    finally:
        lock.release()


def clear_unfinished(folder: Path) -> None:
    """Delete unfinished checkpoints and exports of a killed run; restore a checkpoint that was being replaced."""
    for before in (folder / STAGING_DIR).glob("*-before"):
        if not (folder / before.name.removesuffix("-before")).exists():
            before.rename(folder / before.name.removesuffix("-before"))
    for unfinished in (STAGING_DIR, EXPORT):
        shutil.rmtree(folder / unfinished, ignore_errors=True)


def resolve_output_dir(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """Resolve the checkpoint to resume from.

    Raises:
        ValueError: an earlier run exists and neither option was given; the checkpoint is not the newest, or belongs to
            another run.
    """
    checkpoint = find_checkpoint(output_dir, resume)
    earlier = [path.name for path in list_checkpoints(output_dir)] or [
        name for name in RESULTS if (Path(output_dir) / name).exists()
    ]
    if checkpoint is not None:
        logger.info(f"Resuming from {checkpoint}.")
        if not is_from_run(checkpoint, output_dir):
            if earlier and not overwrite:
                raise ValueError(
                    f"{output_dir} holds an earlier run ({', '.join(earlier[:3])}), and {checkpoint} belongs to another: replace "
                    "it with --overwrite_output_dir, or choose another output_dir."
                )
            return checkpoint
        step = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        newer = [path.name for path in list_checkpoints(output_dir) if int(path.name.split("-")[-1]) > step]
        if resume != "auto" and newer:
            raise ValueError(
                f"{output_dir} holds checkpoints that are newer than {checkpoint} ({', '.join(newer)}), which a "
                "later resume would pick up: delete them, or choose another output_dir."
            )
    elif resume == "auto" and not (list_checkpoints(output_dir) or (Path(output_dir) / "model.safetensors").exists()):
        logger.info("No checkpoint found: starting from scratch.")
    elif resume == "auto" and not overwrite:
        raise ValueError(
            f"{output_dir} holds {', '.join(earlier[:3])}, and no valid checkpoint to resume from: start over with "
            "--overwrite_output_dir, or choose another output_dir."
        )
    elif earlier and not overwrite:
        raise ValueError(
            f"{output_dir} holds an earlier run ({', '.join(earlier[:3])}): resume it with "
            "--resume_from_checkpoint auto, replace it with --overwrite_output_dir, or choose another output_dir."
        )
    return checkpoint


def is_from_run(checkpoint: str, output_dir: str) -> bool:
    """Whether a checkpoint belongs to the run in output_dir."""
    return Path(checkpoint).parent.resolve() == Path(output_dir).resolve()


def remove_if_empty(folder: str) -> None:
    """Remove the output folder that Trainer created for a dry run."""
    if not any(Path(folder).iterdir()):
        Path(folder).rmdir()


def clear_earlier_run(output_dir: str) -> None:
    """Delete the checkpoints and results of an earlier run. (Its TensorBoard files stay, under their own date.)"""
    for path in list_checkpoints(output_dir):
        shutil.rmtree(path)
    for path in [Path(output_dir) / name for name in RESULTS] + sorted(Path(output_dir).glob("predictions_*.csv")):
        path.unlink(missing_ok=True)
