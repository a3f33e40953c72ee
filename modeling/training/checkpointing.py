"""Checkpoints that are whole: how they come to be, which they are, and the newest of them."""

import hashlib
import json
import logging
import shutil
from collections.abc import Container
from pathlib import Path

from ..file_utils import sync_to_disk, write_text

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"
STAGING_DIR = ".saving"  # in output_dir: checkpoints that are being written, or deleted


def commit_checkpoint(partial: Path, folder: Path) -> None:
    """Give a checkpoint that was written elsewhere its name, when every byte of it is on disk, with a manifest of sizes
    and sha256. What had that name goes.

    The manifest leaves training_args.bin out, which is not needed to go on and does not travel to the hub.
    """
    files = {}
    for path in sorted(partial.rglob("*")):
        sync_to_disk(path)
        if path.is_file() and path.name not in (MANIFEST, "training_args.bin"):
            files[path.relative_to(partial).as_posix()] = _fingerprint(path)
    write_text(partial / MANIFEST, json.dumps(files, indent=1))
    before = partial.with_name(f"{folder.name}-before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    partial.rename(folder)
    sync_to_disk(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, kept: Container[Path]) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: none), but those in `kept` never.

    transformers' own function keeps the one with the highest number, which may be torn.
    """
    found = list_checkpoints(str(output_dir))
    too_many = len(found) - limit if limit else 0
    for folder in [folder for folder in found[::-1] if folder not in kept][: max(too_many, 0)]:
        # Out of sight first: a kill in the middle shall not leave a torn one.
        (output_dir / STAGING_DIR).mkdir(exist_ok=True)
        out_of_sight = folder.rename(output_dir / STAGING_DIR / f"{folder.name}-old")
        shutil.rmtree(out_of_sight, ignore_errors=True)


def _fingerprint(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None where it is whole."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "its saving never ended (no manifest)" if folder.is_dir() else "there is no such folder"
    except (ValueError, UnicodeDecodeError):
        return "its manifest cannot be read"
    for name, fingerprint in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != fingerprint:
            return f"{name} has changed since it was saved"
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def find_checkpoint(output_dir: str, which: str | None) -> str | None:
    """The checkpoint to go on from.

    Args:
        which: "auto" for the newest whole one of `output_dir` (None where there is none), or a folder.

    Raises:
        ValueError: the folder named is no whole checkpoint.
    """

    def reason_against(folder: Path) -> str | None:
        has_state = (folder / "trainer_state.json").is_file()
        return checkpoint_problem(folder) or (None if has_state else "it holds a model and nothing to go on from")

    if which is None or which.lower() in ("false", "none", ""):
        return None
    if which.lower() not in ("auto", "true"):
        if reason := reason_against(Path(which)):
            raise ValueError(
                f"--resume_from_checkpoint {which}: {reason}. Give a whole checkpoint folder, or auto for the newest."
            )
        return which
    for folder in list_checkpoints(output_dir):
        reason = reason_against(folder)
        if reason is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {reason}.")
    return None
