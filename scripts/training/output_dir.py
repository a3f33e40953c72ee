"""The folder of a run: one run at a time; an earlier one in it is gone on with or replaced, and never mixed with."""

import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modeling.file_utils import is_disk_full
from modeling.training.checkpointing import STAGING_DIR, find_checkpoint, list_checkpoints

logger = logging.getLogger(__name__)

# Where the finished model is put together.
EXPORT = ".export"
RESULTS = ("model.safetensors", "training_history.json", "metrics.json", "README.md", "training.tex")


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile. The lock goes with the process, however it ends, and is not handed on
    to its loader's workers (fcntl's locks are a process's own).

    Raises:
        ValueError: somebody does, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (for as long as the run)
    except OSError as error:
        if is_disk_full(error):
            raise
        reason = "is a file" if folder.is_file() else f"cannot be written to ({error.strerror})"
        raise ValueError(f"output_dir {folder} {reason}: expected a folder of your own, or a new name.") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"Another run is at work in {folder} ({file.read().strip() or 'it has just begun'}): wait for its end, or "
                "name another output_dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        clear_unfinished(folder)
        yield


def clear_unfinished(folder: Path) -> None:
    """Delete what a run that was killed was writing or deleting; what it was replacing gets its name back."""
    for before in (folder / STAGING_DIR).glob("*-before"):
        if not (folder / before.name.removesuffix("-before")).exists():
            before.rename(folder / before.name.removesuffix("-before"))
    for unfinished in (STAGING_DIR, EXPORT):
        shutil.rmtree(folder / unfinished, ignore_errors=True)


def resolve_output_dir(output_dir: str, resume: str | None, overwrite: bool) -> str | None:
    """The checkpoint to resume from. An earlier run in output_dir is gone on with or replaced, but never mixed with.

    Raises:
        ValueError: an earlier run is there and neither was asked for; the checkpoint named is not its newest, or another
            run's.
    """
    checkpoint = find_checkpoint(output_dir, resume)
    earlier = [path.name for path in list_checkpoints(output_dir)] or [
        name for name in RESULTS if (Path(output_dir) / name).exists()
    ]
    if checkpoint is not None:
        logger.info(f"Going on from {checkpoint}.")
        if not is_from_run(checkpoint, output_dir):
            if earlier and not overwrite:
                raise ValueError(
                    f"{output_dir} holds an earlier run ({', '.join(earlier[:3])}), and {checkpoint} is another's: replace "
                    "it with --overwrite_output_dir, or name another output_dir."
                )
            return checkpoint
        step = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        newer = [path.name for path in list_checkpoints(output_dir) if int(path.name.split("-")[-1]) > step]
        if resume != "auto" and newer:
            raise ValueError(
                f"{output_dir} holds checkpoints that are newer than {checkpoint} ({', '.join(newer)}), which a "
                "later resume would take for this run's: delete them, or name another output_dir."
            )
    elif resume == "auto" and not (list_checkpoints(output_dir) or (Path(output_dir) / "model.safetensors").exists()):
        logger.info("No checkpoint to go on from: from the start.")
    elif resume == "auto" and not overwrite:
        raise ValueError(
            f"{output_dir} holds {', '.join(earlier[:3])}, and no whole checkpoint to go on from: begin anew in it with "
            "--overwrite_output_dir, or name another output_dir."
        )
    elif earlier and not overwrite:
        raise ValueError(
            f"{output_dir} holds an earlier run ({', '.join(earlier[:3])}): go on with it with "
            "--resume_from_checkpoint auto, replace it with --overwrite_output_dir, or name another output_dir."
        )
    return checkpoint


def is_from_run(checkpoint: str, output_dir: str) -> bool:
    """Whether a checkpoint is one of the run in output_dir."""
    return Path(checkpoint).parent.resolve() == Path(output_dir).resolve()


def remove_if_empty(folder: str) -> None:
    """Trainer makes its output folder, which a dry run has no use for."""
    if not any(Path(folder).iterdir()):
        Path(folder).rmdir()


def clear_earlier_run(output_dir: str) -> None:
    """Delete the checkpoints and results of an earlier run. (Its TensorBoard files stay, under their own date.)"""
    for path in list_checkpoints(output_dir):
        shutil.rmtree(path)
    for path in [Path(output_dir) / name for name in RESULTS] + sorted(Path(output_dir).glob("predictions_*.csv")):
        path.unlink(missing_ok=True)
