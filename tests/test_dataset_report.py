"""The dataset report: what is in the page, and when it warns."""

import json
import shutil
import tempfile
from collections import defaultdict
from html.parser import HTMLParser

import datasets
import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.dataset_checks import length_effects
from data.dataset_report import DuplicatePair, write_dataset_report
from data.documents import similar_label_groups
from data.prepared_dataset import REPORT, load_prepared, save_prepared
from data.text_excerpts import differences, visible
from data.tokenization import load_tokenizer, tokenize_documents, tokenizer_fingerprint
from tests.conftest import SENTENCES

RUSSIAN = "Лодка пришла поздно, и никто об этом не говорил."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece that knows the words of `SENTENCES` and their letters, and nothing else."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 50, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def clean_rows(num_train: int = 12) -> dict[str, list[tuple[str, str, str]]]:
    """Splits of (id, text, label) that no check objects to."""
    return {
        split: [
            (f"{split}-{label}-{i}", " ".join(SENTENCES[: 1 + i % 4]), label)
            for label in ("General", "Teen")
            for i in range(count)
        ]
        for split, count in (("train", num_train), ("validation", 4), ("test", 4))
    }


def on_disk(part) -> datasets.Dataset:
    documents = datasets.Dataset.from_dict(dict(zip(("id", "text", "label"), zip(*part, strict=True), strict=True)))
    folder = tempfile.mkdtemp()
    documents.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def make_splits(rows, tokenizer) -> datasets.DatasetDict:
    labels = list(dict.fromkeys(label for part in rows.values() for _, _, label in part))
    return datasets.DatasetDict(
        {
            split: tokenize_documents(
                on_disk(part),
                tokenizer,
                labels,
                1,
                split,
            )
            for split, part in rows.items()
        }
    )


def make_manifest(issues=None, max_chunks: int = 4) -> dict:
    return {
        "sources": [{"name": "stories.csv"}],
        "tokenizer": {"name": "outputs/minilm"},
        "seed": 42,
        "findings": issues or {},
        "geometry_of_coverage": {"chunk_length": 10, "chunk_overlap": 0, "max_chunks": max_chunks},
        "versions": {"datasets": "5.0.0"},
    }


class Page(HTMLParser):
    """Tags, text and table rows by section, warnings, and what is marked as different."""

    def __init__(self, html: str):
        super().__init__()
        self.size = len(html.encode())
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.policy = ""
        self.texts: dict[str, str] = defaultdict(str)
        self.tables: dict[str, list[list[str]]] = defaultdict(list)
        self.warnings: list[str] = []
        self.marks: list[str] = []
        self.section, self.target = "head", None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href", "action", "data") if name in attributes]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        if tag == "section":
            self.section = attributes.get("id", "")
        elif tag == "tr":
            self.tables[self.section].append([])
        elif tag in ("td", "th"):
            self.tables[self.section][-1].append("")
            self.target = self.tables[self.section][-1]
        elif tag == "mark":
            self.marks.append("")
            self.target = self.marks
        elif tag == "li" and self.section == "head" and "nav" not in self.tags:
            self.warnings.append("")
            self.target = self.warnings

    def handle_endtag(self, tag):
        if tag in ("td", "th", "mark", "li"):
            self.target = None

    def handle_data(self, data):
        self.texts[self.section] += data
        if self.target is not None:
            self.target[-1] += data

    def row(self, section: str, *first: str) -> list[str]:
        """The row of a section's table that begins with these cells."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.tables[section]]
        return next(row for row in rows if row[: len(first)] == list(first))


@pytest.fixture
def make_page(tmp_path, tokenizer):
    def make(rows, issues=None, duplicates=(), tokenizer=tokenizer, max_chunks=4, **kwargs) -> Page:
        splits = rows if isinstance(rows, datasets.DatasetDict) else make_splits(rows, tokenizer)
        manifest = make_manifest(issues, max_chunks)
        write_dataset_report(tmp_path / REPORT, splits, manifest, tokenizer, duplicates, **kwargs)
        return Page((tmp_path / REPORT).read_text(encoding="utf-8"))

    return make


def pair(first_text: str, second_text: str, kind: str = "duplicate", **fields) -> DuplicatePair:
    ids = {"first": "train-General-0", "second": "test-General-0", "first_split": "train", "second_split": "test"}
    return DuplicatePair(**(ids | fields), first_text=first_text, second_text=second_text, kind=kind)


def test_nothing_needs_attention_in_a_clean_dataset(make_page):
    page = make_page(clean_rows())
    assert page.warnings == []
    assert "Nothing needs attention" in page.texts["head"]


def few_documents(rows):
    rows["train"] += [(f"m{i}", SENTENCES[0], "Mature") for i in range(3)]
    for split in ("validation", "test"):
        rows[split].append((f"m-{split}", SENTENCES[0], "Mature"))


def none_in_validation(rows):
    rows["validation"] = [row for row in rows["validation"] if row[2] != "Teen"]


def only_in_train(rows):
    rows["train"] += [(f"m{id_}", text, "Mature") for id_, text, label in rows["train"] if label == "Teen"]


def other_length(rows):
    rows["train"] = [(id_, text * 3 if label == "Teen" else text, label) for id_, text, label in rows["train"]]


def labels_that_look_alike(rows):
    for part in rows.values():
        part += [(f"{id_}-", text, "teen\u200b") for id_, text, label in part if label == "Teen"]


def unknown_tokens(rows):
    rows["test"] = [(id_, f"{text} {RUSSIAN}" if label == "Teen" else text, label) for id_, text, label in rows["test"]]


def encoded_data(rows):
    rows["train"] = [
        (id_, " ".join("boat" * 30) if label == "Teen" else text, label) for id_, text, label in rows["train"]
    ]


@pytest.mark.parametrize(
    "change, expected",
    [
        (few_documents, ["Fewer than 10 training documents: Mature (3)"]),
        (none_in_validation, ["No validation documents: Teen"]),
        (only_in_train, ["Only in train, so that no score can be measured: Mature"]),
        (other_length, ["Length alone"]),
        (labels_that_look_alike, ["Labels that look alike: Teen = teen⟨U+200B⟩"]),
        (unknown_tokens, ["unknown to the tokenizer (Teen"]),
        (encoded_data, ["bytes of text per token (Teen", "Length alone"]),
    ],
)
def test_warnings_appear_where_they_should_and_no_others(make_page, change, expected):
    rows = clean_rows()
    change(rows)
    page = make_page(rows, max_chunks=20)
    assert len(page.warnings) == len(expected)
    for warning, words in zip(page.warnings, expected, strict=True):
        assert words in warning


def test_a_large_cut_is_a_warning_and_counted_by_split_and_label(make_page):
    rows = clean_rows()
    tokens = " ".join(["boat"] * 200)  # 25 chunks of 8
    rows["test"] = [("long", tokens, "General"), ("short", "boat", "General"), *rows["test"][4:]]
    page = make_page(rows, max_chunks=3)
    assert page.row("coverage", "General")[1:] == ["1 5.6 %", "176 40.6 %", "18", "433", "25"]
    assert page.row("coverage", "Teen")[1:3] == ["0 0 %", "0 0 %"]
    assert page.row("coverage", "test")[1].startswith("1 ")
    assert page.row("coverage", "train")[1:3] == ["0 0 %", "0 0 %"]
    assert ["max_chunks" in warning for warning in page.warnings] == [True]
    assert make_page(rows, max_chunks=25).warnings == []


def test_documents_are_counted_by_label_and_split(make_page):
    rows = clean_rows()
    rows["train"] += [(f"extra-{i}", SENTENCES[0], "Teen") for i in range(8)]
    page = make_page(rows)
    assert page.row("labels", "General") == ["General", "12 37.5 %", "4 50.0 %", "4 50.0 %"]
    assert page.row("labels", "Teen") == ["Teen", "20 62.5 %", "4 50.0 %", "4 50.0 %"]
    assert page.row("labels", "All labels") == ["All labels", "32", "8", "8"]


def test_lengths_are_quantiles_by_label_and_split(make_page):
    rows = {"train": [(f"d{i}", "boat " * i, "General") for i in range(1, 102)], "validation": [("v", "boat", "Teen")]}
    page = make_page(rows)
    # split, histogram, documents, quantiles
    assert page.row("lengths", "General", "all splits") == [
        "General",
        "all splits",
        "",
        "101",
        *"1 26 51 76 96 101".split(),
    ]
    assert page.row("lengths", "validation") == ["validation", "", "1", *["1"] * 6]
    assert page.tags.count("svg") == 3 + 2 + 2  # no row for a label that a split lacks


def test_issues_name_their_rows(make_page):
    dropped = {"decision": "dropped", "rows": [f"row {i} (id <b>{i}</b>)" for i in range(120)]}
    kept = {"decision": "kept", "rows": ["a (train) ~ b (test)"]}
    page = make_page(clean_rows(), {"empty": dropped, "duplicate": kept})
    assert page.row("issues", "an empty text")[1:3] == ["dropped", "120"]
    assert "row 49 (id <b>49</b>)" in page.texts["issues"]
    assert "row 50 (id" not in page.texts["issues"]
    assert "b" not in page.tags
    assert len(page.warnings) == 1
    assert "Leaks between splits were kept (1)" in page.warnings[0]


def test_duplicates_stand_side_by_side_with_their_differences(make_page):
    texts = ["The boat came in late. <i>Nobody</i> spoke of it.", "The ship came in late. <i>Nobody</i> spoke of it."]
    page = make_page(clean_rows(), duplicates=[pair(*texts)], num_duplicates=700)
    assert [mark.strip() for mark in page.marks] == ["boat", "ship"]
    assert "700 pairs, of which 1 are shown" in page.texts["duplicates"]
    assert "<i>Nobody</i>" in page.texts["duplicates"]
    assert page.warnings == []


def test_duplicates_with_different_labels_are_a_warning(make_page):
    pairs = [
        pair("same", "same", second="test-Teen-0"),
        pair("same", "same", second="gone", second_split=""),
        pair("one", "two", second="test-Teen-0", kind="group_leak"),
    ]
    page = make_page(clean_rows(), duplicates=pairs)
    assert len(page.warnings) == 1
    assert page.warnings[0].startswith("Duplicates with different labels (1 of those shown)")
    assert page.texts["duplicates"].count("different labels") == 1
    assert page.texts["duplicates"].count("Identical texts") == 2
    assert "dropped" in page.texts["duplicates"]
    assert page.marks == []  # nothing differs, or the texts of a group, which need not be alike


def test_differences_far_into_a_text_are_found():
    words = " ".join(map(str, range(100_000)))
    first, second = differences(words.replace("50000 ", "50000 boat "), words)
    assert [text.strip() for text, differs in first if differs] == ["boat"]
    assert not any(differs for _, differs in second)
    assert sum(len(text) for text, _ in first) < 600


def test_differences_in_scripts_without_spaces_are_single_characters():
    first, second = differences("最后一条船进港的时候", "最后一条车进港的时候")
    assert [text for text, differs in first if differs] == ["船"]
    assert [text for text, differs in second if differs] == ["车"]


def test_similar_labels_are_grouped():
    assert similar_label_groups(["Teen", "Mature", "ＴＥＥＮ", "tee n", "te\u00aden"]) == [
        ["Teen", "ＴＥＥＮ", "tee n", "te\u00aden"]
    ]
    assert similar_label_groups(["1", "2", "01", "2.0", "-1", "1.5"]) == [["1", "01"], ["2", "2.0"]]
    assert similar_label_groups(["Teen", "Teens", "1" * 400, "2" * 400]) == []


def test_unknown_characters_are_named(make_page):
    rows = clean_rows()
    rows["test"] = [(id_, f"{text} 🦊 boat🦊s {'boat' * 40}", label) for id_, text, label in rows["test"]]
    page = make_page(rows)
    assert [page.row("vocabulary", label)[2] for label in ("All labels", "General", "Teen")] == ["24", "12", "12"]
    assert page.row("vocabulary", "🦊") == ["🦊", "U+1F98A fox face", "16"]
    assert (
        page.row("vocabulary", "boat" * 5 + "…oat" + "boat" * 4)[2] == "8"
    )  # too long a word, of characters that are known


def test_unknown_tokens_are_counted_for_their_own_document(make_page):
    rows = clean_rows()
    rows["test"] = [(id_, f"🦊 {text}" if label == "Teen" else text, label) for id_, text, label in rows["test"]]
    page = make_page(rows)
    assert [page.row("vocabulary", label)[2] for label in ("All labels", "General", "Teen")] == ["4", "0", "4"]


def test_bytes_per_token_tell_a_wrong_language_where_nothing_is_unknown(make_page, roberta_folder):
    byte_level, rows = load_tokenizer(str(roberta_folder)), clean_rows()
    assert make_page(rows, tokenizer=byte_level).warnings == []
    foreign = {split: [(id_, RUSSIAN, label) for id_, _, label in part] for split, part in rows.items()}
    page = make_page(foreign, tokenizer=byte_level, max_chunks=100)
    assert len(page.warnings) == 1
    assert "bytes of text per token" in page.warnings[0]
    assert page.row("vocabulary", "All labels")[2:4] == ["0", "0 %"]


def test_longest_and_shortest_documents_are_quoted(make_page):
    rows = clean_rows()
    long = f"{SENTENCES[2]} {'boat ' * 1000}{SENTENCES[3]}"
    rows["validation"] += [("long", long, "Teen"), ("empty", "", "General")]
    text = make_page(rows).texts["extremes"]
    assert text.index("long") < text.index("1,012 tokens") < text.index("A lamp") < text.index("counted the apples.")
    assert text.index("Shortest") < text.index("empty") < text.index("0 tokens") < text.index("(empty)")


def test_texts_are_escaped_and_invisible_characters_shown(make_page):
    hostile = "<script>alert(1)</script><img src=x> \x00\x1b[31m\u202egnp.exe {{ 7 * 7 }}"
    rows = clean_rows()
    rows["train"] += [(f"{hostile}{i}", hostile, f"</table>{hostile}") for i in range(12)]
    page = make_page(rows, {"empty": {"decision": "dropped", "rows": [hostile]}}, [pair(hostile, "<b>x</b>")])
    assert not {"script", "img", "b", "link", "iframe"} & set(page.tags)
    for section in ("labels", "issues", "duplicates", "extremes"):
        assert "⟨U+202E⟩gnp.exe" in page.texts[section]
        assert "{{ 7 * 7 }}" in page.texts[section]
    assert not {"\x00", "\x1b", "\u202e"} & set("".join(page.texts.values()))


def test_visible_keeps_what_texts_are_made_of():
    text = "naïve 👩\u200d👧 می\u200cخواهم\n\tzwölf\xa0Boote 終"
    assert visible(text) == text
    assert visible("a\u200bb\ufeff\ud800\x07") == "a⟨U+200B⟩b⟨U+FEFF⟩⟨U+D800⟩⟨U+0007⟩"


def test_nothing_is_loaded_from_elsewhere(make_page):
    page = make_page(clean_rows())
    assert page.policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)


def test_length_by_chance_is_no_effect():
    rng = np.random.default_rng(0)
    for num_documents in (40, 200, 2000):
        labels, lengths = rng.integers(2, size=num_documents), rng.lognormal(6, 1, num_documents)
        documents = pd.DataFrame({"label": labels, "num_tokens": lengths})
        assert length_effects(documents, documents) == []
        documents["num_tokens"] *= 1 + 50 * labels
        effects = length_effects(documents, documents)
        assert {label: longer > 0.5 for label, longer in effects} == {0: False, 1: True}


def test_the_page_stays_small(make_page, tokenizer):
    """Thousands of documents, some of a megabyte, with 300 labels, many issues and duplicates."""
    text = "<boat> \u202e" * 120_000
    rows = {
        split: [(f"{split}{i}" * 100, SENTENCES[i % 4], f"label {i % 300} " * 20) for i in range(count)]
        for split, count in (("train", 3000), ("validation", 600))
    }
    splits = make_splits(rows, tokenizer)
    giants = make_splits({"test": [(f"giant{i}", text, rows["train"][0][2]) for i in range(2)]}, tokenizer)["test"]
    splits["test"] = giants.cast_column("label", splits["train"].features["label"])
    issue = {"decision": "dropped", "rows": ["row " * 1000] * 10_000}
    page = make_page(splits, {"empty": issue, "unknown_label": issue}, [pair(text, f"{i}{text}") for i in range(200)])
    assert page.size < 2_000_000
    assert "200 pairs, of which 50 are shown" in page.texts["duplicates"]


def test_selected_rows_are_read_like_any_others(make_page, tokenizer):
    splits = make_splits(clean_rows(), tokenizer)
    selected = datasets.DatasetDict({split: part.select(range(0, len(part), 2)) for split, part in splits.items()})
    flat = datasets.DatasetDict({split: part.flatten_indices() for split, part in selected.items()})
    assert make_page(selected).tables == make_page(flat).tables


def test_a_dataset_may_lose_its_report(tmp_path, tokenizer):
    folder, splits = tmp_path / "stories", make_splits(clean_rows(), tokenizer)
    manifest = make_manifest() | {"tokenizer": {"name": "x", "fingerprint": tokenizer_fingerprint(tokenizer)}}
    save_prepared(splits, folder, manifest, lambda path: write_dataset_report(path, splits, manifest, tokenizer, []))
    assert Page((folder / REPORT).read_text(encoding="utf-8")).warnings == []
    assert REPORT not in json.loads((folder / "manifest.json").read_text())["files"]
    for change in (lambda path: path.write_text("edited"), lambda path: path.unlink()):
        change(folder / REPORT)
        assert len(load_prepared(str(folder), tokenizer)[0]["train"]) == 24


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(
    not shutil.which("chromium") or not shutil.which("chromedriver"),
    reason="chromium and chromium-driver are not installed",
)
def test_the_page_fits_a_phone_and_opens_documents(browser, make_page, tmp_path):
    rows = clean_rows()
    rows["train"] += [(f"{'long_name' * 40}-{i}", "boat" * 2000, "Unbroken" * 30) for i in range(12)]
    make_page(rows, duplicates=[pair("boat" * 300, "ship" * 300), pair("one", "two", kind="group_leak")])
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get((tmp_path / REPORT).as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    widths = browser.execute_script(
        "return [...document.querySelectorAll('#labels tbody th')].map(th => th.offsetWidth)"
    )
    assert max(widths) < 390 / 2
    summary, text = (browser.find_element("css selector", f"#extremes {tag}") for tag in ("summary", "details .text"))
    assert not text.is_displayed()
    summary.click()
    assert text.is_displayed()
    bars = browser.execute_script(
        "return [...document.querySelectorAll('#labels td .meter')].slice(0, 2).map(bar => bar.firstChild.offsetWidth / bar.offsetWidth)"
    )
    assert bars[0] == pytest.approx(12 / 36, abs=0.02)
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
