"""What the commands share: errors for people, and exit statuses.

0 done; 1 a mistake that can be mended, told in a paragraph; 130 interrupted; 143 terminated.
"""

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

# What a person can mend: wrong values, missing or unreadable files, a full disk. Anything else is a defect of ours.
USER_ERRORS = (ValueError, OSError)


class UserParser(argparse.ArgumentParser):
    """A parser whose complaints are `ValueError`s, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. ({self.prog} --help lists every option.)")


class Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command; its exit status. A traceback is shown for a defect, or with `--log_level debug`."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return main() or 0
    except Terminated:
        print("terminated", file=sys.stderr)
        return 143
    except USER_ERRORS as error:
        if is_debugging():
            raise
        if logging.root.handlers:
            logging.getLogger("error").error(one_paragraph(error))
        else:
            print(f"error: {one_paragraph(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def is_debugging() -> bool:
    """Whether `--log_level debug` stands on the command line."""
    return "--log_level=debug" in sys.argv or any(
        option == "--log_level" and value == "debug" for option, value in zip(sys.argv, sys.argv[1:], strict=False)
    )


def one_paragraph(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += (
            ". The disk is full: make room, and run the command again (a training with --resume_from_checkpoint auto)."
        )
    return said
