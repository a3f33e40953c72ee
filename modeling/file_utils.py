"""Atomic file writes, and detection of disk errors."""

import errno
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

FULL = (errno.ENOSPC, errno.EDQUOT)
# What a file system answers that cannot flush a file or folder: network and FUSE file systems.
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def disk_error(error: BaseException) -> OSError | None:
    """Convert an I/O error of any library to an `OSError`; None if it is not an I/O error.

    A full disk is also detected in the chain of causes. safetensors and tokenizers append the errno to their messages
    (tokenizers in a bare `Exception`). torch.save includes strerror if it cannot open a file; otherwise it reports an
    unexpected file position, which means that a write was cut short.
    """
    result = _to_os_error(error)
    cause = error.__cause__ or error.__context__
    while result is None and cause is not None:
        os_error = _to_os_error(cause)
        result = os_error if os_error is not None and os_error.errno in FULL else None
        cause = cause.__cause__ or cause.__context__
    return result


def _to_os_error(error: BaseException) -> OSError | None:
    message = str(error)
    if isinstance(error, OSError):
        return error
    if isinstance(error, sqlite3.Error):
        return OSError(errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO, message)
    if number := re.search(r"\(os error (\d+)\)", message):
        return OSError(int(number[1]), message.replace(number[0], "").strip())
    if "PytorchStreamWriter" in message or "inline_container" in message:
        numbers = {os.strerror(number): number for number in errno.errorcode}
        return OSError(
            numbers.get(message.partition("strerror: ")[2].split("\n")[0].strip(" ."), errno.ENOSPC), message
        )
    return None


def is_disk_full(error: BaseException) -> bool:
    """Whether an error was caused by a full disk or an exceeded quota."""
    os_error = disk_error(error)
    return os_error is not None and os_error.errno in FULL


@contextmanager
def atomic_write(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file that replaces `path` only after all of it has been flushed to disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline=newline) as file:
            yield file
            file.flush()
            _fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """fsync a file or folder; on a file system or a platform that cannot, leave it to the operating system."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # Windows flushes only what may be written to
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; NaN and infinity become null."""
    with atomic_write(path) as file:
        json.dump(_finite(content), file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
