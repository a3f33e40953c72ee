"""Opening of text files: compression, encodings, and which encoding a file that is not UTF-8 probably has."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
from charset_normalizer import CharsetMatch, from_bytes

# What opens a compressed file. zstd comes with pyarrow; the standard library has it from Python 3.14 on.
OPENERS = {
    ".gz": gzip.open,
    ".tgz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}
# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DETECTION_BYTES = 1 << 18
BROKEN_ARCHIVE = (EOFError, lzma.LZMAError, zlib.error, pa.ArrowException)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without that of a compression.

    >>> suffix_of(Path("A.CSV.gz"))
    '.csv'
    """
    name = Path(path.stem) if path.suffix.lower() in OPENERS else path
    return name.suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed by its suffix."""
    opener = OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rb")  # type: ignore[operator, return-value]


@contextlib.contextmanager
def open_text(path: Path, encoding: str | None = None, errors: str = "strict") -> Iterator[IO[str]]:
    """Open a text file with its line ends kept: in the encoding of its byte order mark, else in `encoding`, by default UTF-8.

    Raises:
        ValueError: an unknown encoding; a truncated or damaged compressed file; on reading, bytes that are not of this encoding,
            with their line and the probable encoding.
    """
    encoding = check_encoding(encoding) if encoding else None
    try:
        with open_bytes(path) as file:
            encoding = _marked(path, encoding)
            with io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="") as text:
                yield text
    except UnicodeError as error:
        raise wrong_encoding(path, encoding or "utf-8") from error
    except (*BROKEN_ARCHIVE, OSError) as error:
        is_broken = not isinstance(error, OSError) or error.errno is None  # pyarrow's have none
        if path.suffix.lower() not in OPENERS or not is_broken:
            raise
        raise ValueError(
            f"{path}: not a complete {path.suffix.lower()[1:]} file ({error}): compress it again."
        ) from error


def check_encoding(encoding: str) -> str:
    """The encoding. Raises ValueError if Python knows no text encoding of this name."""
    try:
        "".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"--encoding {encoding} is not a text encoding that Python knows, such as cp1252 or utf-16."
        ) from error
    return encoding


def _marked(path: Path, encoding: str | None) -> str:
    """The encoding that a byte order mark names, else the given one or UTF-8. Raises WrongEncoding for NULs in UTF-8."""
    with open_bytes(path) as file:
        start = file.read(1 << 12)
    encoding = next((marked for mark, marked in MARKS.items() if start.startswith(mark)), encoding)
    if not encoding and b"\0" in start:
        place = start.index(b"\0")
        width = 32 if start.count(0) * 2 > len(start) else 16
        guess = f"utf-{width}-{'be' if start[::2].count(0) > start[1::2].count(0) else 'le'}"
        raise WrongEncoding(
            f"{path}: not a text file (a NUL at byte {place + 1}). If it is text without a byte order mark, pass --encoding {guess}.",
            1,
        )
    return encoding or "utf-8"


class WrongEncoding(ValueError):
    """A file is not of its encoding. `line` is the first that is not, from 1."""

    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


def wrong_encoding(path: Path, encoding: str) -> ValueError:
    """Build an error that locates the first line that is not of this encoding, and names the one that it probably has."""
    name = "UTF-8" if encoding.startswith("utf-8") else encoding
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    with open_bytes(path) as file:
        if wide:
            return ValueError(f"{path}: not {name}, or cut off in the middle of a character. Set its --encoding.")
        bad: list[bytes] = []
        size, first, location, is_mixed = 0, 0, "", False
        for number, line in enumerate(file, 1):
            if line.isascii():
                continue
            try:
                line.decode(encoding)
                is_mixed = name == "UTF-8"  # other encodings rarely look like it
            except UnicodeError as error:
                if not first:
                    first, position = number, getattr(error, "start", 0)
                    location = f"line {number} is not {name}: byte 0x{line[position]:02x} at column {position + 1}"
                bad.append(line)
            size += len(line)
            if location and size > DETECTION_BYTES:
                break
    probable = detect_encoding(b"".join(bad)[-DETECTION_BYTES:])
    advice = f"It is probably {probable}: pass --encoding {probable}." if probable else "Pass its --encoding."
    if is_mixed:
        advice = f"Other lines are UTF-8: correct this one{f', which is probably {probable}' if probable else ''}."
    return WrongEncoding(
        f"{path}: {location or f'not {name}'}. {advice} Or replace such bytes by U+FFFD with --encoding_errors replace.",
        first,
    )


def detect_encoding(sample: bytes) -> str | None:
    """The encoding that the non-ASCII lines of a file probably have, or None.

    charset_normalizer's best guess, but Windows' western encoding where that is as good: short samples fit many.
    """
    matches = list(from_bytes(sample))
    if not matches:
        return None

    def is_as_good(match: CharsetMatch) -> bool:
        return match.chaos <= matches[0].chaos + 0.01 and match.coherence >= matches[0].coherence - 0.02

    for match in matches:
        if "cp1252" in [match.encoding, *match.could_be_from_charset] and is_as_good(match):
            return "cp1252"
    return matches[0].encoding
