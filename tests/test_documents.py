"""Sources, what can be wrong with them, and splits without leaks."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.deduplication import join_groups, near_duplicates
from data.documents import ADVICE, Columns, read_documents
from data.readers import ReadOptions, Source, read_rows
from data.splits import make_splits, split_documents
from tests.conftest import LABELS, tiny_rows, write_csv

ROWS = [{"id": str(i), "text": f"Text number {i} of its own kind.", "label": LABELS[i % 3]} for i in range(6)]


def sources(folder) -> dict[str, str]:
    """The same six rows as every kind of source."""
    write_csv(folder / "a.csv", ROWS)
    (folder / "a.tsv").write_text("id\ttext\tlabel\n" + "".join("\t".join(row.values()) + "\n" for row in ROWS))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(folder / "a.parquet"))
    table.cast_column("label", datasets.ClassLabel(names=LABELS)).save_to_disk(str(folder / "saved"))
    for row in ROWS:
        path = folder / "texts" / row["label"] / f"{row['id']}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["text"])
    return {name: str(folder / name) for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved", "texts")}


@pytest.mark.parametrize("kind", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved", "texts"])
def test_every_kind_of_source_gives_the_same_documents(kind, tmp_path):
    documents, _ = read_documents(Source(sources(tmp_path)[kind]), Columns(), LABELS)
    found = sorted((row["text"], row["label"]) for row in documents)
    assert found == sorted((row["text"], row["label"]) for row in ROWS)


def read(tmp_path, rows: list[dict], encoding_errors: str = "strict", **arguments):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(path), ReadOptions(encoding_errors=encoding_errors))
    return read_documents(source, Columns(), LABELS, **arguments)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": None}, "missing_text"),
        ({"text": " \n"}, "empty"),
        ({"text": "\ufeff \u200b"}, "empty"),
        ({"label": None}, "missing_label"),
        ({"label": "Adult"}, "unknown_label"),
        ({"id": "0"}, "duplicate_id"),
        ({"split": "holdout"}, "unknown_split"),
    ],
)
def test_a_doubtful_row_is_named_and_can_be_dropped(change, problem, tmp_path):
    rows = [*ROWS[:4], {**ROWS[4], **change}, ROWS[5]]
    with pytest.raises(ValueError, match=rf"\[{problem}\].*row 5 \(id \w\).*--drop {problem}") as error:
        read(tmp_path, rows)
    assert ADVICE.get(problem, "") in str(error.value)
    documents, issues = read(tmp_path, rows, drop=[problem])
    assert len(documents) == 5
    assert issues.decisions[problem] == "dropped"
    assert len(issues.rows[problem]) == 1


def test_ids_can_be_left_out(tmp_path):
    write_csv(tmp_path / "a.csv", [{**row, "id": "1"} for row in ROWS])
    documents, _ = read_documents(Source(str(tmp_path / "a.csv")), Columns(id="none"))
    assert documents["id"] == [f"row-{i}" for i in range(1, 7)]


def test_a_key_that_a_later_line_leaves_out_is_a_value_that_is_missing(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"id": "x", "text": "No label."}]))
    with pytest.raises(ValueError, match=r"\[missing_label\].*row 7"):
        read_documents(Source(str(source)), Columns())
    assert len(read_documents(Source(str(source)), Columns(), drop=["missing_label"])[0]) == 6


def test_an_empty_cell_is_no_id(tmp_path):
    documents, _ = read(tmp_path, [*ROWS[:3], {**ROWS[3], "id": ""}, {**ROWS[4], "id": " "}])
    assert documents["id"] == ["0", "1", "2", "row-4", "row-5"]


def test_an_empty_document_can_be_kept(tmp_path):
    documents, issues = read(tmp_path, [*ROWS, {"id": "e", "text": "", "label": "Teen"}], keep=["empty"])
    assert len(documents) == 7
    assert issues.rows["empty"] == ["row 7 (id e)"]


def test_bytes_that_are_not_utf8_name_file_and_row(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes('id,text,label\n1,"two\nlines",Teen\n2,na\u00efve,Teen\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.csv.*row 2 \(line 4\).*UTF-8.*0xef"):
        list(read_rows(str(path)))
    assert [row["text"] for row in read_rows(str(path), ReadOptions(encoding_errors="replace"))] == [
        "two\nlines",
        "na\ufffdve",
    ]
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl.*line 2 is not UTF-8"):
        list(read_rows(str(path)))


def test_text_is_normalised_and_half_surrogates_are_errors(tmp_path):
    documents, _ = read(tmp_path, [{**row, "text": "e\u0301 " + row["text"]} for row in ROWS])
    assert documents[0]["text"].startswith("\u00e9 ")
    broken = [{**ROWS[0], "text": "a \ud800 b"}]
    with pytest.raises(ValueError, match=r"row 1\b.*surrogate"):
        read(tmp_path, broken)
    assert read(tmp_path, broken, encoding_errors="replace")[0][0]["text"] == "a \ufffd b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text,label\n1,a,b,Teen\n", r"row 1 \(line 2\).*\b3 "),
        ("a.csv", "id,text,text\n1,a,b\n", r"a\.csv.*\btext\b"),
        ("a.csv", "id,body,label\n1,a,Teen\n", "--text_column text.*id, body, label"),
        ("a.csv", "id,text,label\n", r"a\.csv.*\bdocuments?\b"),
        ("a.jsonl", '{"text": "a"\n', "row 1.*JSON"),
        ("a.jsonl", "[1]\n", "row 1.*list"),
        ("a.jsonl", '{"id": 1, "text": [5], "label": "Teen"}\n', "text.*list"),
        ("a.mobi", "", r"\.csv, \.tsv, \.jsonl.*\.parquet.*\.txt.*\.mobi"),
        ("a.parquet", "PAR", r"a\.parquet.*Parquet"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(Source(str(tmp_path / name)), Columns(), LABELS)


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.*\bhub\b"):
        list(read_rows(str(tmp_path / "nothing")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder.*labels"):
        list(read_rows(str(tmp_path / "folder")))


LONG = "It was a long evening and the rain did not stop for anyone who had to walk home over the hill."


def test_near_duplicates_are_found_and_others_are_not():
    texts = [
        LONG * 3 + " One.",
        "Something else entirely, with words of its own in every place.",
        LONG * 3 + " Two.",
        "short",
        "SHORT",
        "other",
    ]
    assert near_duplicates(texts) == [(0, 2), (3, 4)]
    assert near_duplicates([]) == []


def test_texts_that_are_all_alike_are_joined_and_not_paired(tmp_path):
    form = " ".join(f"word{number}" for number in range(60))
    texts = [f"{form} {number}" for number in range(600)] + ["A text of another kind, by itself in every place."]
    pairs = near_duplicates(texts)
    assert len(pairs) == 599  # each of 179,700 pairs is alike
    assert len(set(join_groups([""] * 601, pairs))) == 2


def test_made_splits_are_stratified_seeded_and_keep_groups_and_duplicates_together(tmp_path):
    rows = tiny_rows(200)
    for i, row in enumerate(rows):
        row["group"] = f"g{i // 4}"
    rows[0]["text"] = rows[150]["text"]
    documents, issues = read(tmp_path, rows)
    splits = split_documents(documents, issues, seed=1)
    assert splits == split_documents(documents, issues, seed=1)
    assert splits != split_documents(documents, issues, seed=2)
    assert splits[0] == splits[150]
    assert "same split" in issues.decisions["duplicate"]
    for group in range(50):
        assert len(set(splits[4 * group : 4 * group + 4])) == 1
    sizes = Counter(splits)
    assert (sizes["train"], sizes["validation"], sizes["test"]) == pytest.approx((160, 20, 20), abs=4)


def test_made_splits_without_groups_are_80_10_10_of_every_label():
    labels = ["a"] * 100 + ["b"] * 40 + ["c"] * 10
    counts = Counter(zip(make_splits(labels, list(range(150)), (0.8, 0.1, 0.1), 42), labels, strict=True))
    for label, total in (("a", 100), ("b", 40), ("c", 10)):
        found = [counts[split, label] for split in ("train", "validation", "test")]
        assert found == [total * 8 // 10, total // 10, total // 10]


def with_splits(tmp_path, **extra):
    rows = [
        {**row, "split": ("train", "val", "test")[i // 6], "id": str(i), "text": f"{row['text']} Copy {i}."}
        for i, row in enumerate(ROWS * 3)
    ]
    for i, fields in extra.items():
        rows[int(i[1:])] |= fields
    return read(tmp_path, rows)


def test_given_splits_are_taken(tmp_path):
    documents, issues = with_splits(tmp_path)
    assert Counter(split_documents(documents, issues)) == {"train": 6, "validation": 6, "test": 6}


def test_a_leak_across_given_splits_is_an_error_or_a_decision(tmp_path):
    documents, issues = with_splits(tmp_path, r2={"text": LONG, "group": "g"}, r9={"text": LONG.upper(), "group": "g"})
    with pytest.raises(
        ValueError,
        match=r"\[duplicate\].*2 \(train\) ~ 9 \(validation\).*\[group_leak\].*--drop duplicate,group_leak.*--keep",
    ):
        split_documents(documents, issues)
    issues.decisions = {"duplicate": "dropped", "group_leak": "dropped"}
    splits = split_documents(documents, issues)
    assert splits[2] == ""
    assert splits[9] == "validation"
    issues.decisions = {"duplicate": "kept", "group_leak": "kept"}
    assert "" not in split_documents(documents, issues)


def test_a_text_in_three_splits_stays_in_the_last_only(tmp_path):
    documents, issues = with_splits(tmp_path, r2={"text": LONG}, r9={"text": LONG}, r15={"text": LONG})
    issues.decisions = {"duplicate": "dropped"}
    splits = split_documents(documents, issues)
    assert (splits[2], splits[9], splits[15]) == ("", "", "test")
    assert issues.rows["duplicate"] == ["2 (train) ~ 15 (test)", "9 (validation) ~ 15 (test)"]


def test_parquet_that_is_not_utf8_names_the_row(tmp_path):
    column = pa.array([b"one", b"na\xefve"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column, "label": ["Teen", "Teen"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet.*row 2.*text.*UTF-8"):
        list(read_rows(str(tmp_path / "a.parquet")))
    assert [row["text"] for row in read_rows(str(tmp_path / "a.parquet"), ReadOptions(encoding_errors="replace"))] == [
        "one",
        "na\ufffdve",
    ]


def test_the_label_order_of_the_source_is_that_of_the_label_column(tmp_path):
    table = datasets.Dataset.from_list([{**row, "genre": 0} for row in ROWS])
    table = table.cast_column("genre", datasets.ClassLabel(names=["drama"]))
    table.save_to_disk(str(tmp_path / "strings"))
    assert Source(str(tmp_path / "strings")).label_names("label") is None
    table.cast_column("label", datasets.ClassLabel(names=LABELS)).save_to_disk(str(tmp_path / "ordered"))
    assert Source(str(tmp_path / "ordered")).label_names("label") == LABELS


def test_splits_that_cannot_be(tmp_path):
    documents, issues = with_splits(tmp_path, r2={"split": None})
    with pytest.raises(ValueError, match=r"\b1\b.*split.*\b2\b"):
        split_documents(documents, issues)
    documents, issues = read(tmp_path, [{**row, "split": "train"} for row in ROWS])
    with pytest.raises(ValueError, match="validation"):
        split_documents(documents, issues)
    documents, issues = read(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"General.*\b2\b"):
        split_documents(documents, issues)
    with pytest.raises(ValueError, match=r"(?i)fractions"):
        split_documents(documents, issues, fractions=(0.5, 0.1))
