"""Files and folders that are whole or not there, whatever happens while they are written."""

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: BaseException) -> OSError | None:
    """The file that could not be written or read, as an `OSError`, whatever the library that met it made of it; None
    where an error tells of something else. A full disk is found among an error's causes, too.

    safetensors and tokenizers close their messages with the system's number, tokenizers in a bare `Exception`.
    torch.save gives the system's words where a file cannot be opened; else it says only that the writer is not where it
    should be: the disk took less than it was given.
    """
    found = _to_os_error(error)
    cause = error.__cause__ or error.__context__
    while found is None and cause is not None:
        told = _to_os_error(cause)
        found = told if told is not None and told.errno in FULL else None
        cause = cause.__cause__ or cause.__context__
    return found


def _to_os_error(error: BaseException) -> OSError | None:
    said = str(error)
    if isinstance(error, OSError):
        return error
    if number := re.search(r"\(os error (\d+)\)", said):
        return OSError(int(number[1]), said.replace(number[0], "").strip())
    if "PytorchStreamWriter" in said or "inline_container" in said:
        numbers = {os.strerror(number): number for number in errno.errorcode}
        return OSError(numbers.get(said.partition("strerror: ")[2].split("\n")[0].strip(" ."), errno.ENOSPC), said)
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error tells that a disk, or what a user may have of it, is full."""
    found = disk_error(error)
    return found is not None and found.errno in FULL


@contextmanager
def atomic_write(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file to write, which gets its name when every byte is on disk; what stood there before stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """What a file, or a folder's list of names, holds is on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A whole text file."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """A whole JSON file; NaN and infinity become null."""
    with atomic_write(path) as file:
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
