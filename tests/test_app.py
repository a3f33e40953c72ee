"""The page of scripts.app: what a visitor sees in a browser, its endpoint, what it refuses, and what it leaves behind."""

import contextlib
import html
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from data.document_files import Section
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from scripts.app import check_text, counting_chunks, read_upload, render_result
from scripts.app import main as app_main
from scripts.common.loading import load_classifier
from scripts.hub.space import write_space
from tests.conftest import LABELS, assert_refused, options, run_command, tiny_rows
from tests.processes import ROOT, start

gradio_client = pytest.importorskip(
    "gradio_client", reason="gradio, which comes with the extra `app`, is not installed"
)
LIMITS = {"max_upload_mb": 1, "max_characters": 400_000}
# More clients for more seconds: APP_CLIENTS=32 APP_SECONDS=120.
CLIENTS, SECONDS = int(os.environ.get("APP_CLIENTS", "8")), float(os.environ.get("APP_SECONDS", "0"))
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> ${1+1} {{value}} &lt;b&gt; "
SECRET = "xylophone-7351"  # a word that is in the texts, and must not be on the disk afterwards
in_browser = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not shutil.which("chromium") or not shutil.which("chromedriver"),
        reason="chromium and chromium-driver are not installed",
    ),
]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(command: list, folder: Path, port: int, **environment: str) -> Iterator[str]:
    """The address of a page while its command runs in a folder, whose temporary files are in it, too."""
    (folder / "tmp").mkdir(parents=True)
    own = {"TMPDIR": str(folder / "tmp"), "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = start(
            command, cwd=folder, env={**os.environ, **own, **environment}, stdout=log, stderr=log, cold=True
        )
        try:
            deadline = time.monotonic() + 120
            while "Running on" not in (said := (folder / "log").read_text(encoding="utf-8")):
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


@contextlib.contextmanager
def served_space(folder: Path, model: Path) -> Iterator[str]:
    """The address of a Space in folder/space. It is isolated: neither the project's folder nor its editable installation can
    be imported."""
    code = (
        "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        f"sys.path[:] = [p for p in sys.path if p not in ({str(ROOT)!r}, '')]; sys.path.insert(0, '.')\n"
        "import importlib.util; assert not importlib.util.find_spec('modeling') and not importlib.util.find_spec('scripts')\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    shutil.copytree(folder / "space", folder / "cwd")
    environment = {"MODEL_ID": str(model), "HF_HOME": str(folder / "home"), "GRADIO_SERVER_NAME": "127.0.0.1"}
    with served([sys.executable, "-c", code], folder / "cwd", free_port(), **environment) as address:
        yield address


@pytest.fixture(scope="module")
def long_run(finished_run, tmp_path_factory) -> Path:
    """The shared run, which here reads up to 200 chunks, and whose scores are calibrated."""
    folder = tmp_path_factory.mktemp("model") / "run"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_chunks": 200, "temperature": 1.5}))
    return folder


@pytest.fixture(scope="module")
def classifier(long_run) -> HierarchicalClassificationPipeline:
    model, tokenizer = load_classifier(str(long_run))
    return HierarchicalClassificationPipeline(
        model=model, tokenizer=tokenizer, device="cpu", task="text-classification"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("app") / "cwd"


@pytest.fixture(scope="module")
def page(long_run, place) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "scripts.app", *options(model=long_run, port=port, cpu_threads=1, **LIMITS)]
    with served(command, place, port, PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}") as address:
        yield address
    assert not list((place / "tmp").iterdir())


@pytest.fixture(scope="module")
def client(page):
    return gradio_client.Client(page, verbose=False)


def expected(classifier, text: str) -> dict:
    [result] = classifier(text)
    return {name: result[name] for name in ("label", "scores", "num_chunks", "truncated", "evidence")}


def assert_same(found: dict, wanted: dict) -> None:
    assert found["scores"] == pytest.approx(wanted["scores"], abs=1e-5)
    for spans, wanted_spans in zip(found["evidence"], wanted["evidence"], strict=True):
        assert spans["score"] == pytest.approx(wanted_spans["score"], abs=1e-4)
        assert {**spans, "score": 0} == {**wanted_spans, "score": 0}
    assert {**found, "scores": 0, "evidence": 0} == {**wanted, "scores": 0, "evidence": 0}


# ---- The endpoint ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_endpoint_returns_what_the_pipeline_returns(client, classifier):
    for row in tiny_rows()[:3]:
        assert_same(client.predict(row["text"], api_name="/classify"), expected(classifier, row["text"]))
    [name] = client.view_api(return_format="dict")["named_endpoints"]
    assert name == "/classify"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "There is no text"),
        (" \n\t\u2003", "There is no text"),
        ("\0\1\2" * 50, "150 of its 150 characters are control characters"),
        ("A boat. " * 1_250_000, r"has 10,000,000 characters, and this page takes up to 400,000"),
        ("a \ud800 b", "surrogate"),
    ],
)
def test_what_is_no_text_is_refused_in_a_sentence(client, text, sentence):
    with pytest.raises(Exception, match=sentence):
        client.predict(text, api_name="/classify")


@pytest.mark.slow
def test_many_clients_at_once_get_the_answers_of_the_pipeline(page, classifier):
    """More and longer with APP_CLIENTS and APP_SECONDS, see above."""
    rows = [row["text"] for row in tiny_rows()]
    wanted = {text: expected(classifier, text) for text in rows}
    answers, failures, end = [], [], time.monotonic() + SECONDS

    def visit(number: int) -> None:
        try:
            client = gradio_client.Client(page, verbose=False)
            turn = number
            while turn < number + 3 * CLIENTS or time.monotonic() < end:
                text = rows[turn % len(rows)]
                answers.append((text, client.predict(text, api_name="/classify")))
                turn += CLIENTS
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=visit, args=[number]) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(answers) >= 3 * CLIENTS
    for text, answer in answers:
        assert_same(answer, wanted[text])


# ---- In a browser ----------------------------------------------------------------------------------------------------------


def opened(browser, page: str) -> None:
    browser.get(page)
    WebDriverWait(browser, 60).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))


def paste(browser, text: str) -> None:
    box = browser.find_element(By.CSS_SELECTOR, "textarea")
    browser.execute_script(
        "Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call(arguments[0], arguments[1]);"
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
        box,
        text,
    )
    [button] = [each for each in browser.find_elements(By.TAG_NAME, "button") if each.text == "Classify"]
    button.click()


def result_with(browser, words: str) -> str:
    """The text of the result, once it has these words."""

    def found(driver) -> str | None:
        said = [each.text for each in driver.find_elements(By.CSS_SELECTOR, "[aria-label=Result]")]
        return said[0] if said and words in said[0] else None

    return WebDriverWait(browser, 60).until(found)


def whole_text(browser) -> str:
    parts = browser.execute_script("return [...document.querySelectorAll('.box .text')].map(part => part.textContent)")
    return "".join("".join(parts).split())


def error_in(browser) -> str:
    return WebDriverWait(browser, 60).until(
        lambda driver: " ".join(each.text for each in driver.find_elements(By.CSS_SELECTOR, ".toast-body"))
    )


class TestInABrowser:
    pytestmark = in_browser

    def test_a_pasted_text_is_classified_and_every_chunk_can_be_reached(self, browser, page, classifier):
        text = " ".join(row["text"] for row in tiny_rows()[:6])
        [result] = classifier(text, chunks=True)
        opened(browser, page)
        paste(browser, text)
        said = result_with(browser, f"{len(text):,} characters, {result['num_chunks']} chunks")
        assert said.startswith(result["label"])
        for label, score in result["scores"].items():
            assert re.search(rf"{label}\s+{100 * score:.1f} %", said), (label, score, said)
        assert whole_text(browser) == "".join(text.split())
        links = browser.find_elements(By.CSS_SELECTOR, ".strip a")
        assert [link.get_attribute("class") for link in links] == [
            "supports" if chunk["score"] > 0 else "opposes" for chunk in result["chunks"]
        ]
        strongest = max(result["chunks"], key=lambda chunk: abs(chunk["score"]))
        marked = links[result["chunks"].index(strongest)]
        assert "--strength: 100%" in marked.get_attribute("style")
        assert f"{strongest['score']:+.2f}" in marked.get_attribute("aria-label")
        links[-1].send_keys(Keys.ENTER)  # by keyboard
        gap = "let box = document.querySelector('.box').getBoundingClientRect(), at = document.querySelector(':target')"
        inside = f"{gap}.getBoundingClientRect(); return at.bottom <= box.bottom + 1 && at.bottom > box.top"
        WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(inside))
        marks = browser.execute_script("return [...document.querySelectorAll('mark')].map(mark => mark.textContent)")
        assert sorted(marks) == sorted(found["text"] for found in result["evidence"])
        assert "evidence 1" in browser.find_element(By.CSS_SELECTOR, ".box").text
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    def test_html_in_a_text_stays_text(self, browser, page):
        opened(browser, page)
        text = HOSTILE + tiny_rows()[0]["text"] + HOSTILE
        paste(browser, text)
        result_with(browser, f"{len(text):,} characters")
        assert whole_text(browser) == "".join(text.split())
        assert browser.execute_script("return window.hacked") is None
        assert browser.find_elements(By.CSS_SELECTOR, ".box img, .box script, .box b") == []

    def test_an_uploaded_file_is_read_and_deleted(self, browser, page, place, tmp_path):
        opened(browser, page)
        file = tmp_path / "a <b>story.html"
        file.write_text(f"<p>{SECRET} was read.<p>{tiny_rows()[0]['text']}", encoding="utf-8")
        browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(file))
        result_with(browser, "story.html")
        assert f"{SECRET}wasread." in whole_text(browser)
        assert list((place / "tmp").rglob("*story.html")) == []
        # The next one can be dropped at once.
        WebDriverWait(browser, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "input[type=file]"))

    @pytest.mark.parametrize(
        "name, content, sentence",
        [
            ("broken.pdf", b"%PDF-1.7 and no more", "broken.pdf: damaged, or not PDF"),
            ("old.txt", "Caf\xe9 au lait".encode("cp1252"), "old.txt: line 1 is not UTF-8"),
            ("large.txt", b"A boat. " * 200_000, "exceed the maximum allowed size of 1.0 Mb"),
        ],
    )
    def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(
        self, browser, page, tmp_path, name, content, sentence
    ):
        opened(browser, page)
        (tmp_path / name).write_bytes(content)
        browser.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / name))
        said = error_in(browser)
        assert sentence in said
        assert "/tmp" not in said
        assert "--" not in said

    def test_nothing_is_refused_in_a_sentence(self, browser, page):
        opened(browser, page)
        paste(browser, "  ")
        assert "There is no text: paste one, or drop a file." in error_in(browser)

    def test_an_example_is_classified_with_one_click(self, browser, page):
        opened(browser, page)
        example = [each for each in browser.find_elements(By.TAG_NAME, "button") if "rated Teen" in each.text]
        example[0].click()
        assert result_with(browser, "characters").split()[0] in LABELS

    def test_a_hundred_pages_stay_responsive_and_fit_a_phone(self, browser, page):
        opened(browser, page)
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        text = ("The boat came in late. Nobody spoke of it.\n" * 7_000)[:300_000]
        paste(browser, text)
        result_with(browser, "300,000 characters")
        begun = time.monotonic()
        assert len(browser.find_elements(By.CSS_SELECTOR, ".strip a")) == 200
        assert whole_text(browser) == "".join(text.split())
        browser.find_elements(By.CSS_SELECTOR, ".strip a")[100].click()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        assert time.monotonic() - begun < 5
        assert "longer than the 200 chunks" in result_with(browser, "A person should check this.")
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def test_the_page_asks_no_other_machine(self, browser, page):
        opened(browser, page)
        names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in names if not name.startswith((page, "data:"))] == []


@pytest.mark.slow
def test_texts_are_not_kept(client, page, place):
    """Neither in files nor in the log. The uploads of the tests above had the word too."""
    client.predict(f"{SECRET} was pasted.", api_name="/classify")
    with pytest.raises(Exception, match="control characters"):
        client.predict(f"{SECRET}\0\0\0", api_name="/classify")
    kept = [path for path in place.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert kept == []
    assert {path.name for path in place.iterdir()} == {"tmp", "log"}
    assert json.loads(urllib.request.urlopen(f"{page}/config").read())["run_history"] is False


# ---- Its parts ---------------------------------------------------------------------------------------------------------------


def test_progress_counts_every_chunk(classifier):
    text = " ".join(row["text"] for row in tiny_rows())
    seen = []
    with counting_chunks(classifier.model, seen.append):
        [result] = classifier(text)
    assert {total for _, total in seen} == {result["num_encoded_chunks"]}
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    before = len(seen)
    classifier(text)
    assert len(seen) == before  # no hook is left


def rendered(result: dict, text: str, config, sections=(), review_below: float = 0.7) -> str:
    return render_result(result, text, list(sections), "name", config, review_below)


def test_advice_says_why_a_person_should_check(classifier):
    text, config = tiny_rows()[0]["text"], classifier.model.config
    [result] = classifier(text, chunks=True)
    sure = result | {"label": "Teen", "scores": {"General": 0.1, "Teen": 0.8, "Mature": 0.1}}
    assert "no check by a person is advised" in rendered(sure, text, config)
    unsure = rendered(sure, text, config, review_below=0.9)
    assert (
        "below 90 %; the scores are calibrated, so about 20 of 100 texts with such a score have another label" in unsure
    )
    biased = rendered(sure | {"label": "Mature"}, text, config)
    assert "Teen is more probable: class biases of the model decide for Mature." in biased
    assert "longer than the" in rendered(sure | {"truncated": True}, text, config)
    config.temperature, temperature = None, config.temperature
    try:
        assert "the scores are not calibrated" in rendered(sure, text, config, review_below=0.9)
    finally:
        config.temperature = temperature


def test_what_was_not_encoded_and_overlaps_are_shown_once(classifier):
    text = "One two. <b>&</b>xx. <u>Five</u> six. Seven."
    chunks = [{"start": 0, "end": 20, "score": 1.0}, {"start": 9, "end": 21, "score": -0.5}]
    evidence = [{"start": 0, "end": 20, "score": 1.0, "text": text[:20]}]
    result = {"label": "<i>", "scores": {"<i>": 1.0}, "num_chunks": 4, "truncated": True}
    page = rendered(result | {"chunks": chunks, "evidence": evidence}, text, classifier.model.config)
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Chunk 1 · +1.0 · evidence 1", "Chunk 2 · −0.5", "Not encoded"]
    shown = "".join(re.findall(r'<div class="text" dir="auto">(.*?)</div>', page))
    assert html.unescape(re.sub("</?mark>", "", shown)) == text
    assert not re.search("<[bu]>", page)
    assert "<i>" not in page.replace("<i style", "")


def test_pages_of_a_file_are_named(classifier):
    text = " ".join(row["text"] for row in tiny_rows()[:4])
    page = rendered(
        classifier(text, chunks=True)[0], text, classifier.model.config, [Section(0, "page 1"), Section(200, "page 2")]
    )
    assert re.search(r"Chunk 1 · \S+ (· evidence \d )?· page 1<", page)
    assert "page 2" in page


def test_reading_an_upload_deletes_it_whatever_is_in_it(tmp_path):
    for name, content, sentence in (
        ("story.txt", b"A story.", None),
        ("scan.docx", b"\xd0\xcf\x11\xe0", r"^scan\.docx: encrypted"),
        ("old.txt", "Caf\xe9".encode("cp1252"), r"^old\.txt: line 1 .*\. Save it as UTF-8\.$"),
        ("zeros.txt", b"a\0b\0", r"^zeros\.txt: not a text file \(a NUL at byte 2\)\. Save it as UTF-8\.$"),
        ("odd.xyz", b"What?", r"^odd\.xyz: expected one of the suffixes"),
    ):
        (tmp_path / "upload").mkdir()
        path = tmp_path / "upload" / name
        path.write_bytes(content)
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                read_upload(path, 1000)
        else:
            assert read_upload(path, 1000) == ("A story.", [])
        assert not path.parent.exists()
    with pytest.raises(ValueError, match="upload it again"):
        read_upload(path, 1000)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    import zipfile

    path = tmp_path / "bomb.epub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("chapter.html", b"0" * 200_000)
    with pytest.raises(ValueError, match=r"bomb\.epub: too large when it is unpacked"):
        read_upload(path, 10_000)


def test_a_few_control_characters_are_no_reason_to_refuse():
    text = "A text of a hundred characters, from a PDF with a soft hyphen that became a control\x02 character in it."
    assert check_text(text, 1000) == text


# ---- The command and the Space -------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_a_sentence(call_command, monkeypatch):
    for given, words in (
        ({"max_upload_mb": 0}, "--max_upload_mb must be 1 or more, got 0"),
        ({"max_characters": -1}, "--max_characters must be 1 or more"),
        ({"review_below": 1.5}, "--review_below must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call_command(app_main, model="outputs/none", **given)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gradio, which comes with the extra `app`: pip install -e '\.\[app\]'"):
        call_command(app_main, model="outputs/none")


def test_a_model_that_is_not_there_is_told_in_a_sentence(tmp_path):
    assert_refused(run_command("scripts.app", model=tmp_path / "none", port=free_port()), "none")


@pytest.mark.slow
def test_the_space_runs_without_this_project(long_run, classifier, tmp_path):
    write_space(tmp_path / "space", "org/model")
    names = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*.*")}
    modules = {f"data/{name}.py" for name in "__init__ demo_corpus document_files pdf_text text_files".split()}
    assert names == {"app.py", "README.md", "requirements.txt", *modules}
    assert "MODEL = 'org/model'" in (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    card = (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    assert re.search(
        r"^---\n.*^sdk: gradio\nsdk_version: \d.*^app_file: app\.py\n.*^---\n", card, re.MULTILINE | re.DOTALL
    )
    with served_space(tmp_path, long_run) as address:
        text = tiny_rows()[0]["text"]
        client = gradio_client.Client(address, verbose=False)
        assert_same(client.predict(text, api_name="/classify"), expected(classifier, text))
