"""Files, folders and labels as people have them: what is read, what is refused, and what is said of the rest."""

import bz2
import gzip
import json
import lzma
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.documents import Columns, read_documents, similar_labels, to_label
from data.readers import ReadOptions, Source
from data.splits import split_documents
from scripts.prepare_dataset import parse_arguments
from tests.conftest import tiny_rows, write_csv


def write_tree(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(*sources: Path | str, **options) -> list[tuple[str, str, str]]:
    """Text, label and split of each row."""
    source = Source([str(name) for name in sources], ReadOptions(**options))
    return [(row.values["text"], str(row.values.get("label", "")), row.values.get("split", "")) for row in source]


def unread(source: Path) -> list[str]:
    found = Source([str(source)])
    list(found)
    return list(found.found.unread)


REVIEWS = {
    f"{split}/{label}/{number}.txt": f"{split} {label} {number}"
    for split in ("train", "test") for label in ("pos", "neg") for number in (1, 2)
}  # fmt: skip


def test_split_and_label_folders_are_read_and_files_beside_them_named(tmp_path):
    write_tree(tmp_path, {**REVIEWS, "train/urls_pos.txt": "http://a", "README": "read me", "imdb.vocab": "the"})
    assert sorted(read(tmp_path)) == sorted((text, text.split()[1], text.split()[0]) for text in REVIEWS.values())
    name = tmp_path.name
    assert unread(tmp_path) == [f"{name}/README", f"{name}/imdb.vocab", f"{name}/train/urls_pos.txt"]


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar.zst"])
def test_an_archive_with_a_folder_around_is_read_like_the_folder(suffix, tmp_path):
    write_tree(
        tmp_path / "aclImdb", {**REVIEWS, "__MACOSX/x.txt": "", ".DS_Store": b"\x00", "train/pos/~$1.docx": "lock"}
    )
    archive = shutil.make_archive(
        str(tmp_path / "reviews"), {".zip": "zip", ".tar.gz": "gztar", ".tar.zst": "tar"}[suffix], tmp_path, "aclImdb"
    )
    if suffix == ".tar.zst":
        archive = tmp_path / "reviews.tar.zst"
        archive.write_bytes(pa.compress((tmp_path / "reviews.tar").read_bytes(), codec="zstd", asbytes=True))
    assert len(read(archive)) == 8
    assert {split for _, _, split in read(archive)} == {"train", "test"}


def test_labels_may_stand_above_splits_and_folders_below_labels(tmp_path):
    a = write_tree(
        tmp_path / "a", {f"{label}/{split}/x.md": label for label in ("pos", "neg") for split in ("train", "dev")}
    )
    assert Counter(read(a)) == {
        (label, label, split): 1 for label in ("pos", "neg") for split in ("train", "validation")
    }  # fmt: skip
    b = write_tree(tmp_path / "b", {"pos/1.txt": "1", "pos/old/2.TXT": "2", "neg/3.md": "3", "LICENSE.txt": "MIT"})
    assert sorted(read(b)) == [("1", "pos", ""), ("2", "pos", ""), ("3", "neg", "")]
    assert unread(b) == ["b/LICENSE.txt"]


def test_words_of_folders_are_splits_if_all_have_one(tmp_path):
    write_tree(tmp_path / "a", {f"my-{name}": text for name, text in REVIEWS.items()})
    assert Counter((label, split) for _, label, split in read(tmp_path / "a")) == {
        (label, split): 2 for label in ("pos", "neg") for split in ("train", "test")
    }  # fmt: skip
    write_tree(tmp_path / "b", {"train travel/dev patel/1.txt": "a", "bus/2.txt": "b"})
    assert sorted(read(tmp_path / "b")) == [("a", "train travel", ""), ("b", "bus", "")]
    write_tree(tmp_path / "c", {"test positive/1.txt": "a", "test negative/2.txt": "b"})
    assert sorted(read(tmp_path / "c")) == [("a", "test positive", ""), ("b", "test negative", "")]


def test_folders_that_are_splits_and_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train are named after splits, and extra .*not"):
        read(write_tree(tmp_path, {"train/pos/1.txt": "", "extra/pos/2.txt": ""}))


def test_labels_may_be_called_like_splits(tmp_path):
    write_tree(tmp_path, {"test/1.txt": "a", "exam/2.txt": "b"})
    assert sorted(read(tmp_path)) == [("a", "test", ""), ("b", "exam", "")]


def test_ids_are_paths_and_stay_apart(tmp_path):
    write_tree(tmp_path, {"pos/1.txt": "a", "pos/1.md": "b", "neg/x.txt": "c"})
    assert {row.values["id"] for row in Source(str(tmp_path))} == {
        "neg/x", f"{tmp_path.name}/pos/1.txt", f"{tmp_path.name}/pos/1.md",
    }  # fmt: skip
    write_tree(tmp_path, {"neg/1.txt": "d"})
    assert [row.values["id"] for row in Source(str(tmp_path / "*/1.txt"))] == ["neg/1.txt", "pos/1.txt"]


CSV = "text,label\n{},Teen\n"


@pytest.mark.parametrize(
    "names",
    [
        {"train.csv": "train", "validation.csv": "validation", "test.csv": "test"},
        {"my-train.csv": "train", "my-dev.csv": "validation"},
        {"train-00000-of-00002.csv": "train", "train-00001-of-00002.csv": "train", "eval.csv": "test"},
        {"train/part-0.csv": "train", "train/part-1.csv": "train", "val/part-0.csv": "validation"},
        {"trainset.csv": "train", "reviewsTest.csv": "test", "TRAINING_2.csv": "train"},
        {"latest.csv": "", "contest.csv": ""},
        {"part-0.csv": "", "part-1.csv": ""},
        {"train.csv": ""},  # alone: splits are still to be made
    ],
)
def test_names_of_tables_give_splits(names, tmp_path):
    write_tree(tmp_path, {name: CSV.format(name) for name in names})
    assert sorted(read(tmp_path)) == sorted((name, "Teen", split) for name, split in names.items())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"reviews.csv": CSV, "reviews_test.csv": CSV}, r"reviews_test\.csv is named after a split, and \S+reviews\.csv is not"),
        ({"train.jsonl": '{"text": "a", "label": "x"}', "test.json": '[{"text": "b", "label": "x"}]'}, r"several kinds \(JSON, JSONL"),
        ({"train-00000-of-00003.csv": CSV, "train-00002-of-00003.csv": CSV, "test.csv": CSV}, r"missing of train \(2 of 3\)"),
        ({"a.csv": CSV, "a.csv.gz": gzip.compress(CSV.encode())}, r"a\.csv is there compressed and not"),
        ({"a/inner.zip": b"", "a/1": "a"}, r"Not read \(2\): a/1, a/inner\.zip"),
    ],
)  # fmt: skip
def test_tables_that_may_be_incomplete_or_there_twice_are_refused(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(write_tree(tmp_path, files))


def test_tables_beside_split_files_and_documents_beside_tables_are_named(tmp_path):
    write_tree(
        tmp_path, {"train.csv": CSV, "test.csv": CSV, "notes.csv": CSV, "README.md": "#", "dataset_info.json": "{}"}
    )
    assert len(read(tmp_path)) == 2
    assert [name.rpartition("/")[2] for name in unread(tmp_path)] == ["README.md", "dataset_info.json", "notes.csv"]


def test_a_description_by_datasets_is_no_table(tmp_path):
    write_tree(tmp_path, {"data/train.json": json.dumps(ROWS), "dataset_infos.json": '{"default": {}}'})
    assert len(read(tmp_path)) == 300
    assert unread(tmp_path) == [f"{tmp_path.name}/dataset_infos.json"]


def test_a_table_without_rows_is_named(tmp_path):
    write_tree(tmp_path, {"train.csv": CSV, "test.csv": "text,label\n", "validation.csv": ""})
    assert len(read(tmp_path)) == 1
    assert unread(tmp_path) == [f"{tmp_path.name}/{name}.csv (no rows)" for name in ("test", "validation")]


def test_tables_of_two_kinds_are_refused(tmp_path):
    write_tree(tmp_path, {"a.csv": CSV, "a.jsonl": '{"text": "a", "label": "b"}'})
    with pytest.raises(ValueError, match=r"several kinds \(CSV, JSONL\).*--source"):
        read(tmp_path)


def test_several_sources_and_patterns_are_read_in_order(tmp_path):
    write_tree(tmp_path, {f"{name}.csv": CSV.format(name) for name in ("b", "a", "c")})
    assert [text for text, *_ in read(tmp_path / "b.csv", str(tmp_path / "[ac].csv"))] == ["b", "a", "c"]
    with pytest.raises(ValueError, match="no file matches"):
        read(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="no such file"):
        read(tmp_path / "b.csv", tmp_path / "nothing")
    with pytest.raises(ValueError, match="An empty --source"):
        read("")


def test_rows_of_several_tables_are_named_by_file_and_ids_stay_apart(tmp_path):
    write_tree(tmp_path, {"train.csv": "id,text,label\n1,a,x\n", "test.csv": "id,text,label\n1,b,x\n2,,x\n"})
    with pytest.raises(ValueError, match=r"/test\.csv row 2 \(id 2\)"):
        read_documents(Source(str(tmp_path)), Columns())
    documents, _ = read_documents(Source(str(tmp_path)), Columns(), drop=["empty"])
    assert sorted(documents["id"]) == ["1", f"{tmp_path.name}/train.csv:1"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
     (".zst", lambda data: pa.compress(data, codec="zstd", asbytes=True))],
)  # fmt: skip
def test_compressed_tables_are_read_and_broken_ones_refused(suffix, compress, tmp_path):
    content = compress(CSV.format("a" * 1000).encode())
    path = write_tree(tmp_path, {f"a.csv{suffix}": content}) / f"a.csv{suffix}"
    assert [len(text) for text, *_ in read(path)] == [1000]
    path.write_bytes(content[:-12])
    with pytest.raises(ValueError, match=r"a\.csv.*complete"):
        read(path)


ROWS = [{"text": f"Text {i}: é", "label": "Teen"} for i in range(300)]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_json_array_is_read(name, indent, tmp_path):
    rows = [*ROWS, {"text": "A long text. " * 50_000, "label": "Teen"}]
    (tmp_path / name).write_text(json.dumps(rows, indent=indent))
    assert [text for text, *_ in read(tmp_path / name)] == [row["text"] for row in rows]


def test_json_lines_under_json_are_read_and_other_json_refused(tmp_path):
    path = write_tree(tmp_path, {"a.json": "\n".join(map(json.dumps, ROWS))}) / "a.json"
    assert len(read(path)) == 300
    path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    with pytest.raises(ValueError, match="array of objects, or one object a line"):
        read(path)
    path.write_text(json.dumps(ROWS)[:-20])
    with pytest.raises(ValueError, match="row 300 of the array"):
        read(path)


def test_parquet_of_datasets_gives_names_and_order_of_its_classes(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]})
    table = table.cast_column("label", datasets.ClassLabel(names=["neutral", "bad"]))
    table.to_parquet(str(tmp_path / "a.parquet"))
    source = Source(str(tmp_path / "a.parquet"))
    assert source.label_names("label") == ["neutral", "bad"]
    assert [row.values["label"] for row in source] == ["bad", "neutral", None]


@pytest.mark.parametrize("damage", ["folder", "file", "end"])
def test_a_saved_dataset_that_is_damaged_or_deeper_is_refused(damage, tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a"], "label": ["x"]})
    datasets.DatasetDict(train=table, test=table).save_to_disk(str(tmp_path / "outer/saved"))
    [arrow] = (tmp_path / "outer/saved/test").glob("*.arrow")
    if damage == "file":
        arrow.unlink()
    elif damage == "end":
        arrow.write_bytes(arrow.read_bytes()[:50])
    source, message = {"folder": ("outer", "the folder saved in it")}.get(damage, ("outer/saved", "saved: incomplete"))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / source)


def write_workbook(path: Path, sheets: dict[str, list[list]]) -> None:
    """A workbook with text and numbers only. A sheet whose name begins with _ is hidden."""

    def cell(value) -> str:
        return (
            f"<c><v>{value}</v></c>"
            if isinstance(value, int)
            else f'<c t="inlineStr"><is><t>{value or ""}</t></is></c>'
        )

    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    schema, relations = "http://schemas.openxmlformats.org", "officeDocument/2006/relationships"
    names = [
        f"<sheet name='{name}' sheetId='{i}' r:id='r{i}' state='{'hidden' if name[0] == '_' else 'visible'}'/>"
        for i, name in enumerate(sheets, 1)
    ]
    parts = [
        f"<Override PartName='/xl/s{i}.xml' ContentType='{kind}.worksheet+xml'/>" for i in range(1, len(sheets) + 1)
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "[Content_Types].xml",
            f"<Types xmlns='{schema}/package/2006/content-types'><Default Extension='rels' ContentType='application/vnd.openxmlformats"
            f"-package.relationships+xml'/><Override PartName='/xl/workbook.xml' ContentType='{kind}.sheet.main+xml'/>{''.join(parts)}</Types>",
        )
        links = f"<Relationships xmlns='{schema}/package/2006/relationships'>{{}}</Relationships>"
        link = f"<Relationship Id='r{{}}' Type='{schema}/{relations}/{{}}' Target='{{}}'/>"
        archive.writestr("_rels/.rels", links.format(link.format(1, "officeDocument", "xl/workbook.xml")))
        inner = [link.format(i, "worksheet", f"s{i}.xml") for i in range(1, len(sheets) + 1)]
        archive.writestr("xl/_rels/workbook.xml.rels", links.format("".join(inner)))
        main = f"xmlns='{schema}/spreadsheetml/2006/main'"
        archive.writestr(
            "xl/workbook.xml",
            f"<workbook {main} xmlns:r='{schema}/{relations}'><sheets>{''.join(names)}</sheets></workbook>",
        )
        for i, rows in enumerate(sheets.values(), 1):
            data = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
            archive.writestr(f"xl/s{i}.xml", f"<worksheet {main}><sheetData>{data}</sheetData></worksheet>")


def test_a_spreadsheet_is_read_and_its_other_sheets_named(tmp_path):
    rows = [["text", "label", "year", None], ["One.", 1, 1999, None], [None] * 4, ["Two.", 2, None, "x"]]
    write_workbook(tmp_path / "a.xlsx", {"Texts": rows, "Notes": [["a"], ["b"]], "Empty": []})
    source = Source(str(tmp_path / "a.xlsx"))
    assert [(row.location, row.values["text"], to_label(row.values["label"])) for row in source] == [
        ("row 2", "One.", "1"), ("row 4", "Two.", "2"),
    ]  # fmt: skip
    assert list(source.found.unread) == ["a.xlsx, sheet 'Notes'"]
    write_workbook(tmp_path / "d.xlsm", {"_Old": rows, "New": [["text", "label", 2020], ["a", "x", 7]]})
    assert [row.values for row in Source(str(tmp_path / "d.xlsm"))] == [{"text": "a", "label": "x", "2020": 7}]
    assert unread(tmp_path / "d.xlsm") == ["d.xlsm, sheet '_Old'"]
    header, sheets = ["id", "text", "label"], {"train": "a", "Notes": "b", "test": "c"}
    write_workbook(tmp_path / "e.xlsx", {name: [header, [1, text, "x"]] for name, text in sheets.items()})
    documents, _ = read_documents(Source(str(tmp_path / "e.xlsx")), Columns())
    assert [(row["id"], row["text"], row["split"]) for row in documents] == [
        ("1", "a", "train"), ("sheet 'test':1", "c", "test"),
    ]  # fmt: skip
    write_workbook(tmp_path / "c.xlsx", {"Texts": [["text"], ["x" * 32_767]]})
    assert "row 2 beyond" in unread(tmp_path / "c.xlsx")[0]
    (tmp_path / "b.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"b\.xlsx: not a readable spreadsheet"):
        read(tmp_path / "b.xlsx")


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("text,label\nHe said \u201chi\u201d, it\u2019s fine,Teen\n".replace(", it", " it"), "cp1252"),
        ("text,label\nПривет как дела сегодня,Teen\n", "cp1251"),
        ("text,label\n今日は天気がいいですね散歩に行きましょう,Teen\n", "cp932"),
    ],
)
def test_the_encoding_is_named_and_taken(content, encoding, tmp_path):
    path = write_tree(tmp_path, {"a.csv": content.encode(encoding)}) / "a.csv"
    with pytest.raises(
        ValueError, match=rf"row 1 \(line 2\) is not UTF-8.*--encoding {encoding}\b.*--encoding_errors replace"
    ):
        read(path)
    assert read(path, encoding=encoding)[0][0] == content.split("\n")[1].rpartition(",")[0]


def test_one_line_of_another_encoding_is_named(tmp_path):
    content = "text,label\nnaïve café,x\n".encode() + "Привет мир,x\n".encode("cp1251") + "naïve,x\n".encode()
    with pytest.raises(ValueError, match=r"row 2 \(line 3\) is not UTF-8.*Other lines are UTF-8: correct this one"):
        read(write_tree(tmp_path, {"a.csv": content}) / "a.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("given", [None, "utf-8", "cp1252"])
def test_a_byte_order_mark_says_the_encoding(encoding, suffix, given, tmp_path):
    content = "text,label\nnaïve,Teen\n" if suffix == ".csv" else '{"text": "naïve", "label": "Teen"}\n'
    path = write_tree(tmp_path, {f"a{suffix}": content.encode(encoding)}) / f"a{suffix}"
    assert read(path, encoding=given) == [("naïve", "Teen", "")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id;text;label\n1;a, b;Teen\n"),
        ("a.csv", "id\ttext\tlabel\n1\ta, b\tTeen\n"),
        ("a.csv", "sep=;\nid;text;label\n1;a, b;Teen\n"),
        ("a.tsv", "id\ttext\tlabel\n1\ta, b\tTeen\n"),
        ("a.csv", ' id , text ,\u200blabel\u00a0\n1,"a, b",Teen\n'),
        ("a.csv", 'cafe\u0301,text,label\n1,"a, b",Teen\n'),
    ],
)
def test_delimiters_are_known_by_the_header_and_names_trimmed(name, content, tmp_path):
    [row] = Source(str(write_tree(tmp_path, {name: content}) / name))
    assert list(row.values) == ["café" if "caf" in content else "id", "text", "label"]
    assert list(row.values.values()) == ["1", "a, b", "Teen"]


def test_a_delimiter_can_be_given(tmp_path):
    path = write_tree(tmp_path, {"a.csv": "text,x~label\na~Teen\n"}) / "a.csv"
    [row] = Source(str(path), ReadOptions(delimiter="~"))
    assert row.values == {"text,x": "a", "label": "Teen"}
    options = ["--source", "a", "--tokenizer", "t", "--output_dir", "o", "--delimiter"]
    assert parse_arguments([*options, "tab"])["read_options"].delimiter == "\t"
    with pytest.raises(ValueError, match="one character"):
        parse_arguments([*options, "::"])


def table_with(fault: str, num_rows: int = 1000) -> str:
    rows = [f'{i},"Text {i}, of its own.",Teen\n' for i in range(1, num_rows + 1)]
    rows[2] = fault
    return "id,text,label\n" + "".join(rows)


@pytest.mark.parametrize(
    "fault",
    [
        '3,"He said "hi" to me",Teen\n',
        '3,"He left it open,Teen\n',
        "3,too,many,Teen\n",
        "3,few\n",
        '3,"two\nlines" x,Teen\n',
    ],
)
def test_a_malformed_record_is_named_where_it_begins_and_the_others_are_read(fault, tmp_path):
    path = write_tree(tmp_path, {"a.csv": table_with(fault)}) / "a.csv"
    with pytest.raises(ValueError, match=r"1 with a malformed record.*row 3 \(line 4\).*--drop malformed"):
        read_documents(Source(str(path)), Columns())
    documents, issues = read_documents(Source(str(path)), Columns(), drop=["malformed"])
    assert documents["id"] == [str(i) for i in range(1, 1001) if i != 3]
    assert len(issues.rows["malformed"]) == 1


def test_a_quote_open_to_the_end_is_named(tmp_path):
    path = write_tree(tmp_path, {"a.csv": 'text,label\na,Teen\n"open,Teen\nb,Teen\n'}) / "a.csv"
    assert [(row.location, bool(row.error)) for row in Source(str(path))] == [
        ("row 1", False), ("row 2 (line 3)", True), ("row 3", False),
    ]  # fmt: skip


def test_malformed_json_lines_can_be_dropped(tmp_path):
    path = (
        write_tree(tmp_path, {"a.jsonl": '{"text": "a", "label": "x"}\n{"text": \n{"text": "b", "label": "x"}\n'})
        / "a.jsonl"
    )
    documents, issues = read_documents(Source(str(path)), Columns(), drop=["malformed"])
    assert documents["text"] == ["a", "b"]
    assert "row 2: not JSON" in issues.rows["malformed"][0]


def test_keys_of_json(tmp_path):
    path = write_tree(tmp_path, {"a.jsonl": '{"text": "a"}\n{"text": "b", "label": "x"}\n'}) / "a.jsonl"
    documents, issues = read_documents(Source(str(path)), Columns(), drop=["missing_label"])
    assert (documents["text"], issues.rows) == (["b"], {"missing_label": ["row 1"]})
    for content in ('{"text": "a", "label": "x", "text": "b"}', '[{"text": "a", "label": "x", "text": "b"}]'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"row 1.*a key occurs twice among text, label"):
            read_documents(Source(str(path)), Columns())


def labelled(folder: Path, labels: list) -> Source:
    rows = [json.dumps({"text": f"Text {i} of its own kind.", "label": label}) + "\n" for i, label in enumerate(labels)]
    return Source(str(write_tree(folder, {"a.jsonl": "".join(rows)}) / "a.jsonl"))


@pytest.mark.parametrize(
    "label", [["x", "y"], {"z": 1}, '["x", "y"]', "['x', 'y']", "['x' 'y']", "[1 0]", "{'x'}", "[]"]
)
def test_several_labels_a_document_are_refused(label, tmp_path):
    with pytest.raises(ValueError, match=r"row 2: expected one label, got .*--problem_type multi_label_classification"):
        read_documents(labelled(tmp_path, ["x", label]), Columns())


@pytest.mark.parametrize(
    ("value", "label"),
    [("Teen \u00a0\u200b", "Teen"), ("\ufeffTeen", "Teen"), ("cafe\u0301", "caf\u00e9"), (1.0, "1"), ("1.0", "1"), ("-1.00", "-1"),
     ("0.5", "0.5"), ("01", "01"), ("1.0.0", "1.0.0"), (True, "True"), (None, ""), ("[OC]", "[OC]"), (float("nan"), ""), ("nan", ""),
     ("#N/A", ""), ("Nan", "Nan")],
)  # fmt: skip
def test_labels_have_one_form(value, label):
    assert to_label(value) == label


def test_labels_that_look_alike_are_named_and_decided(tmp_path):
    source = labelled(tmp_path, ["Teen"] * 3 + ["teen", "TEEN", "Te\u200ben", "General"])
    with pytest.raises(ValueError, match=r"\[similar_label\].*'TEEN' \(1 rows\) ~ 'Teen' \(3\).*--merge_labels"):
        read_documents(source, Columns())
    assert Counter(read_documents(source, Columns(), merge_labels=True)[0]["label"]) == {"Teen": 6, "General": 1}
    assert Counter(read_documents(source, Columns(), drop=["similar_label"])[0]["label"]) == {"Teen": 3, "General": 1}
    assert len(set(read_documents(source, Columns(), keep=["similar_label"])[0]["label"])) == 5
    merged, issues = read_documents(source, Columns(), ["General", "teen"], merge_labels=True)
    assert issues.rows["similar_label"][0] == "'Teen' (3 rows) ~ 'teen'"
    assert Counter(merged["label"]) == {"teen": 6, "General": 1}


def test_numbers_and_punctuation_written_differently_look_alike():
    assert similar_labels(Counter({"1": 5, "01": 2, "2": 1})) == {"01": "1"}
    assert similar_labels(Counter({"-1": 5, "\u22121": 2, "❤": 2, "❤\ufe0f": 1, "Children's": 2, "Children\u2019s": 1})) == {
        "\u22121": "-1", "❤\ufe0f": "❤", "Children\u2019s": "Children's",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "order"),
    [([0, 1, -1], ["-1", "0", "1"]), (["10", "1", "0.5", "1.5"], ["0.5", "1", "1.5", "10"]), (["b", "2", "10", "a"], ["2", "10", "a", "b"])],
)  # fmt: skip
def test_numbers_are_sorted_as_numbers(labels, order):
    from data.preparation import sorted_labels

    assert sorted_labels([to_label(label) for label in labels]) == order


@pytest.mark.parametrize(
    ("given", "labels"), [("-1,0,1", ["-1", "0", "1"]), ('"Yes, a lot", No,', ["Yes, a lot", "No"])]
)
def test_labels_that_can_be_given(given, labels):
    options = parse_arguments(
        ["--source", "a", "--tokenizer", "t", "--output_dir", "o", "--labels", given, "--seed", "-3"]
    )
    assert (options["labels"], options["seed"]) == (labels, -3)


def test_a_name_in_another_case_is_offered(tmp_path):
    path = write_tree(tmp_path, {"a.csv": "Text,LABEL\na,b\n"}) / "a.csv"
    with pytest.raises(ValueError, match=r"Did you mean --text_column Text\?.*--label_column LABEL"):
        read_documents(Source(str(path)), Columns())
    write_tree(tmp_path, {"b.csv": CSV})
    with pytest.raises(
        ValueError, match=r"/a\.csv: no column for --text_column text.*Did you mean --text_column Text\?"
    ):
        read_documents(Source([str(tmp_path / "b.csv"), str(tmp_path)]), Columns())
    path.write_text("text,label,Split\na,b,train\n")
    with pytest.raises(ValueError, match=r"Did you mean --split_column Split\?"):
        read_documents(Source(str(path)), Columns())
    assert read_documents(Source(str(path)), Columns(split="none"))[0]["split"] == [""]


def test_validation_is_taken_out_of_train(tmp_path):
    rows = [{**row, "text": f"Story {i}.", "split": "test" if i % 5 == 0 else "train", "group": f"g{i // 10}" if i % 5 else ""}
            for i, row in enumerate(tiny_rows(200))]  # fmt: skip
    write_csv(tmp_path / "a.csv", rows)
    documents, issues = read_documents(Source(str(tmp_path / "a.csv")), Columns())
    with pytest.raises(ValueError, match=r"no validation documents.*--validation_from_train"):
        split_documents(documents, issues)
    splits = split_documents(documents, issues, validation_from_train=0.25)
    assert [split == "test" for split in splits] == [i % 5 == 0 for i in range(200)]
    assert Counter(splits)["validation"] == pytest.approx(40, abs=8)
    groups = {(group, split) for group, split in zip(documents["group"], splits, strict=True) if group}
    assert len(groups) == 20  # each in one split
    assert splits == split_documents(documents, issues, validation_from_train=0.25)
    assert splits != split_documents(documents, issues, seed=1, validation_from_train=0.25)


def test_several_text_columns_are_joined_and_named(tmp_path):
    rows = [{"title": "A", "body": "cafe\u0301 x", "label": "x"}, {"title": "", "body": "B", "label": "x"},
            {"title": None, "body": None, "label": "x"}]  # fmt: skip
    path = write_tree(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}) / "a.jsonl"
    columns = Columns(text="title,body")
    documents, issues = read_documents(
        Source(str(path), ReadOptions(text_columns=columns.texts)), columns, drop=["missing_text"]
    )
    assert documents["text"] == ["A\n\ncaf\u00e9 x", "B"]
    assert [json.loads(sections) for sections in documents["sections"]] == [[[0, "title"], [3, "body"]], [[0, "body"]]]
    assert issues.rows["missing_text"] == ["row 3"]


def test_kept_columns_travel_as_metadata(tmp_path):
    path = write_tree(tmp_path, {"a.csv": "text,label,url,year\na,x,http://a,1999\n"}) / "a.csv"
    documents, _ = read_documents(Source(str(path)), Columns(keep=["url", "year"]))
    assert json.loads(documents[0]["metadata"]) == {"url": "http://a", "year": "1999"}
    with pytest.raises(ValueError, match="--keep_columns source"):
        read_documents(Source(str(path)), Columns(keep=["source"]))


def test_a_table_lists_documents(tmp_path):
    write_tree(
        tmp_path,
        {
            "list.csv": "path,label\ntexts/1.txt,x\nmissing.txt,y\n,y\ntexts\\1.txt,x\nbroken.pdf,y\n",
            "texts/1.txt": "One.",
            "texts/2.txt": "Two.",
            "broken.pdf": "no PDF",
        },
    )
    for source in (tmp_path, tmp_path / "list.csv"):
        rows = list(Source(str(source)))
        assert [rows[index].values["text"] for index in (0, 3)] == ["One.", "One."]
        assert "names no file: missing.txt" in rows[1].error
        assert "names no file: it is empty" in rows[2].error
        assert rows[4].error.startswith("broken.pdf: ")
    assert unread(tmp_path) == [f"{tmp_path.name}/texts/2.txt"]


def test_a_configuration_of_a_dataset_is_chosen_by_its_name(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("old", "new"))
    write_tree(
        tmp_path,
        {"README.md": f"---\nconfigs:\n{configs}---\n", "old.csv": CSV.format("o"), "new.csv": CSV.format("n")},
    )
    assert read(tmp_path, config_name="new") == [("n", "Teen", "train")]
    with pytest.raises(ValueError, match=r"newer.*--dataset_config_name"):
        read(tmp_path, config_name="newer")
    with pytest.raises(ValueError, match=r"old\.csv: --dataset_config_name and --dataset_revision are for"):
        read(tmp_path / "old.csv", config_name="new")


def test_folders_and_patterns_named_after_splits_keep_them(tmp_path):
    write_tree(tmp_path, REVIEWS)
    write_tree(tmp_path / "tables", {"train/x.csv": CSV.format("a"), "test/x.csv": CSV.format("b")})
    by_split = Counter(split for *_, split in read(tmp_path / "train", tmp_path / "test"))
    assert by_split == {"train": 4, "test": 4}
    write_tree(tmp_path / "my test", {"train.csv": CSV, "more.csv": CSV})
    assert {split for *_, split in read(tmp_path / "my test/train.csv", tmp_path / "my test/more.csv")} == {""}
    write_tree(tmp_path, {f"my-{name}": text for name, text in REVIEWS.items()})
    assert read(tmp_path / "my-train", tmp_path / "my-test") == read(tmp_path / "train", tmp_path / "test")
    assert read(str(tmp_path / "tables/*/*.csv")) == [("b", "Teen", "test"), ("a", "Teen", "train")]
    assert {split for *_, split in read(tmp_path / "train")} == {""}


def test_a_file_beside_splits_in_labels_is_left_out(tmp_path):
    write_tree(tmp_path, {f"{label}/{split}/1.txt": "" for label in ("pos", "neg") for split in ("train", "test")})
    write_tree(tmp_path, {"neg/notes.txt": "notes"})
    assert Counter((label, split) for _, label, split in read(tmp_path)) == {
        (label, split): 1 for label in ("pos", "neg") for split in ("train", "test")
    }  # fmt: skip
    assert unread(tmp_path) == [f"{tmp_path.name}/neg/notes.txt"]
    write_tree(tmp_path, {"neg/more/1.txt": ""})
    with pytest.raises(ValueError, match=r"test, train are named after splits, and more not"):
        read(tmp_path)


def test_links_are_followed_once_and_broken_ones_named(tmp_path):
    write_tree(tmp_path / "data", {"pos/1.txt": "a"})
    write_tree(tmp_path / "elsewhere", {"2.txt": "b"})
    (tmp_path / "data/neg").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/pos/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/pos/broken.txt").symlink_to(tmp_path / "nothing.txt")
    assert sorted(read(tmp_path / "data")) == [("a", "pos", ""), ("b", "neg", "")]
    (tmp_path / "data/pos/1.txt.link.txt").symlink_to(tmp_path / "data/pos/1.txt")
    assert unread(tmp_path / "data") == ["data/pos/broken.txt", "data/pos/loop", "data/pos/1.txt.link.txt"]


@pytest.mark.parametrize("kind", ["gztar", "xztar", "zip"])
def test_a_damaged_archive_is_refused(kind, tmp_path):
    write_tree(tmp_path / "in", {f"pos/{i}.txt": f"Text {i} " * 50 for i in range(50)})
    path = Path(shutil.make_archive(str(tmp_path / "a"), kind, tmp_path / "in"))
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 8):
        content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be extracted"):
        read(path)


def test_a_tar_that_is_cut_off_between_documents_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("pos/1.txt", "neg/2.txt"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:512])
    with pytest.raises(ValueError, match=r"cannot be extracted \(it is cut off"):
        read(tmp_path / "a.tar")


def test_documents_in_a_folder_of_their_own_beside_a_readme(tmp_path):
    write_tree(
        tmp_path, {**{f"aclImdb/{name}": text for name, text in REVIEWS.items()}, "aclImdb/README.txt": "read me"}
    )
    assert Counter(split for *_, split in read(tmp_path)) == {"train": 4, "test": 4}
    assert unread(tmp_path) == [f"{tmp_path.name}/aclImdb/README.txt"]


def test_every_document_is_read_where_folders_mean_nothing(tmp_path):
    write_tree(tmp_path, {"1.txt": "a", "train/2.txt": "b", "x/y/3.txt": "c"})
    assert sorted(read(tmp_path, by_folder=False)) == [("a", "", ""), ("b", "", ""), ("c", "", "")]


def test_side_files_that_cannot_be_read_are_left_out(tmp_path):
    write_tree(
        tmp_path, {"pos/1.txt": "a", "neg/1.txt": "b", "info.json": "{", "t.csv": b"text\n\xff", "x.xlsx": b"PK"}
    )
    assert len(read(tmp_path)) == 2
    assert len(unread(tmp_path)) == 3


def test_a_readme_beside_tables_is_no_document(tmp_path):
    write_tree(tmp_path, {"README.md": "#", "data.csv": "sentence,stars\na,1\n"})
    with pytest.raises(ValueError, match=r"the columns are sentence, stars"):
        read_documents(Source(str(tmp_path)), Columns())


def test_a_list_under_another_name_is_named_with_what_lacks(tmp_path):
    write_tree(tmp_path, {"texts/1.txt": "a", "1.txt": "b", "metadata.csv": "file_name,label\n1.txt,x\n"})
    with pytest.raises(ValueError, match=r"no column for .*label.*Not read.*metadata\.csv"):
        read_documents(Source(str(tmp_path), ReadOptions(by_folder=False)), Columns())
    documents, _ = read_documents(Source(str(tmp_path), ReadOptions(path_column="file_name")), Columns())
    assert documents["text"] == ["b"]


def test_a_file_is_read_once(tmp_path):
    write_tree(tmp_path, {"a.csv": CSV.format("a"), "b.csv": CSV.format("b")})
    assert [text for text, *_ in read(tmp_path / "a.csv", str(tmp_path / "*.csv"))] == ["a", "b"]
    source = Source([str(tmp_path), str(tmp_path / "a.csv")])
    assert (len(list(source)), source.found.unread) == (2, {})


@pytest.mark.parametrize(
    ("rest", "message"), [("[1]", "text after the array of 300 rows"), (" x", "text after the array")]
)
def test_text_after_a_json_array_is_refused(rest, message, tmp_path):
    path = write_tree(tmp_path, {"a.json": json.dumps(ROWS) + rest}) / "a.json"
    with pytest.raises(ValueError, match=message):
        read(path)
    path.write_text(json.dumps(ROWS).replace("}, {", "} {"))
    with pytest.raises(ValueError, match="row 2 of the array does not follow a comma"):
        read(path)


def test_headers_of_spreadsheets(tmp_path):
    write_workbook(tmp_path / "a.xlsx", {"Texts": [[None], ["text", "label"], [1984, "x"]]})
    documents, _ = read_documents(Source(str(tmp_path / "a.xlsx")), Columns())
    assert documents["text"] == ["1984"]
    write_workbook(tmp_path / "b.xlsx", {"Texts": [["text", "label", "text "], ["a", "x", "b"]]})
    with pytest.raises(ValueError, match="duplicate column in the header: text"):
        read(tmp_path / "b.xlsx")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-32-be", "utf-32-le"])
def test_wide_text_without_a_mark_and_binary_files_are_refused(name, encoding, tmp_path):
    path = write_tree(tmp_path, {name: "\u4e00,label\na,b\n".encode(encoding)}) / name
    with pytest.raises(ValueError, match=rf"not a text file.*--encoding {encoding}"):
        [row] = Source(str(path))
        raise ValueError(row.error)


@pytest.mark.parametrize(
    "content",
    ["text,label,,\na,Teen,,\n", "text,label,\na,Teen\n", "text,label\na,Teen,\n", "sep=\t\ntext\tlabel\na\tTeen\n",
     "\n\ntext;label\na;Teen\n"],
)  # fmt: skip
def test_empty_columns_and_lines_of_spreadsheet_programs(content, tmp_path):
    assert read(write_tree(tmp_path, {"a.csv": content}) / "a.csv") == [("a", "Teen", "")]


def test_a_whole_record_with_a_field_too_many_leaves_no_fragments(tmp_path):
    path = (
        write_tree(tmp_path, {"a.csv": 'text,label\nb,x\n"Dear all,\nHello, world\nBye, now",x,extra\nc,y\n'}) / "a.csv"
    )
    assert [(row.values.get("text"), bool(row.error)) for row in Source(str(path))] == [
        ("b", False),
        (None, True),
        ("c", False),
    ]


def test_blank_lines_after_a_malformed_record_stay_in_texts(tmp_path):
    content = 'text,label\n"a\n\nopen\n\n"b\n\nc, d",y\n'
    rows = list(Source(str(write_tree(tmp_path, {"a.csv": content}) / "a.csv")))
    assert [row.values.get("text") for row in rows] == [None, "b\n\nc, d"]


@pytest.mark.parametrize(
    "evidence",
    ['[{"start": "0", "end": 2}]', "[[0, 2]]", "{", '[{"start": 2, "end": 2000}]', '[{"start": 3, "end": 3}]'],
)
def test_gold_evidence_that_cannot_be_used_is_named(evidence, tmp_path):
    rows = [
        {"text": "A text.", "label": "x", "evidence": '[{"start": 0, "end": 2}]'},
        {"text": "Another.", "label": "x", "evidence": evidence},
    ]
    path = write_tree(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, rows))}) / "a.jsonl"
    documents, issues = read_documents(Source(str(path)), Columns())
    assert documents["evidence"] == ['[{"start": 0, "end": 2}]', ""]
    assert (issues.rows["evidence"], issues.decisions["evidence"]) == (["row 2"], "left out")


def test_parquet_of_other_libraries(tmp_path):
    table = pa.table(
        [pa.array(["a"]).dictionary_encode(), pa.array([2**62], pa.timestamp("ns")), ["x"]], ["text", "time", "label"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [("a", "x", "")]
    pq.write_table(pa.table([["a"], ["b"]], ["text", "text"]), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="duplicate column"):
        read(tmp_path / "b.parquet")


def test_an_archive_cannot_write_outside(tmp_path):
    (tmp_path / "evil.txt").write_text("evil")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "evil.txt", "../../escaped.txt")
    with pytest.raises(ValueError, match="cannot be extracted"):
        read(tmp_path / "a.tar")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../inside.txt", "inside")
    assert [text for text, *_ in read(tmp_path / "a.zip")] == ["inside"]


@pytest.mark.parametrize(
    ("written", "name", "label"),
    [(b"caf__/1.txt", "café/1.txt".encode(), "café"), (b"pos_1.txt", b"pos\\1.txt", "pos"),
     (b"____/1.txt", "好评/1.txt".encode("gbk"), None)],
)  # fmt: skip
def test_names_in_zips_of_other_systems(written, name, label, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(written.decode(), "a")
        archive.writestr("neg/2.txt", "b")
    path = write_tree(tmp_path, {"a.zip": (tmp_path / "a.zip").read_bytes().replace(written, name)}) / "a.zip"
    if label:
        assert sorted(read(path)) == [("a", label, ""), ("b", "neg", "")]
    else:
        with pytest.raises(ValueError, match=r"unknown encoding.*Extract it"):
            read(path)
