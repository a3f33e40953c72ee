"""scripts.prepare_dataset as a person runs it: what it writes, refuses and leaves behind."""

import json
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data.preparation import describe_source
from data.prepared_dataset import load_prepared, num_tokens_of, remove_stale_staging, staging_path
from scripts.common.cli import USER_ERRORS
from scripts.prepare_dataset import main as prepare_main
from tests.conftest import LABELS, assert_refused, options, run_command, tiny_rows, write_csv
from tests.processes import ROOT, run


def test_manifest_describes_what_was_prepared(prepared_folder, csv_file):
    manifest = json.loads((prepared_folder / "manifest.json").read_text())
    assert manifest["labels"] == LABELS
    assert manifest["sources"][0]["name"] == csv_file.name
    assert len(manifest["tokenizer"]["fingerprint"]) == 64
    assert sum(about["documents"] for about in manifest["splits"].values()) == 60
    assert manifest["splits"]["train"]["labels"] == {"General": 24, "Teen": 16, "Mature": 8}
    assert set(manifest["splits"]["test"]["coverage"]) >= {"documents_cut_share", "tokens_cut_share"}


def test_tokens_text_and_offsets_agree(splits, roberta_folder):
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    for part in splits.values():
        for row in part:
            assert row["input_ids"] == tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            middle = len(row["input_ids"]) // 2
            piece = row["text"][row["token_start"][middle] : row["token_end"][middle]]
            assert piece == tokenizer.decode(row["input_ids"][middle]).strip()
    assert num_tokens_of(splits["train"]).tolist() == [len(ids) for ids in splits["train"]["input_ids"]]


def test_several_processes_prepare_the_same(prepared_folder, csv_file, roberta_folder, tmp_path):
    done = run_command(
        "scripts.prepare_dataset",
        source=csv_file,
        tokenizer=roberta_folder,
        output_dir=tmp_path / "two",
        labels=",".join(LABELS),
        num_proc=2,
    )
    assert done.returncode == 0, done.stderr
    one, two = load_prepared(str(prepared_folder))[0], load_prepared(str(tmp_path / "two"))[0]
    assert {split: part.to_list() for split, part in one.items()} == {
        split: part.to_list() for split, part in two.items()
    }


def save_legacy(folder, roberta_folder, prepared_folder):
    """The older form: padded tensors (documents, chunks, tokens)."""
    from data.chunk_dataset import ChunkedDocuments

    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    folder.mkdir()
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        part = load_prepared(str(prepared_folder))[0][split]
        chunked = ChunkedDocuments(part, tokenizer, chunk_length=16, max_chunks=100)
        most = max(len(document["input_ids"]) for document in chunked)
        ids = torch.full((len(part), most, 16), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, document in enumerate(chunked):
            for j, chunk in enumerate(document["input_ids"]):
                ids[i, j, : len(chunk)], mask[i, j, : len(chunk)] = torch.as_tensor(chunk), 1
        torch.save(
            {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(part["label"])},
            folder / f"{name}_dataset.pt",
        )
    return folder


def test_legacy_tensors_give_the_same_tokens(prepared_folder, roberta_folder, tmp_path):
    legacy = save_legacy(tmp_path / "legacy", roberta_folder, prepared_folder)
    done = run_command(
        "scripts.prepare_dataset",
        source=legacy,
        tokenizer=roberta_folder,
        output_dir=tmp_path / "new",
        labels=",".join(LABELS),
    )
    assert done.returncode == 0, done.stderr
    old, new = load_prepared(str(prepared_folder))[0], load_prepared(str(tmp_path / "new"))[0]
    assert new["train"].features["label"].names == LABELS
    for split in old:
        assert new[split]["input_ids"] == old[split]["input_ids"]
        assert new[split]["label"] == old[split]["label"]
    direct, _ = load_prepared(str(legacy), AutoTokenizer.from_pretrained(roberta_folder))
    assert direct["test"]["input_ids"] == old["test"]["input_ids"]


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def test_legacy_pickle_that_would_run_code_is_refused(roberta_folder, tmp_path):
    torch.save({"input_ids": Evil()}, tmp_path / "train_dataset.pt")
    done = run_command(
        "scripts.prepare_dataset", source=tmp_path, tokenizer=roberta_folder, output_dir=tmp_path / "out"
    )
    assert_refused(done, r"train_dataset\.pt")
    assert "code was run" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "General,Teen"}, "[unknown_label]"),
        ({"text_column": "body"}, "--text_column body"),
        ({"group_column": "author"}, "--group_column author"),
        ({"tokenizer": "no/such"}, "no/such"),
        ({"drop": "typos"}, "--drop"),
        ({"chunk_overlap": 600}, "chunk_overlap"),
        ({"max_chunks": 0}, "max_chunks"),
        ({"split_fractions": "0.5,0.4"}, "fractions"),
        ({"seed": "x"}, "--seed"),
    ],
)
def test_mistaken_option_is_named_and_leaves_nothing(
    arguments, message, csv_file, roberta_folder, tmp_path, call_command
):
    given = {
        "source": csv_file,
        "tokenizer": roberta_folder,
        "output_dir": tmp_path / "out",
        "labels": ",".join(LABELS),
    }
    with pytest.raises(USER_ERRORS) as error:
        call_command(prepare_main, **{**given, **arguments})
    assert message in " ".join(str(error.value).split())
    assert list(tmp_path.iterdir()) == []


def test_mistake_ends_prepare_with_a_paragraph_and_status_1(csv_file, roberta_folder, tmp_path):
    given = {"source": csv_file, "tokenizer": roberta_folder, "output_dir": tmp_path / "out", "labels": "General,Teen"}
    command = [sys.executable, "-m", "scripts.prepare_dataset", *options(**given)]
    assert_refused(run(command, cwd=ROOT, cold=True), r"\[unknown_label\]")
    assert list(tmp_path.iterdir()) == []


def test_remove_stale_staging_takes_what_has_this_process_id_too(tmp_path):
    left = staging_path(tmp_path / "data", "documents")  # in a container the numbers come again
    left.mkdir()
    remove_stale_staging(tmp_path / "data")
    assert not left.exists()


def test_log_level_debug_shows_the_traceback(roberta_folder, tmp_path):
    given = {"source": tmp_path / "none.csv", "tokenizer": roberta_folder, "output_dir": tmp_path / "out"}
    assert "Traceback" not in run_command("scripts.prepare_dataset", **given).stderr
    traced = run_command("scripts.prepare_dataset", log_level="debug", **given).stderr
    assert "Traceback" in traced
    assert "none.csv" in traced.partition("Traceback")[2]  # some libraries print lines of their own at the end


def test_output_dir_that_is_there_is_not_overwritten_unasked(prepared_folder, csv_file, roberta_folder, tmp_path):
    ours = shutil.copytree(prepared_folder, tmp_path / "ours")
    given = {"source": csv_file, "tokenizer": roberta_folder, "labels": ",".join(LABELS)}
    assert_refused(run_command("scripts.prepare_dataset", output_dir=ours, **given), "--overwrite")
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    assert_refused(run_command("scripts.prepare_dataset", "--overwrite", output_dir=other, **given))
    assert (other / "precious.txt").read_text() == "mine"
    done = run_command("scripts.prepare_dataset", "--overwrite", output_dir=ours, **given)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((path / "manifest.json").read_text()) for path in (prepared_folder, ours))
    assert before["data_fingerprint"] == after["data_fingerprint"]


def test_load_prepared_names_another_tokenizer_and_changed_files(prepared_folder, bert_folder, tmp_path):
    with pytest.raises(ValueError, match="--tokenizer"):
        load_prepared(str(prepared_folder), AutoTokenizer.from_pretrained(bert_folder))
    copied = shutil.copytree(prepared_folder, tmp_path / "copy")
    arrow = next((copied / "train").glob("data-*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-100])
    with pytest.raises(ValueError, match=arrow.name.replace(".", r"\.")):
        load_prepared(str(copied))
    for content, lacks in (("{", "JSON"), ("{}", "files, tokenizer, sources, data_fingerprint")):
        (copied / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=lacks):
            load_prepared(str(copied))
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_prepared(str(tmp_path))


def test_label_order_is_the_one_given_or_that_of_the_names(roberta_folder, tmp_path):
    rows = [{**row, "label": {"General": "10", "Teen": "9", "Mature": "2"}[row["label"]]} for row in tiny_rows()]
    source = write_csv(tmp_path / "numbers.csv", rows)
    done = run_command("scripts.prepare_dataset", source=source, tokenizer=roberta_folder, output_dir=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "--labels" in done.stdout
    part = datasets.load_from_disk(str(tmp_path / "out"))["train"]
    assert part.features["label"].names == ["2", "9", "10"]
    assert np.bincount(part["label"]).tolist() == [8, 16, 24]


def test_the_files_of_a_pattern_are_described(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    before = describe_source(str(tmp_path / "*.csv"))
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    assert (before["name"], before["files"][0]["name"]) == (
        "*.csv",
        "a.csv",
    )  # no path of this machine: it may be pushed
    assert describe_source(str(tmp_path / "*.csv")) != before
