"""Documents of every format in, text and its places out. All files are made here."""

import io
import random
import sys
import warnings
import zipfile
from pathlib import Path

import fpdf
import matplotlib
import pypdfium2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.document_files import DOCUMENT_SUFFIXES, read_document_file
from modeling.hierarchical_roberta.chunking import PARAGRAPH

WORDS = (
    "the old harbour was dark and nobody answered when she called from the extraordinary lighthouse at night".split()
)
POINTS_PER_CHARACTER = 7.2  # Courier 12


def text_of(path: Path, **options) -> str:
    return read_document_file(path, **options)[0]


def write(path: Path, content: str | bytes, **encoding) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(**encoding))
    return path


def paragraph(rng: random.Random, length: int = 40) -> str:
    return " ".join(rng.choices(WORDS, k=length)).capitalize() + "."


# ---- Plain text and HTML -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".TEXT"])
def test_plain_text_keeps_its_characters(tmp_path, suffix):
    text = "# Café\r\n\r\n*One*  line\n\ttwo\r\n\n\n"
    assert read_document_file(write(tmp_path / f"a{suffix}", text)) == (text, [])
    assert text_of(write(tmp_path / f"a{suffix}", "\ufeff" + text)) == text
    assert text_of(write(tmp_path / f"a{suffix}", text, encoding="utf-16")) == text
    assert text_of(write(tmp_path / f"a{suffix}", text, encoding="cp1252"), encoding="cp1252") == text
    assert text_of(write(tmp_path / f"a{suffix}", "")) == ""


def test_plain_text_of_another_encoding(tmp_path):
    path = write(tmp_path / "a.txt", "one\ncafé noir", encoding="cp1252")
    with pytest.raises(ValueError, match=r"a\.txt: line 2 is not UTF-8"):
        read_document_file(path)
    assert text_of(path, encoding_errors="replace") == "one\ncaf\ufffd noir"


HTML = """<!DOCTYPE html [<!ENTITY x "<p>no</p>">]><html><head><title>Not text</title><style>p {}</style><script>var a = "<p>no</p>";</script></head>
<body><h1>Chapter&nbsp;1</h1><p>One   paragraph,
wrapped &amp; <b>marked</b>&mdash;with a <a href="https://example.org">link</a>.<p>Un<br>closed <img alt="no" src="data:image/png;base64,AAAA">
<ul><li>first</li><li>second</ul><![unknown]><table><tr><td>Ann<td>7</tr><tr><td>Bob<td>8</tr></table><![endif]>
<!-- no --><p>&nbsp;</p><svg><text>no</text></svg><select><option>no</select><pre>
a
  b</pre>soft&shy;hyphen<p><ruby>漢<rp>(</rp><rt>no<rp>)</rp></ruby>字<![CDATA[ <b> & c]]></body></html>"""
TEXT_OF_HTML = (
    "Chapter 1\n\nOne paragraph, wrapped & marked—with a link.\n\nUn\nclosed\n\nfirst\nsecond\n\nAnn 7\nBob 8\n\na\nb\n\n"
    "softhyphen\n\n漢字 <b> & c"
)


@pytest.mark.parametrize("suffix", [".html", ".htm", ".xhtml"])
def test_html(tmp_path, suffix):
    assert read_document_file(write(tmp_path / f"a{suffix}", HTML)) == (TEXT_OF_HTML, [])


@pytest.mark.parametrize(
    "declaration, encoding",
    [
        ("", "utf-8"),
        ("<meta charset=windows-1251>", "cp1251"),
        ('<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-1">', "cp1252"),
        ('<?xml version="1.0" encoding="shift_jis"?>', "shift_jis"),
        ("<meta charset=windows-1251>", "utf-16"),  # the mark is right
        ("<meta charset=utf-8>", "utf-8-sig"),
        ("<meta charset=nonsense>", "utf-8"),
    ],
)
def test_html_in_the_encoding_it_declares(tmp_path, declaration, encoding):
    text = {"cp1251": "Жили-были", "cp1252": "“Café”", "shift_jis": "吾輩は猫である"}.get(encoding, "Ünï漢")
    path = write(tmp_path / "a.html", f"{declaration}<p>{text}</p>", encoding=encoding)
    assert text_of(path) == text


def test_an_encoding_that_is_asked_for_is_the_one_of_html(tmp_path):
    path = write(tmp_path / "a.html", "<meta charset=utf-8><p>Жили</p>", encoding="cp1251")
    assert text_of(path, encoding="cp1251") == "Жили"
    with pytest.raises(ValueError, match="not UTF-8"):
        read_document_file(path)


# ---- Word processors and e-books ---------------------------------------------------------------------------------------


def write_zip(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_docx(path: Path, body: str) -> Path:
    office = "http://schemas.openxmlformats.org"
    relation, package = f"{office}/officeDocument/2006/relationships", f"{office}/package/2006"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    w = f'xmlns:w="{office}/wordprocessingml/2006/main"'

    def relations(**targets: str) -> str:
        each = "".join(
            f'<Relationship Id="{name}" Type="{relation}/{name}" Target="{target}"/>'
            for name, target in targets.items()
        )
        return f'<Relationships xmlns="{package}/relationships">{each}</Relationships>'

    note = '<w:footnote w:id="2"><w:p><w:r><w:t>A note.</w:t></w:r></w:p></w:footnote>'
    return write_zip(
        path,
        {
            "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
            '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
            "_rels/.rels": relations(officeDocument="word/document.xml"),
            "word/document.xml": f"<w:document {w}><w:body>{body}</w:body></w:document>",
            "word/_rels/document.xml.rels": relations(footnotes="footnotes.xml"),
            "word/footnotes.xml": f"<w:footnotes {w}>{note}</w:footnotes>",
        },
    )


DOCX = (
    "<w:p><w:r><w:t>Caf\u00e9 &amp; *stars*</w:t></w:r></w:p><w:p><w:r><w:t>A line</w:t><w:br/><w:t>break</w:t></w:r>"
    "<w:del><w:r><w:delText>deleted</w:delText></w:r></w:del><w:ins><w:r><w:t> inserted</w:t></w:r></w:ins>"
    '<w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
)


def test_docx(tmp_path):
    text, sections = read_document_file(write_docx(tmp_path / "a.docx", DOCX))
    assert text == "Café & *stars*\n\nA line\nbreak inserted[1]\n\nA note."
    assert sections == []


ODT = (
    "<office:document-content><office:text><text:tracked-changes><text:p>deleted</text:p></text:tracked-changes>"
    '<text:h>Title</text:h><text:p>One<text:s text:c="2"/>two<text:line-break/>three'
    "<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>A note.</text:p></text:note-body></text:note>goes on"
    "<office:annotation><text:p>comment</text:p></office:annotation></text:p><text:p/><text:p>Caf\u00e9</text:p>"
    "</office:text></office:document-content>"
)


def write_odt(path: Path, manifest: str = "<manifest:manifest/>") -> Path:
    return write_zip(path, {"content.xml": ODT, "META-INF/manifest.xml": manifest})


def test_odt(tmp_path):
    assert text_of(write_odt(tmp_path / "a.odt")) == "Title\n\nOne two\nthree 1 goes on\n\nCafé\n\nA note."
    with pytest.raises(ValueError, match=r"a\.odt: encrypted: save it without a password\."):
        read_document_file(write_odt(tmp_path / "a.odt", "<manifest:encryption-data/>"))


def write_epub(path: Path, **more: str) -> Path:
    """Two chapters, listed in an order of their own and in a folder, and a table of contents."""
    container = '<container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
    html = "application/xhtml+xml"
    package = f"""<?xml version="1.0" encoding="utf-8"?><opf:package><opf:manifest>
    <opf:item id="two" href="text/b.xhtml" media-type="{html}"/>
    <opf:item id="one" href="text/chapter%201.xhtml" media-type="{html}"/>
    <opf:item id="nav" href="nav.xhtml" media-type="{html}" properties="nav"/>
    <opf:item id="cover" href="cover.jpg" media-type="image/jpeg"/></opf:manifest>
    <opf:spine><opf:itemref idref="cover"/><opf:itemref idref="nav"/><opf:itemref idref="one"/><opf:itemref idref="two"/>
    </opf:spine></opf:package>"""
    return write_zip(
        path,
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": container,
            "OEBPS/book.opf": package,
            "OEBPS/nav.xhtml": "<p>Contents</p>",
            "OEBPS/text/chapter 1.xhtml": "<html><head><title/></head><body><h1>One</h1><p>Once upon a time.</p></body></html>",
            "OEBPS/text/b.xhtml": "<html><body><h1>Two</h1><p>The end.</p></body></html>".encode("utf-16"),
            "OEBPS/cover.jpg": b"\xff\xd8",
            **{name.replace("__", "/") + ".xml": content for name, content in more.items()},
        },
    )


def test_epub_in_reading_order(tmp_path):
    path = write_epub(tmp_path / "a.epub")
    assert read_document_file(path) == ("One\n\nOnce upon a time.\n\nTwo\n\nThe end.", [])


def test_epub_with_encrypted_chapters(tmp_path):
    def encrypting(name: str) -> str:
        return f'<encryption><enc:EncryptedData><enc:CipherReference URI="{name}"/></enc:EncryptedData></encryption>'

    path = write_epub(tmp_path / "a.epub", **{"META-INF__encryption": encrypting("OEBPS/font.otf")})
    assert text_of(path).startswith("One")
    write_epub(path, **{"META-INF__encryption": encrypting("OEBPS/text/chapter%201.xhtml")})
    with pytest.raises(ValueError, match=r"a\.epub: encrypted \(DRM\): get a copy without\."):
        read_document_file(path)


# ---- PDF ---------------------------------------------------------------------------------------------------------------


class Typewriter(fpdf.FPDF):
    """Pages of letter size with lines of Courier 12; x and y in points from the upper left corner."""

    def __init__(self) -> None:
        super().__init__(unit="pt", format="letter")
        self.set_auto_page_break(False)
        self.set_font("Courier", "", 12)

    def lines(self, x: float, y: float, lines: list[str], pitch: float = 12) -> float:
        for line in lines:
            self.text(x, y, line)
            y += pitch
        return y


def wrap(text: str, width: int, indent: int = 0) -> list[str]:
    """Lines of at most `width` characters, as many words in each as fit."""
    lines = [" " * indent]
    for word in text.split():
        if lines[-1].strip() and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] += (" " if lines[-1].strip() else "") + word
    return lines


def number_and_title(pdf: Typewriter, page: int) -> None:
    pdf.text(200, 50, "THE LIGHTHOUSE")
    pdf.text(300, 700, str(page))


def write_novel(
    path: Path, paragraphs: list[str], *, indent: int, gap: float, password: str = "", header=number_and_title
) -> Path:
    """Pages with a header, 30 lines and a page number, whose margins alternate as a book's."""
    pdf = Typewriter()
    y = 1000.0
    for text in paragraphs:
        for line in wrap(text, 50, indent):
            if y > 100 + 30 * 16:
                pdf.add_page()
                x = 90 if pdf.page_no() % 2 else 120
                header(pdf, pdf.page_no())
                y = 100
            pdf.text(x + POINTS_PER_CHARACTER * (len(line) - len(line.lstrip())), y, line.lstrip())
            y += 16
        y += gap
    if password:
        pdf.set_encryption(owner_password="owner", user_password=password)
    pdf.output(str(path))
    return path


@pytest.mark.parametrize("indent, gap", [(4, 0), (0, 10), (0, 4.5)])
def test_pdf_paragraphs_are_those_of_the_novel(tmp_path, indent, gap):
    """Whether the layout marks them by an indent or by a gap, and wherever the pages break."""
    rng = random.Random(0)
    paragraphs = [paragraph(rng, rng.choice([5, 40, 80])) for _ in range(40)]
    text, sections = read_document_file(write_novel(tmp_path / "a.pdf", paragraphs, indent=indent, gap=gap))
    assert PARAGRAPH.split(text) == paragraphs
    assert "\n\n".join(paragraphs) == text

    num_pages = len(sections)
    assert num_pages > 5
    assert [section.name for section in sections] == [f"page {number}" for number in range(1, num_pages + 1)]
    starts = [section.start for section in sections]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert all(not text[start].isspace() and (start == 0 or text[start - 1].isspace()) for start in starts)


def test_pdf_quotations_that_are_indented_as_first_lines_are(tmp_path):
    rng = random.Random(10)
    pdf = Typewriter()
    expected = []
    for _ in range(6):
        pdf.add_page()
        y = 100.0
        for length in (40, 5, 40, 20):
            expected.append(paragraph(rng, length))
            y = pdf.lines(90, y, wrap(expected[-1], 50, 4))
        expected.append(paragraph(rng, 60))
        y = pdf.lines(90 + 4 * POINTS_PER_CHARACTER, y + 12, wrap(expected[-1], 46)) + 12
        expected.append(paragraph(rng, 20))
        pdf.lines(90, y, wrap(expected[-1], 50, 4))
    pdf.output(str(tmp_path / "a.pdf"))
    assert text_of(tmp_path / "a.pdf") == "\n\n".join(expected)


def alternating(pdf: Typewriter, page: int) -> None:
    pdf.text(90, 50, f"{page} Jane Author" if page % 2 else f"The Lighthouse {page}")


def roman_numbers(pdf: Typewriter, page: int) -> None:
    pdf.text(300, 700, "i" if page == 1 else str(page - 1))


def watermark(pdf: Typewriter, page: int) -> None:
    with pdf.rotation(45, 300, 400):
        pdf.text(250, 400, "DRAFT")


@pytest.mark.parametrize("header", [alternating, roman_numbers, watermark])
def test_pdf_headers_are_no_text(tmp_path, header):
    rng = random.Random(6)
    paragraphs = [paragraph(rng, rng.choice([5, 40, 80])) for _ in range(20)]
    path = write_novel(tmp_path / "a.pdf", paragraphs, indent=4, gap=0, header=header)
    assert text_of(path) == "\n\n".join(paragraphs)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_pdf_pages_that_are_displayed_rotated(tmp_path, rotation):
    rng = random.Random(7)
    paragraphs = [paragraph(rng, rng.choice([5, 40])) for _ in range(10)]
    pdf = Typewriter()
    pdf.add_page()
    with pdf.rotation(rotation, 306, 396):
        y = 200.0
        for text in paragraphs:
            y = pdf.lines(100, y, wrap(text, 50)) + 10
    pdf.output(str(tmp_path / "a.pdf"))
    rotated = pypdfium2.PdfDocument(tmp_path / "a.pdf")
    rotated[0].set_rotation(rotation)
    rotated.save(tmp_path / "b.pdf")
    assert text_of(tmp_path / "b.pdf") == "\n\n".join(paragraphs)


@pytest.mark.parametrize("initial, rest", [("T", "he"), ("A", " lighthouse")])
def test_pdf_drop_cap(tmp_path, initial, rest):
    rng = random.Random(8)
    text = f"{rest} {paragraph(rng, 60)}"
    beside, below = wrap(text.strip(), 40)[:2], wrap(text.strip(), 40)[2:]
    pdf = Typewriter()
    pdf.add_page()
    pdf.set_font("Courier", "", 40)
    pdf.text(90, 112, initial)
    pdf.set_font("Courier", "", 12)
    pdf.lines(116, 100, beside)
    y = pdf.lines(90, 124, wrap(" ".join(below), 44))
    pdf.lines(90, y + 12, wrap(f"The harbour, {paragraph(rng)}", 44))
    pdf.output(str(tmp_path / "a.pdf"))
    assert text_of(tmp_path / "a.pdf").split("\n\n")[0] == initial + text


def test_pdf_right_to_left(tmp_path):
    text = "בראשית ברא אלהים את השמים ואת הארץ " * 9
    pdf = Typewriter()
    pdf.add_font("DejaVu", "", Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    pdf.set_font("DejaVu", "", 12)
    pdf.add_page()
    for i, line in enumerate(wrap(text, 50)):
        pdf.text(500 - pdf.get_string_width(line), 100 + 16 * i, line[::-1])  # glyphs from left to right
    pdf.output(str(tmp_path / "a.pdf"))
    assert text_of(tmp_path / "a.pdf") == text.strip()


def test_pdf_notes_at_the_foot(tmp_path):
    """They are paragraphs of their own."""
    rng = random.Random(9)
    pdf = Typewriter()
    lines = wrap(paragraph(rng, 90), 48)
    for number in (1, 2):
        pdf.add_page()
        pdf.lines(90, 100, lines[5 * number - 5 : 5 * number])
        pdf.set_font("Courier", "", 8)
        pdf.text(90, 690, f"{number} A note that is as wide as the whole page, or nearly so, at its size.")
        pdf.set_font("Courier", "", 12)
    pdf.output(str(tmp_path / "a.pdf"))
    texts = text_of(tmp_path / "a.pdf").split("\n\n")
    assert texts[0::2] == [" ".join(lines[:5]), " ".join(lines[5:10])]
    assert [text[:8] for text in texts[1::2]] == ["1 A note", "2 A note"]


@pytest.mark.parametrize("names", [("ANN", "BARTHOLOMEW (V.O.)", "ANN"), ("ANN", "BOB", "ANN")])
def test_pdf_lines_of_a_screenplay(tmp_path, names):
    rng = random.Random(1)
    pdf = Typewriter()
    expected = []
    for page in range(12):
        pdf.add_page()
        pdf.text(530, 36, f"{page + 1}.")
        scene = ["INT. LIGHTHOUSE - NIGHT", paragraph(rng, 30)]
        y = pdf.lines(108, 72, [scene[0]]) + 12
        y = pdf.lines(108, y, wrap(scene[1], 60)) + 12
        expected += scene
        aside = "(quietly)" if page else "(turning to her dark old window)"
        for name in names:
            speech = [paragraph(rng, 20), paragraph(rng, 3)]
            y = pdf.lines(266, y, [name])
            y = pdf.lines(223, y, wrap(aside, 20))
            y = pdf.lines(180, y, wrap(speech[0], 35))
            y = pdf.lines(223, y, ["(beat)"])
            y = pdf.lines(180, y, wrap(speech[1], 35)) + 12
            expected.append("\n".join([name, aside, speech[0], "(beat)", speech[1]]))
    pdf.output(str(tmp_path / "a.pdf"))
    assert text_of(tmp_path / "a.pdf") == "\n\n".join(expected)


def test_pdf_words_divided_at_line_ends(tmp_path):
    pdf = Typewriter()
    pdf.add_page()
    lines = [
        "They understood a well-known word, an under-",
        "standing that the harbour gave them, a well-",
        "known one. Ann",
    ]
    pdf.lines(90, 100, [*lines, "left. And so she for-", "got it."])
    pdf.lines(90, 200, ["A verse is short", "And so is this", "Another line that is as wide as a page can be."])
    pdf.add_page()
    pdf.text(90, 100, "The end.")
    pdf.output(str(tmp_path / "a.pdf"))
    text, sections = read_document_file(tmp_path / "a.pdf")
    assert text == (
        "They understood a well-known word, an understanding that the harbour gave them, a well-known one. Ann\n"
        "left. And so she forgot it.\n\n"
        "A verse is short\nAnd so is this\nAnother line that is as wide as a page can be. The end."
    )
    assert sections == [(0, "page 1"), (text.index("The end."), "page 2")]


def test_pdf_two_columns(tmp_path):
    rng = random.Random(2)
    paragraphs = [paragraph(rng, 60) for _ in range(6)]
    lines = [line for text in paragraphs for line in wrap(text, 30, 2)]
    pdf = Typewriter()
    pdf.add_page()
    half = next(i for i in range(len(lines) // 2, len(lines)) if lines[i][0].islower())
    for x, column in ((60, lines[:half]), (330, lines[half:])):
        for i, line in enumerate(column):
            pdf.text(x + POINTS_PER_CHARACTER * (len(line) - len(line.lstrip())), 80 + 12 * i, line.lstrip())
    pdf.output(str(tmp_path / "a.pdf"))
    assert text_of(tmp_path / "a.pdf") == "\n\n".join(paragraphs)


def test_pdf_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.pdf"
    write_novel(path, [paragraph(random.Random(3))], indent=0, gap=0, password="secret")
    with pytest.raises(ValueError, match=r"a\.pdf: encrypted: save it without its password\.$"):
        read_document_file(path)

    scan = Typewriter()
    scan.add_page()
    scan.text(100, 100, "A cover sheet")
    for _ in range(4):
        scan.add_page()
        scan.rect(100, 100, 50, 50)
    scan.output(str(path))
    with pytest.raises(
        ValueError, match=r"a\.pdf: no text in 4 of its 5 pages, .*: recognize it first, e\.g\. ocrmypdf"
    ):
        read_document_file(path)

    no_pages = b"%PDF-1.3\n1 0 obj<</Pages 2 0 R/Type/Catalog>>endobj 2 0 obj<</Count 0/Kids[]/Type/Pages>>endobj\n"
    for content in (b"", b"%PDF-1.7\nnothing", no_pages + b"trailer<</Root 1 0 R/Size 3>>\n%%EOF"):
        with pytest.raises(ValueError, match=r"a\.pdf: damaged, or not PDF \(.*\): check that it opens elsewhere"):
            read_document_file(write(path, content))


# ---- Subtitles ---------------------------------------------------------------------------------------------------------

SRT = """1
00:00:01,000 --> 00:00:02,500
<i>First</i> line
of two

2
00:00:03,000 --> 00:00:04,000
- <font color="red">No!</font>
- No!

3
01:02:03,400 --> 01:02:05,000
Much {\\an8}later
"""
VTT = """WEBVTT
Kind: captions

STYLE
::cue { color: red }

NOTE a remark

intro
00:01.000 --> 00:03.000 align:start position:0%
<v Ann>Hello &amp; welcome

00:03.000 --> 00:03.010
Hello &amp; welcome

00:03.010 --> 00:06.000
Hello &amp; welcome
rolling<00:04.000><c> on</c><00:05.000><c> and on</c>
"""
ASS = """[Script Info]
ScriptType: v4.00+

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:05.00,0:00:07.00,Default,,0,0,0,,{\\k20}Second{\\k30} line\\Nbroken
Dialogue: 0,0:00:01.00,0:00:03.00,Default,,0,0,0,,First, with a comma
Dialogue: 1,0:00:01.00,0:00:03.00,Default,,0,0,0,,{\\blur3}First, with a comma
Dialogue: 1,0:00:03.04,0:00:03.50,Default,,0,0,0,,First, with a comma
Comment: 0,0:00:04.00,0:00:05.00,Default,,0,0,0,,a comment
Dialogue: 0,0:00:04.00,0:00:05.00,Default,,0,0,0,,{\\p1}m 0 0 l 1 1{\\p0}
Dialogue: 0,0:00:15.00,0:00:17.00,Default,,0,0,0,,First, with a comma
"""


@pytest.mark.parametrize(
    "name, source, lines",
    [
        ("a.srt", SRT, {"First line of two": "00:00:01", "- No! - No!": "00:00:03", "\nMuch later": "01:02:03"}),
        ("a.vtt", SRT, {"First line of two": "00:00:01", "- No! - No!": "00:00:03", "\nMuch later": "01:02:03"}),
        ("a.srt", VTT, {"Hello & welcome": "00:00:01", "rolling on and on": "00:00:03"}),
        ("a.vtt", VTT, {"Hello & welcome": "00:00:01", "rolling on and on": "00:00:03"}),
        (
            "a.ass",
            ASS,
            {"First, with a comma": "00:00:01", "Second line broken": "00:00:05", "\nFirst, with a comma": "00:00:15"},
        ),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_subtitles(tmp_path, name, source, lines, line_end):
    text, sections = read_document_file(write(tmp_path / name, source.replace("\n", line_end)))
    assert text == "\n".join(lines)
    assert [section.name for section in sections] == list(lines.values())
    assert [text[section.start :].split("\n")[0] for section in sections] == [line.strip() for line in lines]


@pytest.mark.parametrize("name, start, dot", [("a.srt", "1\n", ","), ("a.vtt", "WEBVTT\n\n", ".")])
def test_subtitles_keep_what_only_looks_like_markup(tmp_path, name, start, dot):
    times = f"00:00:01{dot}000 --> 00:00:02{dot}000"
    path = write(
        tmp_path / name, f"{start}{times}\n<i>I</i> {{aside}} &lt;3 &amp; {{\\i1}}you{{\\i0}}, &lt;Ann&gt;\\Nno\n"
    )
    assert text_of(path) == "I {aside} <3 & you, <Ann> no"


def test_a_subtitle_repeated_later_stays(tmp_path):
    times = ["00:00:01,000 --> 00:00:02,000", "00:00:02,500 --> 00:00:03,000", "00:00:03,000 --> 00:00:04,000"]
    source = "\n\n".join(f"{i}\n{time}\nNo." for i, time in enumerate(times, 1))
    text, sections = read_document_file(write(tmp_path / "a.srt", source))
    assert text == "No.\nNo."
    assert [section.name for section in sections] == ["00:00:01", "00:00:02"]


# ---- What cannot be read -----------------------------------------------------------------------------------------------


def example(folder: Path, suffix: str) -> Path:
    path = folder / f"example{suffix}"
    if suffix == ".pdf":
        return write_novel(path, [paragraph(random.Random(4))] * 3, indent=2, gap=0)
    if suffix in (".docx", ".odt", ".epub"):
        return write_docx(path, DOCX) if suffix == ".docx" else {".odt": write_odt, ".epub": write_epub}[suffix](path)
    return write(path, {".srt": SRT, ".vtt": VTT, ".ass": ASS, ".ssa": ASS}.get(suffix, HTML))


@pytest.mark.parametrize("suffix", sorted(DOCUMENT_SUFFIXES))
def test_every_suffix_is_read(tmp_path, suffix):
    path = example(tmp_path, suffix)
    assert len(text_of(path)) > 20
    assert text_of(path.rename(path.with_suffix(suffix.upper()))) == text_of(path.with_suffix(suffix.upper()))


@pytest.mark.parametrize(
    "suffix, package", [(".pdf", "pypdfium2"), (".docx", "mammoth"), (".srt", "pysubs2"), (".ass", "pysubs2")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"reading {suffix} files needs {package}, .* pip install -e '\.\[files\]'\.$"
    ):
        read_document_file(example(tmp_path, suffix))


@pytest.mark.parametrize("suffix", sorted(DOCUMENT_SUFFIXES))
def test_a_file_is_not_what_its_suffix_says(tmp_path, suffix):
    rtf = write(tmp_path / f"b{suffix}", "{\\rtf1 Text}")
    with pytest.raises(ValueError, match=rf"by its content a \.rtf file, not \{suffix}: rename it"):
        read_document_file(rtf)
    for other in (".pdf", ".epub"):
        if suffix in (other, ".docx", ".odt") and other == ".epub":
            continue
        if suffix == other:
            continue
        path = example(tmp_path, other).rename(tmp_path / f"a{suffix}")
        with pytest.raises(
            ValueError, match=rf"a\{suffix}: by its content a .*\{other}.* file, not \{suffix}: rename it"
        ):
            read_document_file(path)


@pytest.mark.parametrize("suffix", [".docx", ".odt", ".epub"])
def test_an_archive_of_another_kind_or_a_truncated_one(tmp_path, suffix):
    path = write_zip(tmp_path / f"a{suffix}", {"a.txt": "text"})
    kind = suffix[1:].upper()
    with pytest.raises(ValueError, match=rf"a\{suffix}: damaged, or not {kind} \("):
        read_document_file(path)
    content = example(tmp_path, suffix).read_bytes()
    for damaged in (b"", content[: len(content) // 2]):
        with pytest.raises(ValueError, match=rf"a\{suffix}: damaged, or not {kind} \("):
            read_document_file(write(path, damaged))


def test_an_epub_whose_spine_has_no_such_item(tmp_path):
    path = tmp_path / "a.epub"
    container = '<container><rootfile full-path="a.opf"/></container>'
    write_zip(path, {"META-INF/container.xml": container, "a.opf": '<spine><itemref idref="one"/></spine>'})
    with pytest.raises(ValueError, match=r"not EPUB \(its spine has 'one', which is not in its manifest\)"):
        read_document_file(path)


def test_an_epub_with_a_chapter_in_another_encoding(tmp_path):
    path = example(tmp_path, ".epub")
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        archive.writestr("OEBPS/text/b.xhtml", "<p>Café</p>".encode("cp1252"))
    with pytest.raises(ValueError, match=r"example\.epub: not utf-8 throughout: pass its --encoding, or"):
        read_document_file(path)
    assert text_of(path, encoding="cp1252").endswith("Café")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_not_compressed(tmp_path, suffix):
    path = write(tmp_path / f"a.html{suffix}", "<p>Text</p>")
    with pytest.raises(ValueError, match=rf"a\.html\{suffix}: not a complete compressed file"):
        read_document_file(path)


def test_an_encrypted_docx(tmp_path):
    path = write(tmp_path / "a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    with pytest.raises(ValueError, match=r"a\.docx: encrypted, or a \.doc file of old: save it as \.docx"):
        read_document_file(path)


@pytest.mark.parametrize(
    "name, content", [("a.html", "<title>no</title><p> </p>"), ("a.srt", "no subtitles"), ("a.ass", "")]
)
def test_files_without_text(tmp_path, name, content):
    with pytest.raises(ValueError, match=rf"{name}: no text in it"):
        read_document_file(write(tmp_path / name, content))


def test_an_unsupported_suffix(tmp_path):
    with pytest.raises(
        ValueError, match=r"a\.doc: expected one of the suffixes \.ass, .*\.xhtml, got \.doc: save it as one of these\."
    ):
        read_document_file(write(tmp_path / "a.doc", "text"))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".html", ".pdf", ".docx", ".odt", ".epub", ".srt", ".vtt", ".ass"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path, capfd, suffix, data):
    path = tmp_path / f"example{suffix}"
    content = bytearray((path if path.exists() else example(tmp_path, suffix)).read_bytes())
    if data.draw(st.booleans(), "an example with damage"):
        for _ in range(data.draw(st.integers(1, 8))):
            start = data.draw(st.integers(0, len(content)))
            content[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    else:
        content = data.draw(st.one_of(st.binary(), st.text("<![]>&-/?=\"' abp\n0123:.,", max_size=200).map(str.encode)))
    path = write(tmp_path / f"a{suffix}", bytes(content))
    with warnings.catch_warnings(action="error"):
        try:
            text, sections = read_document_file(path)
        except ValueError as error:
            assert str(error).startswith((str(path), f"{path}:"))
            assert "\n" not in str(error)
        else:
            assert all(0 <= section.start < len(text) for section in sections)
    assert capfd.readouterr().err == ""


def test_libraries_do_not_warn(tmp_path):
    style = "[V4+ Styles]\nFormat: Name, Fontsize\nStyle: Default,huge\n\n[Events]"
    path = write(tmp_path / "a.ass", ASS.replace("[Events]", style))
    with warnings.catch_warnings(action="error"):
        assert text_of(path).startswith("First")


def test_an_archive_member_may_be_damaged(tmp_path):
    """The zip's own list of files is right, and what it holds is not."""
    content = io.BytesIO(example(tmp_path, ".epub").read_bytes())
    damaged = content.getvalue().replace(b"Once upon a time.", b"Once upon a tame.")
    with pytest.raises(ValueError, match=r"a\.epub: damaged, or not EPUB \(Bad CRC-32"):
        read_document_file(write(tmp_path / "a.epub", damaged))


def test_an_element_left_open_does_not_swallow_the_page(tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<p>One.</p><button>Share<p>Two <math><mi>x</mi></math>.</p><svg><p>Three.</p>")
    assert read_document_file(path)[0] == "One.\n\nTwo x.\n\nThree."
