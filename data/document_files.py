"""Documents in files of their own: plain text."""

from pathlib import Path
from typing import NamedTuple

from data.text_files import open_text

DOCUMENT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})


class Section(NamedTuple):
    """A place in a text: `name` from the character `start` on."""

    start: int
    name: str


def read_document_file(
    path: Path, encoding: str | None = None, encoding_errors: str = "strict"
) -> tuple[str, list[Section]]:
    """Text and sections of a document. Raises ValueError if it cannot be read."""
    with open_text(path, encoding, encoding_errors) as file:
        return file.read(), []
