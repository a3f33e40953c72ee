"""Document files → text: plain text, HTML, PDF, DOCX, ODT, EPUB and subtitles.

    text, sections = read_document_file(Path("novel.epub"))

PDF, DOCX and subtitles need the packages of the extra `files`.
"""

import contextlib
import html
import importlib
import io
import posixpath
import re
import warnings
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from data.pdf_text import pdf_text
from data.text_files import BROKEN_ARCHIVE, MARKS, open_bytes, open_text, suffix_of

PLAIN = {".txt", ".text", ".md", ".markdown", ".rst"}
HTML = {".html", ".htm", ".xhtml"}
SUBTITLES = {".srt", ".vtt", ".ass", ".ssa"}
DOCUMENT_SUFFIXES = frozenset(PLAIN | HTML | SUBTITLES | {".pdf", ".docx", ".odt", ".epub"})

# What files of these formats begin with.
MAGIC = {b"%PDF-": {".pdf"}, b"PK\x03\x04": {".docx", ".odt", ".epub"}, b"{\\rtf": {".rtf"}}

# Subtitles of one conversation follow each other within two or three seconds: a longer pause is often a change of scene.
PAUSE_MS = 5_000
# Up to a frame and a half apart, the same line in two subtitles is one line that stays on the screen.
ADJACENT_MS = 60
SUBTITLE_TAG = re.compile(r"\{(?:\\|[a-z]:)[^{}]*\}|<\s*/?\s*(?:[bcisuv]|font|span|br)\b[^<>]*>", re.IGNORECASE)


class Section(NamedTuple):
    """A place in the text, from the character at `start` on: a page ("page 3") or a subtitle's time ("00:12:31")."""

    start: int
    name: str


def read_document_file(
    path: Path, encoding: str | None = None, encoding_errors: str = "strict"
) -> tuple[str, list[Section]]:
    """Text of a file of one of `DOCUMENT_SUFFIXES`, and its pages or times where the format has them.

    Plain text and Markdown keep their characters. In other formats paragraphs are separated by a blank line, and other
    lines by a line break.

    Raises:
        ValueError: an encrypted or damaged file, one of another format than its suffix says, one without text (unless
            plain text), bytes of another encoding, an unsupported suffix, or a missing package.
    """
    suffix = suffix_of(path)
    sections: list[Section] = []
    start = _read_bytes(path, 4096)
    for magic, suffixes in MAGIC.items():
        if start.startswith(magic) and suffix not in suffixes:
            formats = " or ".join(sorted(suffixes))
            raise ValueError(f"{path}: by its content a {formats} file, not {suffix}: rename it.")
    if suffix in PLAIN:
        with open_text(path, encoding, encoding_errors) as file:
            return file.read(), []
    elif suffix in HTML:
        with open_text(path, encoding or _declared_encoding(start), encoding_errors) as file:
            source = file.read()
        with _naming_damage(path):
            text = html_text(source)
    elif suffix == ".pdf":
        text, sections = _read_pdf(path)
    elif suffix == ".docx":
        text = _read_docx(path)
    elif suffix == ".odt":
        text = _read_odt(path)
    elif suffix == ".epub":
        text = _read_epub(path, encoding, encoding_errors)
    elif suffix in SUBTITLES:
        with open_text(path, encoding, encoding_errors) as file:
            text, sections = _read_subtitles(path, file.read())
    else:
        known = ", ".join(sorted(DOCUMENT_SUFFIXES))
        raise ValueError(
            f"{path}: expected one of the suffixes {known}, got {suffix or 'none'}: save it as one of these."
        )
    if not text:
        raise ValueError(f"{path}: no text in it: remove the file, or check that it is the right one.")
    return text, sections


def _read_bytes(path: Path, size: int = -1) -> bytes:
    try:
        with open_bytes(path) as file:
            return file.read(size)
    except (*BROKEN_ARCHIVE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: not a complete compressed file ({error}): compress it again.") from error


def import_extra(name: str, path: Path) -> Any:
    """Import a package that reads a file. Raises ValueError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{path}: reading {suffix_of(path)} files needs {name}, which comes with the extra `files`: "
            "pip install -e '.[files]'."
        ) from error


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn whatever a library raises over a file that it cannot read into one sentence, and keep its warnings quiet."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not {error.encoding} throughout: pass its --encoding, or --encoding_errors replace."
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    kind = suffix_of(path)[1:].upper()
    return ValueError(f"{path}: damaged, or not {kind} ({reason}): check that it opens elsewhere, and export it again.")


# ---- HTML --------------------------------------------------------------------------------------------------------------


CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)
DOCTYPE = re.compile(r"<!DOCTYPE[^<>\[]*\[.*?\]\s*>", re.DOTALL | re.IGNORECASE)


class _TextOfHTML(HTMLParser):
    """Collects the text of HTML, and of ODT's XML, with "\\n\\n" around paragraphs, "\\v" around lines, "\\n" for a break."""

    # Only elements whose end tag HTML demands (others might never end), and readings of characters, which end with <ruby>.
    DROPPED = frozenset(
        "script style title template noscript svg select textarea button iframe object audio video canvas rt rp "
        "text:tracked-changes text:ruby-text office:annotation svg:title svg:desc".split()
    )
    # These hold no paragraphs: one ends them if they were left open.
    WITHOUT_PARAGRAPHS = frozenset("svg select button audio video canvas object rt rp".split())
    PARAGRAPHS = frozenset(
        "address article aside blockquote body center details dialog div dl fieldset figcaption figure footer form h1 h2 "
        "h3 h4 h5 h6 header hgroup hr main nav ol p pre section summary table ul text:p text:h".split()
    )
    LINES = frozenset("caption dd dt li tr".split())
    BREAKS = frozenset(["br", "text:line-break"])
    SPACES = frozenset("td th text:s text:tab text:note".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.notes: list[str] = []  # of ODT, which has them in the middle of their paragraphs
        self.dropped: list[str] = []  # open elements without text of the document
        self.num_pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.PARAGRAPHS:
            self.dropped = [outer for outer in self.dropped if outer not in self.WITHOUT_PARAGRAPHS]
        if tag in self.DROPPED:
            self.dropped.append(tag)
        self.num_pre += tag == "pre"
        if tag == "text:note-body":
            self.parts, self.notes = self.notes, self.parts
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.dropped:
            del self.dropped[self.dropped.index(tag) :]
        if tag == "ruby":
            self.dropped = [outer for outer in self.dropped if outer not in ("rt", "rp")]
        self.num_pre = max(0, self.num_pre - (tag == "pre"))
        if tag not in self.BREAKS:
            self._separate(tag)
        if tag == "text:note-body":
            self.parts, self.notes = self.notes, self.parts

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # As in XHTML, where this is an empty element.
        if tag not in self.DROPPED:
            self._separate(tag)

    def _separate(self, tag: str) -> None:
        if tag in self.PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in self.LINES:
            self.parts.append("\v")
        elif tag in self.BREAKS:
            self.parts.append("\n")
        elif tag in self.SPACES:
            self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.dropped:
            self.parts.append(data if self.num_pre else re.sub(r"\s+", " ", data))

    def parse_html_declaration(self, i: int) -> int:
        # XML's, which Python's parser ends at the first ">".
        if match := CDATA.match(self.rawdata, i):
            self.handle_data(match[1])
        else:
            match = DOCTYPE.match(self.rawdata, i)
        return match.end() if match else super().parse_html_declaration(i)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        # Word's <![if …]>, over which Python's parser may raise AssertionError (python/cpython#77057).
        return self.parse_bogus_comment(i)


def html_text(source: str) -> str:
    """Text of HTML: block elements are paragraphs; scripts, images, links' targets and form controls are left out."""
    parser = _TextOfHTML()
    parser.feed(source)
    parser.close()
    text = re.sub(r"[^\S\n\v]+", " ", "".join([*parser.parts, "\n\n", *parser.notes]).replace("\xad", ""))
    return re.sub(r"[ \n\v]*[\n\v][ \n\v]*", lambda run: "\n\n" if run[0].count("\n") > 1 else "\n", text).strip()


def _declared_encoding(start: bytes) -> str | None:
    """The encoding that HTML declares (`<meta charset=…>`, `<?xml encoding=…?>`), if Python knows it and no mark overrides it."""
    found = re.search(rb"""(?:charset|<\?xml[^>]*encoding)\s*=\s*["']?([\w.:-]+)""", start, re.IGNORECASE)
    if not found or start.startswith((b"\xef\xbb\xbf", *MARKS)):
        return None
    name = found[1].decode("ascii", "replace").lower()
    # As browsers do. What could be searched as ASCII is not UTF-16.
    name = {"iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252", "utf-16": "utf-8"}.get(name, name)
    try:
        "".encode(name)
    except (LookupError, UnicodeError):
        return None
    return None if name in ("utf-8", "utf8") else name


# ---- Word processors and e-books ------------------------------------------------------------------------------------------


def _read_docx(path: Path) -> str:
    mammoth = import_extra("mammoth", path)
    content = _read_bytes(path)
    if content.startswith(b"\xd0\xcf\x11\xe0"):
        raise ValueError(f"{path}: encrypted, or a .doc file of old: save it as .docx without a password.")
    with _naming_damage(path):
        source = mammoth.convert_to_html(io.BytesIO(content), convert_image=lambda image: []).value
        # Mammoth's links from the notes back to the text.
        source = re.sub(r' ?<a href="#(?:foot|end)note-ref-\d+">↑</a>', "", source)
        return html_text(source)


def _read_odt(path: Path) -> str:
    with _naming_damage(path), zipfile.ZipFile(io.BytesIO(_read_bytes(path))) as archive:
        is_encrypted = b"encryption-data" in archive.read("META-INF/manifest.xml")
        text = "" if is_encrypted else html_text(archive.read("content.xml").decode("utf-8"))
    if is_encrypted:
        raise ValueError(f"{path}: encrypted: save it without a password.")
    return text


def _read_epub(path: Path, encoding: str | None, encoding_errors: str) -> str:
    with _naming_damage(path), zipfile.ZipFile(io.BytesIO(_read_bytes(path))) as archive:
        parts = _epub_parts(archive)
        is_encrypted = not _encrypted_parts(archive).isdisjoint(parts)
        contents = [] if is_encrypted else [archive.read(part) for part in parts]
        texts = [html_text(_decode_html(content, encoding, encoding_errors)) for content in contents]
    if is_encrypted:
        raise ValueError(f"{path}: encrypted (DRM): get a copy without.")
    return "\n\n".join(text for text in texts if text)


def _epub_parts(archive: zipfile.ZipFile) -> list[str]:
    """The archive's names of the HTML files of an EPUB in reading order, without its table of contents."""
    package = _elements(archive.read("META-INF/container.xml"), "rootfile")[0]["full-path"]
    content = archive.read(package)
    items = {item["id"]: item for item in _elements(content, "item")}
    spine = [entry["idref"] for entry in _elements(content, "itemref")]
    if absent := [name for name in spine if name not in items]:
        raise ValueError(f"its spine has {absent[0]!r}, which is not in its manifest")
    return [
        posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item["href"])))
        for item in map(items.__getitem__, spine)
        if "html" in item["media-type"] and "nav" not in item.get("properties", "").split()
    ]


def _encrypted_parts(archive: zipfile.ZipFile) -> set[str]:
    name = "META-INF/encryption.xml"
    listed = _elements(archive.read(name), "cipherreference") if name in archive.namelist() else []
    return {unquote(element["uri"]) for element in listed}


def _elements(content: bytes, tag: str) -> list[dict[str, str]]:
    """Attributes of the XML elements of a name in small letters, whatever their prefix."""
    attributes = []

    class Elements(HTMLParser):
        def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
            if name.rpartition(":")[2] == tag:
                attributes.append({key: value or "" for key, value in attrs})

    parser = Elements()
    parser.feed(_decode_html(content))
    parser.close()
    return attributes


def _decode_html(content: bytes, encoding: str | None = None, errors: str = "strict") -> str:
    marked = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    return content.decode(encoding or _declared_encoding(content[:4096]) or marked, errors)


# ---- PDF ---------------------------------------------------------------------------------------------------------------


def _read_pdf(path: Path) -> tuple[str, list[Section]]:
    pdfium = import_extra("pypdfium2", path)
    content = _read_bytes(path)
    try:
        pdf = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        if b"/Encrypt" in content and "password" in str(error):
            raise ValueError(f"{path}: encrypted: save it without its password.") from error
        raise _damaged(path, error) from error
    with _naming_damage(path), contextlib.closing(pdf):
        num_pages = len(pdf)
        text, pages = pdf_text(pdf)
    if len(pages) < num_pages / 4:  # a picture book has more
        raise ValueError(
            f"{path}: no text in {num_pages - len(pages)} of its {num_pages} pages, only images if any (a scan?): recognize "
            "it first, e.g. ocrmypdf --skip-text scan.pdf text.pdf."
        )
    return text, [Section(start, f"page {number}") for start, number in pages]


# ---- Subtitles ---------------------------------------------------------------------------------------------------------


def _read_subtitles(path: Path, source: str) -> tuple[str, list[Section]]:
    pysubs2 = import_extra("pysubs2", path)
    source = re.sub(r"\r\n?", "\n", source).lstrip()
    # SRT and VTT by their content: either is found with the other's suffix.
    kind = "ass" if suffix_of(path) in (".ass", ".ssa") else "vtt" if source.startswith("WEBVTT") else "srt"
    with _naming_damage(path):
        subtitles = pysubs2.SSAFile.from_string(
            _cues_of_vtt(source) if kind == "vtt" else source, kind, keep_html_tags=True
        )
        events = sorted(subtitles.get_text_events(), key=lambda event: event.start)

    text, sections, last_end = "", [], None
    shown_until: dict[str, int] = {}
    for event in events:
        plain = event.plaintext
        if kind != "ass":  # where text may stand in braces
            plain = html.unescape(SUBTITLE_TAG.sub("", event.text)).replace("\\N", "\n").replace("\\h", " ")
        lines = [" ".join(line.split()) for line in plain.splitlines()]
        # Layers and karaoke repeat a line at its time, rolling captions in the next subtitle.
        new = [line for line in lines if line and event.start > shown_until.get(line, -ADJACENT_MS - 1) + ADJACENT_MS]
        shown_until |= {line: max(event.end, shown_until.get(line, 0)) for line in lines}
        if new:
            pause = last_end is not None and event.start - last_end >= PAUSE_MS
            text += ("\n\n" if pause else "\n") if text else ""
            sections.append(Section(len(text), _time_code(event.start)))
            text += " ".join(new)
        last_end = max(event.end, last_end or 0)
    return text, sections


def _cues_of_vtt(source: str) -> str:
    """The cues of a WebVTT file without what pysubs2 would take for their text: identifiers, notes, styles, inner times."""
    cues = []
    for block in re.split(r"\n[^\S\n]*\n", source):
        before, arrow, after = block.rpartition("-->")
        if arrow:
            end, _, text = after.partition("\n")
            text = re.sub(r"<rt>[^<>]*</rt>|<[^<>]*>", "", text)
            cues.append(f"{before.rpartition(chr(10))[2]}-->{end}\n{text}")
    return "WEBVTT\n\n" + "\n\n".join(cues)


def _time_code(milliseconds: int) -> str:
    minutes, seconds = divmod(milliseconds // 1000, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"
