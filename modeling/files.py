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


def disk_error(error: BaseException) -> OSError | None:
    """The file that could not be written or read, as an `OSError`, whatever the library that met it made of it; None
    where an error tells of something else.

    safetensors and tokenizers close their messages with the system's number, tokenizers in a bare `Exception`.
    torch.save says only that the writer is not where it should be: the disk took less than it was given.
    """
    said = str(error)
    if isinstance(error, OSError):
        return error
    if number := re.search(r"\(os error (\d+)\)", said):
        return OSError(int(number[1]), said.replace(number[0], "").strip())
    if "PytorchStreamWriter" in said or "inline_container" in said:
        return OSError(errno.ENOSPC, said)
    return None


def is_full(error: OSError) -> bool:
    """Whether a disk, or what a user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def whole_file(path: Path, newline: str | None = None) -> Iterator[TextIO]:
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
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """A whole JSON file; NaN and infinity become null."""
    with whole_file(path) as file:
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
