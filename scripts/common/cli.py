"""Shared by the commands: parsing, errors and exit statuses.

0 done; 1 a user's error, reported in one paragraph; 130 interrupted; 143 terminated.
"""

import argparse
import csv
import gc
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from modeling.file_utils import disk_error, is_disk_full

# Errors that users can fix: wrong values, missing or unreadable files, a full disk. Anything else is a bug.
USER_ERRORS = (ValueError, OSError)


class UserParser(argparse.ArgumentParser):
    """A parser that raises `ValueError` instead of printing its usage."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        if self.add_help:
            self.add_argument("--log_level", choices=("info", "debug"), default="info", help="debug: with tracebacks")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        for index in range(len(args) - 1, 0, -1):
            # argparse takes the value in `--labels -1,0,1` for an option.
            if re.match(r"-\d", args[index]) and args[index - 1].startswith("--") and "=" not in args[index - 1]:
                args[index - 1 : index + 1] = [f"{args[index - 1]}={args[index]}"]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. ({self.prog} --help lists every option.)")


class Terminated(BaseException):
    """SIGTERM was received."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Ignore disk errors of TensorBoard's thread: the main thread raises them at its next write."""
    is_boards = type(failed.thread).__module__.startswith("tensorboard.")
    if is_debugging() or not is_boards or failed.exc_value is None or disk_error(failed.exc_value) is None:
        threading.__excepthook__(failed)


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command and return its exit status. Bugs show a traceback; so does any error with `--log_level debug`."""
    signal.signal(signal.SIGTERM, _terminate)
    threading.excepthook = _in_a_thread
    try:
        return main() or 0
    except BaseException as error:
        if (signal_received := interruption(error)) is not None:
            print("terminated" if signal_received == signal.SIGTERM else "interrupted", file=sys.stderr)
            return 128 + signal_received
        if not isinstance(error, Exception):
            raise
        known = error if isinstance(error, USER_ERRORS) else disk_error(error)
        if known is None or is_debugging():
            raise
        if logging.root.handlers:
            logging.getLogger("error").error(one_paragraph(known))
        else:
            print(f"error: {one_paragraph(known)}", file=sys.stderr)
        return 1


def interruption(error: BaseException | None) -> int | None:
    """The signal that an error comes from, also where a library failed while it cleaned up after the signal."""
    while error is not None:
        if isinstance(error, Terminated | KeyboardInterrupt):
            return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        error = error.__cause__ or error.__context__
    return None


def run_and_exit(main: Callable[[], int | None]) -> NoReturn:
    """Run a command that may be one of several ranks, and exit with its status."""
    returned: list[int] = []

    def record_status() -> int:
        returned.append(main() or 0)
        return returned[-1]

    try:
        status = run_main(record_status)
    except Exception:
        traceback.print_exc()
        status = 1
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(status)
    if returned in ([], [1]):
        # The error may be this rank's alone. Destroying the process group would wait for the other ranks (with nccl), which
        # wait for this one in a collective: exit at once, and the launcher ends them.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    # gloo's threads must end before Python does: one that releases its last work later would abort the process (exit
    # status -6). They end with the last reference to the process group; DDP holds some.
    gc.collect()
    distributed.destroy_process_group()
    gc.collect()
    sys.exit(status)


def scrub_hub_token() -> None:
    """Re-execute this process with --hub_token moved to HF_TOKEN, so that it is not visible in process listings."""
    rest: list[str] = []
    token, is_next = None, False
    for word in sys.orig_argv:
        option, sign, value = word.partition("=")
        if is_next:
            token, is_next = word, False
        elif option in ("--hub_token", "--hub-token"):
            token, is_next = value or token, not sign
        else:
            rest.append(word)
    if token:
        os.environ["HF_TOKEN"] = token
        os.execv(sys.executable, [sys.executable, *rest[1:]])  # noqa: S606 (itself)


def is_debugging() -> bool:
    """Whether `--log_level debug` was passed."""
    return "--log_level=debug" in sys.argv or any(
        option == "--log_level" and value == "debug" for option, value in zip(sys.argv, sys.argv[1:], strict=False)
    )


def comma_list(text: str) -> list[str]:
    """The items of a list such as `General,Teen,Mature`. An item with a comma is in double quotes, as in CSV."""
    return [item.strip() for item in next(csv.reader([text], skipinitialspace=True), []) if item.strip()]


def one_paragraph(error: BaseException) -> str:
    message = str(error)
    if "in DataLoader worker" in message:  # torch puts the worker's traceback before its message
        message = message.rsplit(f"{type(error).__name__}: ", 1)[-1]
    message = " ".join(message.split()) or type(error).__name__
    if is_disk_full(error) and "disk is full" not in message:
        message = message.rstrip(".") + ". The disk is full: make room, and run the command again (a training with "
        message += "--resume_from_checkpoint auto)."
    return message
