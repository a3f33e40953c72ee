"""Logging to the terminal and, on rank 0, to training.log."""

import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import transformers
from tqdm.auto import tqdm

NOISY = ("datasets", "httpx", "httpx2", "fsspec", "matplotlib")


class LogFile(logging.FileHandler):
    """A file handler that is removed when it cannot be written to (a full disk), with one warning."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.root.removeHandler(self)
        logging.getLogger(__name__).warning(f"{self.baseFilename} can no longer be written: {sys.exc_info()[1]}")


class TerminalHandler(logging.StreamHandler):
    """Writes above a progress bar: the message, with its level from warnings on."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream) if tqdm._instances else nullcontext():
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


def is_for_the_terminal(record: logging.LogRecord) -> bool:
    """Whether a record is shown on the terminal: warnings, and what is neither a detail nor from transformers."""
    is_detail = record.name.startswith("transformers") or getattr(record, "detail", False)
    return record.levelno >= logging.WARNING or not is_detail


def set_up_logging(folder: Path | None, level: int, with_details: bool = False) -> None:
    """Log plain messages to the terminal, and everything to training.log with time, level and logger.

    Args:
        folder: where training.log is appended to (None: no file).
        level: lowest level on the terminal.
        with_details: show details on the terminal too.
    """
    handlers: list[logging.Handler] = [TerminalHandler(sys.stderr)]
    handlers[0].setLevel(level)
    if not with_details:
        handlers[0].addFilter(is_for_the_terminal)
    if folder is not None:
        handlers.append(LogFile(folder / "training.log", encoding="utf-8"))
        layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        handlers[1].setFormatter(logging.Formatter(layout, "%Y-%m-%d %H:%M:%S"))
    handlers[0].setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers.trainer").setLevel(logging.INFO)
