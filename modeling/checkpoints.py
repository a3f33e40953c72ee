"""Which checkpoints are whole, and the newest of them."""

import hashlib
import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_manifest.json"


def write_checkpoint_manifest(folder: str) -> None:
    """Record size and sha256 of every file of a checkpoint, in one step, after all of them are on disk.

    Not of training_args.bin, which is not needed to go on and does not travel to the hub.
    """
    path = Path(folder)
    files = {
        file.name: _fingerprint(file)
        for file in sorted(path.iterdir())
        if file.is_file() and file.name not in (MANIFEST, "training_args.bin")
    }
    partial = path / f"{MANIFEST}.partial"
    with open(partial, "w", encoding="utf-8") as out:
        json.dump(files, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(path / MANIFEST)


def _fingerprint(file: Path) -> dict[str, int | str]:
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
        os.fsync(content.fileno())
    return {"bytes": file.stat().st_size, "sha256": digest}


def what_is_wrong(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None where it is whole."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "its saving never ended (no manifest)"
    except (ValueError, UnicodeDecodeError):
        return "its manifest cannot be read"
    for name, fingerprint in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _fingerprint(folder / name) != fingerprint:
            return f"{name} has changed since it was saved"
    return None


def checkpoints_of(output_dir: str) -> list[Path]:
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
    if which is None or which.lower() in ("false", "none", ""):
        return None
    if which.lower() not in ("auto", "true"):
        reason = what_is_wrong(Path(which)) if Path(which).is_dir() else "there is no such folder"
        if reason:
            raise ValueError(
                f"--resume_from_checkpoint {which}: {reason}. Give a whole checkpoint folder, or auto for the newest."
            )
        return which
    for folder in checkpoints_of(output_dir):
        reason = what_is_wrong(folder)
        if reason is None:
            return str(folder)
        logger.warning(f"{folder} is passed over: {reason}.")
    return None
