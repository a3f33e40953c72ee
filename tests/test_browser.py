"""TensorBoard in a real browser: scalars and the confusion matrix are there to see."""

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.conftest import options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not shutil.which("chromium") or not shutil.which("chromedriver"),
        reason="chromium and chromium-driver are not installed",
    ),
]


@pytest.fixture
def tensorboard(finished_run, tmp_path):
    """The address of a TensorBoard that shows a run."""
    log = open(tmp_path / "tensorboard.log", "w+")  # noqa: SIM115 (closed below, when the server has ended)
    given = options(logdir=finished_run / "runs", host="127.0.0.1", port=0)
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *given], stdout=log, stderr=log)
    address = None
    deadline = time.monotonic() + 60
    while address is None and time.monotonic() < deadline:
        said = Path(log.name).read_text()
        address = next((word for word in said.split() if word.startswith("http://127.0.0.1:")), None)
        time.sleep(0.2)
    assert address, said
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert answer.status == 200
    yield address
    server.terminate()
    server.wait(20)
    log.close()


def page_text(browser) -> str:
    """All the text of a page, also in shadow trees, which TensorBoard's older parts are made of."""
    collect = """
        const walk = node => (node.shadowRoot ? walk(node.shadowRoot) : '') + [...node.childNodes].map(child =>
            child.nodeType === 3 ? child.textContent + ' ' : child.tagName === 'STYLE' ? '' : walk(child)).join('');
        return walk(document.body);
    """
    return " ".join(browser.execute_script(collect).split())


def images(browser) -> list[str]:
    collect = """
        const found = [];
        const walk = node => { if (node.tagName === 'IMG' && node.naturalWidth > 100) found.push(node.src);
            if (node.shadowRoot) walk(node.shadowRoot); node.childNodes.forEach(walk); };
        walk(document.body); return found;
    """
    return browser.execute_script(collect)


def test_scalars_and_the_confusion_matrix_are_there_to_see(browser, tensorboard):
    browser.get(f"{tensorboard}#timeseries")
    WebDriverWait(browser, 60).until(lambda driver: "eval" in page_text(driver) and "train" in page_text(driver))
    browser.get(f"{tensorboard}#images")
    browser.refresh()
    WebDriverWait(browser, 60).until(lambda driver: "confusion_matrix" in page_text(driver))
    WebDriverWait(browser, 60).until(lambda driver: images(driver))
    assert browser.find_element(By.TAG_NAME, "body").is_displayed()
