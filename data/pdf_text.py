"""Text of PDF files: lines of the layout → paragraphs, without page headers and page numbers.

A PDF knows glyphs and their places, no paragraphs: these are inferred from gaps, indents and how far the lines reach.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

LINE = re.compile(r"[^\r\n\x02\ufffe]+[\x02\ufffe]?")
DIVIDED = re.compile("[^\\W_][-\u2010\xad]$")
# Lines further apart than this many times the usual distance have a gap between them.
GAP = 1.3
# Scripts written without spaces between words.
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")
WORD = re.compile(r"[^\W_]+(?:[-\u2010][^\W_]+)*")
LIGATURE = re.compile("[\ufb00-\ufb06]")


class Line(NamedTuple):
    """A line of a page, in points from the page's left and lower edges; `word` is the width of its first word."""

    page: int
    text: str
    left: float
    right: float
    bottom: float
    height: float
    word: float


def pdf_text(pdf: Any) -> tuple[str, list[tuple[int, int]]]:
    """Text of a `pypdfium2.PdfDocument`, and (offset, number from 1) of each page with text."""
    lines, page_heights = [], []
    for number, page in enumerate(pdf):
        lines.append(list(_lines(page, number)))
        page_heights.append(page.get_height())
        page.close()
    if any(lines):
        _drop_headers(lines, page_heights)
    flat = [line for page_lines in lines for line in page_lines]
    return _join(flat, Layout(flat)) if flat else ("", [])


def _lines(page: Any, number: int) -> Iterator[Line]:
    import pypdfium2.raw as pdfium_c

    text_page = page.get_textpage()
    # Character by character, since an index into get_text_range() need not be one into the page's characters.
    codes = [pdfium_c.FPDFText_GetUnicode(text_page, i) for i in range(text_page.count_chars())]
    characters = "".join(map(chr, codes))
    for match in LINE.finditer(characters):
        raw = match[0]
        if not raw.strip():
            continue
        # PDFium has \x02 for a hyphen at the end of a line, and no line end after it.
        text = re.sub("[\x02\ufffe]$", "-", raw).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = LIGATURE.sub(lambda ligature: unicodedata.normalize("NFKC", ligature[0]), text)
        start, end = match.start() + len(raw) - len(raw.lstrip()), match.start() + len(raw.rstrip())
        word_end = start + len(re.match(r"\S+", raw.lstrip())[0])  # type: ignore[index]
        left, bottom, right, top = text_page.get_charbox(start, loose=True)
        word_right = text_page.get_charbox(word_end - 1, loose=True)[2]
        right = text_page.get_charbox(end - 1, loose=True)[2]
        text = " ".join(text.replace("\x00", "").split())
        if text:
            yield Line(number, text, left, right, bottom, top - bottom, word_right - left)
    text_page.close()


def _pitch(lines: list[Line]) -> float:
    """The usual distance from a line to the next one."""
    counts = Counter(round(a.bottom - b.bottom) for a, b in pairwise(lines) if a.page == b.page)
    return max((pitch for pitch in counts if pitch > 0), key=counts.__getitem__, default=lines[0].height or 1.0)


def _drop_headers(pages: list[list[Line]], page_heights: list[float]) -> None:
    """Remove page headers, footers and page numbers, if they are one line.

    These are uppermost or lowest lines that half of the pages have at the same height, apart from the rest or in
    another size, and that say, but for numbers, one of a few things: at most a third as many as there are of them.
    """
    pitch = _pitch([line for lines in pages for line in lines])
    usual_height = median(line.height for lines in pages for line in lines)
    for side in (1, -1):  # up, down
        bands: dict[int, dict[int, list[Line]]] = defaultdict(dict)
        for number, (lines, height) in enumerate(zip(pages, page_heights, strict=True)):
            outermost = max((side * line.bottom for line in lines), default=0.0)
            header = [line for line in lines if outermost - side * line.bottom < pitch / 4]
            rest = [side * line.bottom for line in lines if line not in header]
            is_apart = outermost - max(rest, default=-np.inf) > GAP * pitch
            if header and (is_apart or abs(header[0].height - usual_height) > 0.1 * usual_height):
                bands[round((outermost - height if side == 1 else outermost) / 3)][number] = header
        for headers in bands.values():
            said = {re.sub(r"\d+", "#", " ".join(line.text for line in header)) for header in headers.values()}
            if len(headers) >= max(3, len(pages) / 2) and len(said) <= len(headers) / 3:
                for number, header in headers.items():
                    pages[number] = [line for line in pages[number] if line not in header]


class Layout:
    """Margins, indents and line pitch of a document.

    Columns are left edges in steps of half a line height, measured from the left margin of the odd or the even pages.
    """

    def __init__(self, lines: list[Line]):
        self.height = median(line.height for line in lines) or 1.0
        edges = defaultdict(list)
        for line in lines:
            edges[line.page % 2].append(line.left)
        self.margin = {parity: float(np.quantile(lefts, 0.05)) for parity, lefts in edges.items()}
        self.pitch = _pitch(lines)

        # Where lines of a column end at most: the 99th percentile, as a line may stick out.
        ends = defaultdict(list)
        for line in lines:
            ends[self.column(line)].append(self.right(line))
        self.right_margin = {column: float(np.quantile(rights, 0.99)) for column, rights in ends.items()}

        # A column whose wrapped lines go on further left is one of first lines; further right, one of hanging indents. If
        # lines that had room left are followed there, it is not: a name in a screenplay stands right of what is said.
        score: dict[int, Counter[int]] = defaultdict(Counter)
        for a, b in pairwise(lines):
            if not self.is_gap(a, b) and not self.is_jump(a, b):
                score[self.column(a)][self.side(a, b)] += 1 if self.is_wrapped(a, b) else -4
        self.first_lines = {column for column, sides in score.items() if sides[-1] > max(sides[0], sides[1], 0)}
        self.hanging = {column for column, sides in score.items() if sides[1] > max(sides[0], sides[-1], 0)}

    def left(self, line: Line) -> float:
        return line.left - self.margin[line.page % 2]

    def right(self, line: Line) -> float:
        return line.right - self.margin[line.page % 2]

    def column(self, line: Line) -> int:
        return round(self.left(line) / self.height * 2)

    def side(self, a: Line, b: Line) -> int:
        """0: b starts where a does; -1 or 1: up to an indent further left or right; ±2: elsewhere."""
        move = (self.left(b) - self.left(a)) / self.height
        if abs(move) < 0.5:
            return 0
        return (1 if abs(move) < 4 else 2) * (1 if move > 0 else -1)

    def is_gap(self, a: Line, b: Line) -> bool:
        return a.page == b.page and a.bottom - b.bottom > GAP * self.pitch

    def is_jump(self, a: Line, b: Line) -> bool:
        """Whether b is on another page or back up, in another column of text."""
        return a.page != b.page or b.bottom - a.bottom > self.height / 2

    def is_wrapped(self, a: Line, b: Line) -> bool:
        """Whether b's first word had no room at the end of a, or a ends in the middle of a word."""
        if DIVIDED.search(a.text) and b.text[0].islower():
            return True
        space = 0.2 * self.height
        margin = max(self.right_margin[self.column(a)], self.right_margin[self.column(b)])
        return self.right(a) + space + b.word > margin - space

    def separator(self, a: Line, b: Line) -> str:
        """What stands between two lines: a blank line, a line break, or (within a paragraph) a space."""
        if abs(a.bottom - b.bottom) < self.height / 4 and a.page == b.page and b.left >= a.right:
            return " "
        if self.is_gap(a, b):
            return "\n\n"
        side = self.side(a, b)
        if self.column(b) in self.first_lines and side != -2:
            return "\n\n"
        goes_on = (
            side == 0
            or (side == -1 and self.column(a) in self.first_lines)
            or (side == 1 and self.column(a) in self.hanging)
        )
        if goes_on and self.is_wrapped(a, b):
            return " "
        if self.is_jump(a, b):  # from column to column, where a small letter alone tells
            return " " if abs(side) == 2 and b.text[0].islower() else "\n\n"
        return "\n"


def _join(lines: list[Line], layout: Layout) -> tuple[str, list[tuple[int, int]]]:
    counts = Counter(word.lower() for line in lines for word in WORD.findall(line.text))
    parts = [lines[0].text]
    pages = [(0, lines[0].page + 1)]
    length = len(parts[0])
    for a, b in pairwise(lines):
        separator = layout.separator(a, b)
        if separator == " ":
            parts[-1], separator = _unbroken(parts[-1], b.text, counts)
            length = length - len(a.text) + len(parts[-1])
        if b.page + 1 != pages[-1][1]:
            pages.append((length + len(separator), b.page + 1))
        parts += [separator, b.text]
        length += len(separator) + len(b.text)
    return "".join(parts), pages


def _unbroken(a: str, b: str, counts: Counter[str]) -> tuple[str, str]:
    """Line a, without its hyphen if it only divides a word, and what stands between it and line b of the paragraph.

    A hyphen in front of a small letter stays if the document has the word with the hyphen more often than without.
    """
    if DIVIDED.search(a):
        if not (b[0].islower() and b[0].isalpha()):
            return a, ""
        head, tail = re.search(r"[^\W_]+$", a[:-1])[0].lower(), re.match(r"[^\W_]+", b)[0].lower()  # type: ignore[index]
        is_compound = counts[f"{head}-{tail}"] > counts[head + tail]
        return (a if is_compound else a[:-1]), ""
    if (a[-1] == "—" and a[-2:-1] != " ") or (UNSPACED.match(a[-1]) and UNSPACED.match(b[0])):
        return a, ""
    return a, " "
