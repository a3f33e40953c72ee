"""The report page: what is in the file, and what a reader can do with it in a browser."""

import copy
import json
import re
import shutil
from html.parser import HTMLParser

import jinja2
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from data.report_page import readable_number
from scripts.evaluation.report import write_report

LABELS = ["General", "Teen", "Mature"]
HOSTILE = (
    "He wrote <script>window.hacked = true</script> and </script> and <!-- and &lt; and <b>bold</b>. The end of it."
)
EMOJI = "A fox 🦊 ran. 😀 The murder was on page one, and naïve 👩‍👧 readers saw it. Nobody spoke of it. " * 3
in_browser = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not shutil.which("chromium") or not shutil.which("chromedriver"),
        reason="chromium and chromium-driver are not installed",
    ),
]


def interval(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def document(number: int, text: str, label: str, predicted: str, evidence: list[str], width: int = 60) -> dict:
    """A document of chunks of `width` characters, each reaching ten into the next, of which the first five are read."""
    starts = range(0, max(1, len(text) - 10), width - 10)
    return {
        "id": f"story-{number}",
        "label": label,
        "predicted": predicted,
        "confidence": 0.5 + 0.04 * number,
        "by_bias": False,
        "scores": {name: 0.9 if name == predicted else 0.05 for name in LABELS},
        "truncated": len(starts) > 5,
        "counted": False,
        "num_chunks": len(starts),
        "review": number % 5 == 0,
        "text": text,
        "explained": [
            {
                "label": predicted,
                "score": 0.9,
                "chunks": [
                    {
                        "start": start,
                        "end": min(len(text), start + width),
                        "contribution": 0.2 - 0.1 * (i % 4),
                        "attention": 0.1,
                        "read": i < 5,
                    }
                    for i, start in enumerate(starts)
                ],
                "evidence": [
                    {
                        "start": text.index(words),
                        "end": text.index(words) + len(words),
                        "score": 0.5 / (rank + 1),
                        "section": "title",
                    }
                    for rank, words in enumerate(evidence)
                ],
            }
        ],
        "metadata": [["url", "http://a?b=<script>"]],
    }


@pytest.fixture
def report():
    """Ten small documents, of which two miss, one is hostile, one has emoji and one is long enough to be folded."""
    quiet = "The boat came in late. " * 400
    documents = [document(i, f"Lamp {i}. " * 20, LABELS[i % 3], LABELS[i % 3], [f"Lamp {i}."]) for i in range(6)]
    documents[3] |= {"by_bias": True, "scores": {"General": 0.3, "Teen": 0.4, "Mature": 0.3}}
    documents += [
        document(6, HOSTILE, "General", "Mature", ["The end of it."]),
        document(
            7, EMOJI, "Mature", "Mature", ["The murder was on page one, and naïve 👩‍👧 readers saw it.", "Nobody spoke"]
        ),
        document(8, quiet + "There was a murder.", "Mature", "Teen", ["The boat came in late."], width=1500),
        document(10, "A visit to https://example.org was planned.", "Teen", "Teen", ["https://example.org"]),
    ]
    row = {"values": [interval(0.8), interval(0.85), interval(0.7)]}
    return {
        "title": "Ratings of <stories>",
        "headline": "Macro-F1 0.800 (0.75 to 0.85) on 10 test documents.",
        "headline_is_warning": True,
        "labels": LABELS,
        "is_multi_label": False,
        "comparison_columns": ["Macro-F1", "Accuracy", "Recall of Mature"],
        "facts": [["Model", "outputs/stories"], ["Test documents", 10]],
        "metrics": [{"name": "Macro-F1", "note": "all labels count the same", **interval(0.8)}],
        "baselines": [
            {"name": "this model", "difference": None, **row},
            {"name": "TF-IDF", "difference": interval(0.3), **row},
        ],
        "figures": [{"title": "Confusion", "caption": "Rows are labels.", "png": b"\x89PNG not really"}],
        "tables": [{"title": "Per label", "caption": "On test.", "columns": ["label", "F1"], "rows": [["Teen", 0.5]]}],
        "documents_note": "1 of 10 documents, marked “by bias”, has another label than the highest score.",
        "documents": documents,
    }


@pytest.fixture
def path(report, tmp_path):
    write_report(report, tmp_path / "report.html")
    return tmp_path / "report.html"


class Page(HTMLParser):
    """What a browser would make of the page: JSON blocks by id, tag names, and every address that it would load."""

    def __init__(self, html: str):
        super().__init__()
        self.blocks: dict[str, str] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.styles = ""
        self.inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes
        ]
        self.inside = "style" if tag == "style" else attributes.get("id") if tag == "script" else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "style":
            self.styles += data
        elif self.inside:
            self.blocks[self.inside] = self.blocks.get(self.inside, "") + data


def test_every_document_is_there_as_it_was(report, path):
    blocks = Page(path.read_text(encoding="utf-8")).blocks
    for number, expected in enumerate(report["documents"]):
        assert json.loads(blocks[f"document-{number}"]) == expected
    summary = json.loads(blocks["summary"])
    assert summary["labels"] == LABELS
    assert [row["id"] for row in summary["documents"]] == [row["id"] for row in report["documents"]]
    assert not any("text" in row or "explained" in row for row in summary["documents"])


def test_nothing_is_loaded_from_elsewhere(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert page.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert not re.search(r"url\(|@import", page.styles)
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    template = "".join(path.read_text(encoding="utf-8").partition('id="document-0"')[:1])
    assert "http://" not in template
    assert "https://" not in template


def test_words_of_the_report_are_escaped(report, path):
    html = path.read_text(encoding="utf-8")
    assert "Ratings of &lt;stories&gt;" in html
    assert Page(html).tags.count("script") == 2 + len(report["documents"])


@pytest.mark.parametrize("wrong, error", [(float("nan"), ValueError), (None, jinja2.UndefinedError)])
def test_a_report_that_cannot_be_written_leaves_the_old_one(report, path, wrong, error):
    before = path.read_bytes()
    if wrong is None:
        del report["headline"]
    else:
        report["documents"][3]["explained"][0]["chunks"][0]["contribution"] = wrong
    with pytest.raises(error):
        write_report(report, path)
    assert path.read_bytes() == before


def test_a_report_without_neighbours_figures_tables_and_documents(report, tmp_path):
    for name in ("baselines", "figures", "tables", "documents", "metrics", "facts"):
        report[name] = []
    write_report(report, tmp_path / "deep" / "report.html")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_numbers_are_readable():
    values = [0.12345, 12000, -0.5, None, float("nan"), "v1", 1234.5]
    assert [readable_number(value) for value in values] == ["0.123", "12,000", "−0.500", "–", "–", "v1", "1,234.500"]
    assert readable_number(0.25, sign=True) == "+0.250"


@pytest.fixture
def page(browser, path):
    """The report in a fresh window, where no test may leave an error in the console."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def ids(page) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('#rows .open')].map(button => button.textContent)")


def counts(page) -> list[int]:
    """The numbers above the list: documents that are left, documents in all, and, where they are fewer, those listed."""
    return [int(number) for number in re.findall(r"\d+", page.find_element(By.ID, "count").text)]


RESULTS = ["all", "missed", "too mild", "too strict", "right"]


def choose(page, name: str, value: str) -> None:
    select = Select(page.find_element(By.NAME, name))
    if name == "result":
        select.select_by_index(RESULTS.index(value))
    else:
        select.select_by_visible_text(value)


def open_document(page, number: int):
    """Open the document of that id, with the keyboard, and give back what appears."""
    button = next(b for b in page.find_elements(By.CSS_SELECTOR, "#rows .open") if b.text == f"story-{number}")
    assert button.get_attribute("aria-expanded") == "false"
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    detail = page.find_element(By.ID, button.get_attribute("aria-controls"))
    assert detail.is_displayed()
    return detail


def marked(detail) -> dict[int, str]:
    """The evidence as the page marks it, by its number: a sentence that crosses a chunk's edge lies in two marks."""
    found: dict[int, str] = {}
    for mark in detail.find_elements(By.TAG_NAME, "mark"):
        for number in mark.get_attribute("data-evidence").split():
            found[int(number)] = found.get(int(number), "") + mark.get_property("textContent")
    return found


class TestInABrowser:
    pytestmark = in_browser

    def test_opens_and_lists_the_documents(self, page, report):
        assert page.title == "Ratings of <stories>"
        assert "Macro-F1 0.800" in page.find_element(By.CLASS_NAME, "warning").text
        assert counts(page) == [10, 10]
        assert ids(page) == [row["id"] for row in report["documents"]]

    def test_marks_a_decision_by_bias(self, page, report):
        assert report["documents_note"] in page.find_element(By.ID, "documents").text
        tagged = [row.text for row in page.find_elements(By.CSS_SELECTOR, "#rows tr") if "by bias" in row.text]
        assert len(tagged) == 1
        assert "story-3" in tagged[0]
        assert "Teen has a higher score" in open_document(page, 3).text
        assert "higher score" not in open_document(page, 4).text

    def test_filters_count_what_they_leave(self, page):
        choose(page, "label", "Mature")
        assert counts(page) == [4, 10]
        choose(page, "result", "too mild")
        assert ids(page) == ["story-8"]
        page.find_element(By.CSS_SELECTOR, "#clear").click()
        assert counts(page) == [10, 10]
        choose(page, "result", "missed")
        assert ids(page) == ["story-6", "story-8"]
        choose(page, "predicted", "Mature")
        assert ids(page) == ["story-6"]
        page.find_element(By.CSS_SELECTOR, "#clear").click()
        choose(page, "review", "yes")
        assert ids(page) == ["story-0", "story-5", "story-10"]
        page.find_element(By.NAME, "lowest").send_keys("70")
        assert ids(page) == ["story-5", "story-10"]
        page.find_element(By.NAME, "highest").send_keys("70")
        assert ids(page) == ["story-5"]
        page.find_element(By.NAME, "search").send_keys("ORY-1")
        assert counts(page) == [0, 10]

    def test_a_column_sorts_both_ways(self, page):
        def press(key: str) -> str:
            head = page.find_element(By.CSS_SELECTOR, f"#documents-table [data-key={key}]")
            head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
            return head.get_attribute("aria-sort")

        assert press("confidence") == "ascending"
        assert (ids(page)[0], ids(page)[-1]) == ("story-0", "story-10")
        assert press("confidence") == "descending"
        assert (ids(page)[0], ids(page)[-1]) == ("story-10", "story-0")
        assert press("result") == "ascending"
        assert (ids(page)[0], ids(page)[-1]) == ("story-8", "story-6")  # too mild first, too strict last
        assert len(page.find_elements(By.CSS_SELECTOR, "#documents-table [aria-sort=none]")) == 7
        press("id")
        assert ids(page)[-1] == "story-10"  # after story-8: numbers in names count as numbers

    @pytest.mark.parametrize("number, place", [(3, 3), (7, 7), (8, 8), (10, 9)])
    def test_evidence_is_marked_where_it_stands(self, page, report, number, place):
        expected = report["documents"][place]
        detail = open_document(page, number)
        text = expected["text"]
        assert marked(detail) == {
            rank + 1: text[part["start"] : part["end"]]
            for rank, part in enumerate(expected["explained"][0]["evidence"])
        }
        pieces = detail.find_elements(By.CSS_SELECTOR, ".piece .text")
        assert "".join(piece.get_property("textContent") for piece in pieces) == text
        assert detail.find_element(By.CSS_SELECTOR, ".metadata dd").text == "http://a?b=<script>"
        assert all(tag.text.endswith(", title") for tag in detail.find_elements(By.CSS_SELECTOR, ".evidence .tag"))
        assert (
            len(pieces)
            == len(expected["explained"][0]["chunks"])
            == len(detail.find_elements(By.CSS_SELECTOR, ".strip button"))
        )

    def test_a_hostile_text_stays_text(self, page):
        detail = open_document(page, 6)
        pieces = detail.find_elements(By.CSS_SELECTOR, ".piece .text")
        assert "".join(piece.get_property("textContent") for piece in pieces) == HOSTILE
        assert page.execute_script("return window.hacked") is None
        assert not detail.find_elements(By.CSS_SELECTOR, "script, b")
        assert len(page.find_elements(By.CSS_SELECTOR, "#rows > tr")) == 11

    def test_a_chunk_of_the_strip_leads_to_its_text(self, page):
        detail = open_document(page, 8)
        folded = detail.find_elements(By.CSS_SELECTOR, "details.fold")
        assert folded
        last = detail.find_elements(By.CSS_SELECTOR, ".strip button")[-1]
        piece = detail.find_elements(By.CLASS_NAME, "piece")[-1]
        assert not piece.is_displayed()
        last.send_keys(Keys.ENTER)
        assert piece.is_displayed()
        assert page.switch_to.active_element == piece
        whole = detail.find_element(By.CLASS_NAME, "whole")
        whole.click()
        assert all(part.get_property("open") for part in folded)
        whole.click()
        assert not any(part.get_property("open") for part in folded)

    def test_an_opened_document_stays_open_when_the_list_changes_and_closes_when_asked(self, page):
        detail = open_document(page, 6)
        choose(page, "result", "missed")
        assert detail.is_displayed()
        detail.find_element(By.XPATH, "preceding-sibling::tr[1]//button").send_keys(Keys.SPACE)
        assert not detail.is_displayed()

    def test_chunks_show_contribution_and_attention_and_what_was_not_read(self, page, report):
        detail = open_document(page, 7)
        strip = detail.find_elements(By.CSS_SELECTOR, ".strip button")
        names = [button.get_attribute("aria-label") for button in strip]
        assert re.search(r"\b1\b.*\+0\.2\b.*\b10\.0", names[0])
        assert re.search(r"\b4\b.*−0\.1\b.*\b10\.0", names[3])
        assert re.findall(r"[\d.]+", names[5]) == ["6"]  # has not been read: no figures
        assert "5 of 6" in detail.text
        colours = [button.value_of_css_property("background-color") for button in strip]
        assert colours[0] == colours[4]
        assert len(set(colours[:4])) == 4
        assert "gradient" in strip[5].value_of_css_property("background-image")
        assert "unread" in detail.find_elements(By.CLASS_NAME, "piece")[5].get_attribute("class")
        bars = [bar.size["width"] for bar in detail.find_elements(By.CSS_SELECTOR, ".strip .attention i")]
        assert bars[0] > 0
        assert bars[5] == 0

    def test_bars_are_as_long_as_their_shares(self, page):
        bars = page.find_elements(By.CSS_SELECTOR, "#rows .meter")
        shares = [bar.find_element(By.TAG_NAME, "i").size["width"] / bar.size["width"] for bar in bars]
        assert shares[0] == pytest.approx(0.5, abs=0.02)
        assert shares[-1] == pytest.approx(0.9, abs=0.02)
        interval_bar = page.find_element(By.CSS_SELECTOR, ".cards .interval")
        drawn = interval_bar.find_element(By.TAG_NAME, "i")
        start = (drawn.rect["x"] - interval_bar.rect["x"]) / interval_bar.size["width"]
        assert start == pytest.approx(0.75, abs=0.02)
        assert drawn.size["width"] / interval_bar.size["width"] == pytest.approx(0.1, abs=0.02)

    def test_a_narrow_window_scrolls_only_downwards(self, page):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        )
        detail = open_document(page, 8)
        widths = page.execute_script("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
        assert widths[1] <= 390
        assert widths[0] <= widths[1] + 1
        assert detail.find_element(By.CLASS_NAME, "detail-body").size["width"] <= 390

    def test_a_long_list_comes_in_slices(self, report, page, tmp_path):
        few = [copy.deepcopy(report["documents"][0]) | {"id": f"copy-{i}"} for i in range(250)]
        write_report(report | {"documents": few}, tmp_path / "long.html")
        page.get((tmp_path / "long.html").as_uri())
        assert counts(page) == [250, 250, 100]
        assert len(ids(page)) == 100
        more = page.find_element(By.ID, "more")
        more.send_keys(Keys.ENTER)
        more.send_keys(Keys.ENTER)
        assert len(ids(page)) == 250
        assert not more.is_displayed()
