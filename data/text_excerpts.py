"""Excerpts of texts for people to read: harmless characters, bounded length, differences between two texts."""

import re
import unicodedata
from difflib import SequenceMatcher

# A word with the space after it, or a single character: scripts without spaces are compared by character.
PIECE = re.compile(r"[^\W\u2e80-\U0003ffff]+\s*|.", re.DOTALL)
CONTEXT = 100  # characters before the first difference
Pieces = list[tuple[str, bool]]  # a text in parts, and whether each part differs from the other text


def visible(text: str, layout: str = "\n\r\t\u200c\u200d") -> str:
    """Replace invisible characters, such as controls and changes of direction, by their codes; keep spaces and `layout`.

    >>> visible("a\\u202eb")
    'a⟨U+202E⟩b'
    """
    return "".join(
        char if char.isprintable() or char in layout or unicodedata.category(char) == "Zs" else f"⟨U+{ord(char):04X}⟩"
        for char in text
    )


def visible_name(name: str, length: int = 80) -> str:
    """A label, id or other name on one line, cut in its middle, with every space but the plain one shown by its code.

    >>> visible_name("season 1/episode 1.srt", 16)
    'season 1…e 1.srt'
    """
    half = length // 2
    short = name if len(name) <= length else f"{name[:half]}…{name[half + 1 - length :]}"
    return "".join(char if char.isprintable() else f"⟨U+{ord(char):04X}⟩" for char in short)


def character_name(text: str) -> str:
    """Code and Unicode name of a character; "" for a longer text."""
    return f"U+{ord(text):04X} {unicodedata.name(text, '').lower()}".strip() if len(text) == 1 else ""


def beginning(text: str, length: int) -> str:
    return visible(text[:length]) + ("…" if len(text) > length else "")


def first_and_last_words(text: str, length: int = 80) -> tuple[str, str]:
    """About `length` characters of the beginning and of the end, cut between words; the end is "" for a short text.

    >>> first_and_last_words("one two three four", 8)
    ('one two …', 'four')
    """
    if len(text) <= 2 * length:
        return " ".join(visible(text).split()), ""
    first, last = text[:length], text[-length:]
    first, last = re.sub(r"\S+$", "", first) or first, re.sub(r"^\S+", "", last) or last
    return " ".join([*visible(first).split(), "…"]), " ".join(visible(last).split())


def first_difference(first: str, second: str, block: int = 4096) -> int:
    """Index of the first character that differs; the length of the shorter text if there is none."""
    shorter = min(len(first), len(second))
    starts = (i for i in range(0, shorter, block) if first[i : i + block] != second[i : i + block])
    start = next(starts, shorter)
    return next((i for i in range(start, min(start + block, shorter)) if first[i] != second[i]), shorter)


def differences(first: str, second: str, length: int = 500) -> tuple[Pieces, Pieces]:
    """Excerpts of two texts around their first difference, in parts that are marked where they differ."""
    start = 0 if first == second else max(0, first_difference(first, second) - CONTEXT)
    # More is compared than shown: where one text has more, the ends of what is shown have their counterpart.
    one, other = (PIECE.findall(text[start : start + 2 * length]) for text in (first, second))
    marked: tuple[Pieces, Pieces] = ([], [])
    for name, *bounds in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        for result, pieces, low, high in zip(marked, (one, other), bounds[::2], bounds[1::2], strict=True):
            result.append(("".join(pieces[low:high]), name != "equal"))
    excerpts = _excerpt(marked[0], length, start > 0), _excerpt(marked[1], length, start > 0)
    for excerpt, text in zip(excerpts, (first, second), strict=True):
        if start + length < len(text):
            excerpt.append(("…", False))
    return excerpts


def _excerpt(pieces: Pieces, length: int, is_cut: bool) -> Pieces:
    """The first `length` characters, made visible; `is_cut`: whether something comes before them."""
    excerpt: Pieces = [("…", False)] if is_cut else []
    for text, differs in pieces:
        if shown := text[:length]:
            excerpt.append((visible(shown), differs))
        length -= len(shown)
    return excerpt
