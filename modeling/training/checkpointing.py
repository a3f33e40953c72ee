"""Atomic checkpoints with a manifest: saving, validation, rotation and discovery."""

import hashlib
import json
import logging
import shutil
from collections.abc import Container
from pathlib import Path

from ..file_utils import sync_to_disk, write_text

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
STAGING_DIR = ".saving"  # in output_dir: checkpoints being written or deleted


def commit_checkpoint(partial: Path, folder: Path) -> None:
    """Flush a staged checkpoint to disk, add a manifest of sizes and sha256, and rename it, replacing an existing one.

    The manifest omits training_args.bin, which is not needed to resume and is not pushed to the hub.
    """
    files = {}
    for path in sorted(partial.rglob("*")):
        sync_to_disk(path)
        if path.is_file() and path.name not in (MANIFEST, "training_args.bin"):
            files[path.relative_to(partial).as_posix()] = _fingerprint(path)
    write_text(partial / MANIFEST, json.dumps(files, indent=1))
    previous = partial.with_name(f"{folder.name}-before")
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, kept: Container[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: no limit), except those in `kept`.

    The function in transformers keeps the checkpoint with the highest step, which may be incomplete.
    """
    checkpoints = list_checkpoints(str(output_dir))
    num_excess = len(checkpoints) - limit if limit else 0
    for folder in [folder for folder in checkpoints[::-1] if folder not in kept][: max(num_excess, 0)]:
        discard(folder)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that an interruption leaves no incomplete one."""
    (folder.parent / STAGING_DIR).mkdir(exist_ok=True)
    shutil.rmtree(folder.rename(folder.parent / STAGING_DIR / f"{folder.name}-old"), ignore_errors=True)


def _fingerprint(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint is incomplete or corrupt; None if it is valid."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it is incomplete (no manifest)" if folder.is_dir() else "the directory does not exist"
    except (ValueError, UnicodeDecodeError):
        return "its manifest is unreadable"
    for name, fingerprint in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != fingerprint:
            return f"{name} is corrupt (checksum mismatch)"
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """Checkpoint folders of a run, newest first, including incomplete ones."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def find_checkpoint(output_dir: str, which: str | None) -> str | None:
    """Find the checkpoint to resume from.

    Args:
        which: "auto" for the newest valid checkpoint in `output_dir` (None if there is none), or a checkpoint folder.

    Raises:
        ValueError: the given folder is not a valid checkpoint.
    """

    def problem_with(folder: Path) -> str | None:
        has_state = (folder / "trainer_state.json").is_file()
        return checkpoint_problem(folder) or (None if has_state else "it contains a model but no training state")

    if which is None or which.lower() in ("false", "none", ""):
        return None
    if which.lower() not in ("auto", "true"):
        if reason := problem_with(Path(which)):
            raise ValueError(
                f"--resume_from_checkpoint {which}: {reason}. Pass a valid checkpoint folder, or auto for the newest."
            )
        return which
    for folder in list_checkpoints(output_dir):
        reason = problem_with(folder)
        if reason is None:
            return str(folder)
        logger.warning(f"Ignoring checkpoint {folder}: {reason}.")
    return None
