"""Text of PDF files: lines of the layout → paragraphs, without page headers and page numbers.

A PDF knows glyphs and their places, no paragraphs: these are inferred from gaps, indents and how far the lines reach.
"""

import ctypes
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np

LINE = re.compile(r"[^\s\x00\x02\ufffe](?:[^\r\n\x02\ufffe]*[^\s\x00\x02\ufffe])?[\x02\ufffe]?")
DIVIDED = re.compile("[^\\W_][-\u2010\xad]$")
# Lines further apart than this many times the usual distance have a gap between them.
GAP = 1.25
SENTENCE_END = re.compile(r"[.!?…:][\"'”’»)\]]*$")
# Scripts written without spaces between words.
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")
WORD = re.compile(r"[^\W_]+(?:[-\u2010][^\W_]+)*")
LIGATURE = re.compile("[\ufb00-\ufb06]")
Box = tuple[float, float, float, float]  # left, bottom, right, top


class Line(NamedTuple):
    """A line of a page, in points from its left and lower edges; `word` is the width of its first word.

    A line that reads from right to left is mirrored: its left is minus its right.
    """

    page: int
    text: str
    left: float
    right: float
    baseline: float
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
    counts = Counter(word.lower() for page_lines in lines for line in page_lines for word in WORD.findall(line.text))
    flat = [line for page_lines in lines for line in _join_initials(page_lines, counts)]
    return _join(flat, Layout(flat), counts) if flat else ("", [])


def _lines(page: Any, number: int) -> Iterator[Line]:
    import pypdfium2.raw as pdfium_c

    text_page = page.get_textpage()
    # Character by character, since an index into get_text_range() need not be one into the page's characters.
    codes = [pdfium_c.FPDFText_GetUnicode(text_page, i) for i in range(text_page.count_chars())]
    characters = "".join(map(chr, codes))

    def box(i: int) -> Box:
        return _displayed(page, text_page.get_charbox(i, loose=True))

    def line(start: int, end: int) -> Line:
        # PDFium has \x02 for a hyphen at the end of a line, and no line end after it.
        text = re.sub("[\x02\ufffe]$", "-", characters[start:end])
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\x00", "")
        text = LIGATURE.sub(lambda ligature: unicodedata.normalize("NFKC", ligature[0]), " ".join(text.split()))
        word_end = start + len(characters[start:end].split(maxsplit=1)[0])
        boxes = [box(start), box(word_end - 1), box(end - 1)]
        if boxes[0][2] > boxes[2][2]:  # from right to left: mirrored
            boxes = [(-right, bottom, -left, top) for left, bottom, right, top in boxes]
        first, word, last = boxes
        pdfium_c.FPDFText_GetCharOrigin(text_page, start, x := ctypes.c_double(), y := ctypes.c_double())
        baseline = _displayed(page, (x.value, y.value, x.value, y.value))[1]
        height = max(map(_height, boxes))  # low for a part of a ligature
        return Line(number, text, first[0], last[2], baseline, height, word[2] - first[0])

    for match in LINE.finditer(characters):
        start, end = match.span()
        if abs(math.sin(2 * pdfium_c.FPDFText_GetCharAngle(text_page, start))) > 0.1:  # diagonal, as watermarks are
            continue
        is_large = characters[start].isupper() and _height(box(start)) > 1.5 * _height(box(end - 1))
        if is_large and end - start > 1 and characters[start + 1] not in " \x00":  # a drop cap
            yield line(start, start + 1)
            start += 1
        yield line(start, end)
    text_page.close()


def _height(box: Box) -> float:
    return box[3] - box[1]


def _displayed(page: Any, box: Box) -> Box:
    """A box on the page as it is displayed, which may be rotated."""
    (left, bottom, right, top), (width, height) = box, page.get_size()
    return {
        0: box,
        90: (bottom, height - right, top, height - left),
        180: (width - right, height - top, width - left, height - bottom),
        270: (width - top, left, width - bottom, right),
    }[page.get_rotation()]


def _pitch(lines: list[Line]) -> float:
    """The usual distance from a line to the next one: of several that are common, the smallest."""
    least = 0.8 * median(line.height for line in lines)  # less is in notes and superscripts
    pitches = (round(a.baseline - b.baseline) for a, b in pairwise(lines) if a.page == b.page)
    counts = Counter(pitch for pitch in pitches if pitch > least)
    common = max(counts.values(), default=0) / 2
    return min((pitch for pitch, count in counts.items() if count >= common), default=lines[0].height or 1.0)


def _drop_headers(pages: list[list[Line]], page_heights: list[float]) -> None:
    """Remove page headers, footers and page numbers, if they are one line.

    These are uppermost or lowest lines that half of the pages have at the same height, apart from the rest or in
    another size, and that say, but for numbers, the same on two pages on average.
    """
    pitch = _pitch([line for lines in pages for line in lines])
    usual_height = median(line.height for lines in pages for line in lines)
    for side in (1, -1):  # up, down
        bands: dict[int, dict[int, list[Line]]] = defaultdict(dict)
        for number, (lines, height) in enumerate(zip(pages, page_heights, strict=True)):
            outermost = max((side * line.baseline for line in lines), default=0.0)
            header = [line for line in lines if outermost - side * line.baseline < pitch / 4]
            rest = [side * line.baseline for line in lines if line not in header]
            is_apart = outermost - max(rest, default=-np.inf) > GAP * pitch
            if header and (is_apart or abs(header[0].height - usual_height) > 0.1 * usual_height):
                bands[round((outermost - height if side == 1 else outermost) / 3)][number] = header
        for headers in bands.values():
            said = {re.sub(r"\d+", "#", " ".join(line.text for line in header)) for header in headers.values()}
            if len(headers) >= max(3, len(pages) / 2) and len(said) <= len(headers) / 2:
                for number, header in headers.items():
                    pages[number] = [line for line in pages[number] if line not in header]


def _join_initials(lines: list[Line], counts: Counter[str]) -> list[Line]:
    """Drop caps joined to the first of the lines beside them, which then begin where the drop cap does."""
    joined: list[Line] = []
    initial: Line | None = None
    for line in lines:
        is_beside = initial and line.left >= initial.right - 1 and line.baseline > initial.baseline - line.height / 2
        if initial and is_beside and initial.height > 1.5 * line.height:
            if joined[-1] is initial:
                word = WORD.match(line.text)
                tail = word[0].lower() if word else ""
                is_word = initial.text in "AI" and len(tail) > 1 and counts[tail] > counts[initial.text.lower() + tail]
                joined.pop()
                line = line._replace(text=f"{initial.text}{' ' if is_word else ''}{line.text}")
            line = line._replace(left=initial.left, word=line.word + line.left - initial.left)
        else:
            initial = line if len(line.text) == 1 and line.text.isupper() else None
        joined.append(line)
    return joined


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
        indented: Counter[int] = Counter()  # after the end of a paragraph
        for a, b in pairwise(lines):
            if not self.is_gap(a, b) and not self.is_jump(a, b):
                is_wrapped, side = self.is_wrapped(a, b), self.side(a, b)
                score[self.column(a)][side] += 1 if is_wrapped else -4
                indented[self.column(b)] += side == 1 and not is_wrapped
        self.first_lines = {
            column
            for column, sides in score.items()
            if sides[-1] > max(sides[1], 0)
            and (sides[-1] > sides[0] or 2 * indented[column] > sides[-1])  # with quotations as far to the right
        }
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
        scale = max(1.0, min(a.height, b.height) / self.height)  # of a heading over several lines
        return a.page == b.page and a.baseline - b.baseline > GAP * self.pitch * scale

    def is_jump(self, a: Line, b: Line) -> bool:
        """Whether b is on another page or back up, in another column of text."""
        return a.page != b.page or b.baseline - a.baseline > self.height / 2

    def is_wrapped(self, a: Line, b: Line) -> bool:
        """Whether b's first word had no room at the end of a, or a ends in the middle of a word."""
        if DIVIDED.search(a.text) and b.text[0].islower():
            return True
        space = 0.2 * self.height
        margin = max(self.right_margin[self.column(a)], self.right_margin[self.column(b)])
        return self.right(a) + space + b.word > margin - space

    def separator(self, a: Line, b: Line) -> str:
        """What stands between two lines: a blank line, a line break, or (within a paragraph) a space."""
        if abs(a.baseline - b.baseline) < self.height / 4 and a.page == b.page and b.left >= a.right:
            return " "
        is_jump = self.is_jump(a, b)
        if self.is_gap(a, b) or (is_jump and abs(a.height - b.height) > 0.1 * self.height):  # into or out of a note
            return "\n\n"
        side = self.side(a, b)
        is_quotation = side == 0 and not SENTENCE_END.search(a.text) and self.is_wrapped(a, b)
        if self.column(b) in self.first_lines and side != -2 and not is_quotation:
            return "\n\n"
        goes_on = (
            side == 0
            or (side == -1 and self.column(a) in self.first_lines)
            or (side == 1 and self.column(a) in self.hanging)
        )
        if goes_on and self.is_wrapped(a, b):
            return " "
        if is_jump:  # from column to column, where a small letter alone tells
            return " " if abs(side) == 2 and b.text[0].islower() else "\n\n"
        return "\n"


def _join(lines: list[Line], layout: Layout, counts: Counter[str]) -> tuple[str, list[tuple[int, int]]]:
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
