"""scripts.prepare_dataset as a person runs it: what it writes, refuses and leaves behind."""

import json

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from data.prepared_dataset import load_prepared, num_tokens_of, remove_stale_staging, staging_path
from tests.conftest import LABELS, run_command, tiny_rows, write_csv


def test_the_manifest_tells_what_was_prepared(prepared_folder, csv_file):
    manifest = json.loads((prepared_folder / "manifest.json").read_text())
    assert manifest["labels"] == LABELS
    assert manifest["sources"][0]["name"] == csv_file.name
    assert len(manifest["tokenizer"]["fingerprint"]) == 64
    assert sum(about["documents"] for about in manifest["splits"].values()) == 60
    assert manifest["splits"]["train"]["labels"] == {"General": 24, "Teen": 16, "Mature": 8}
    assert set(manifest["splits"]["test"]["coverage"]) >= {"documents_cut_share", "tokens_cut_share"}


def test_tokens_text_and_offsets_belong_together(splits, roberta_folder):
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


def test_the_older_tensors_give_the_same_tokens(prepared_folder, roberta_folder, tmp_path):
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


def test_a_pickle_that_would_run_code_is_refused(roberta_folder, tmp_path):
    torch.save({"input_ids": Evil()}, tmp_path / "train_dataset.pt")
    done = run_command(
        "scripts.prepare_dataset", source=tmp_path, tokenizer=roberta_folder, output_dir=tmp_path / "out"
    )
    assert done.returncode == 1
    assert "code was run" not in done.stdout + done.stderr
    assert "train_dataset.pt" in done.stderr
    assert "Traceback" not in done.stderr


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
def test_mistakes_are_told_in_a_paragraph_and_leave_nothing(arguments, message, csv_file, roberta_folder, tmp_path):
    given = {
        "source": csv_file,
        "tokenizer": roberta_folder,
        "output_dir": tmp_path / "out",
        "labels": ",".join(LABELS),
    }
    done = run_command("scripts.prepare_dataset", **{**given, **arguments})
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_under_this_processs_own_number_is_from_before(tmp_path):
    left = staging_path(tmp_path / "data", "documents")  # in a container the numbers come again
    left.mkdir()
    remove_stale_staging(tmp_path / "data")
    assert not left.exists()


def test_a_traceback_is_there_for_who_asks(roberta_folder, tmp_path):
    given = {"source": tmp_path / "none.csv", "tokenizer": roberta_folder, "output_dir": tmp_path / "out"}
    assert "Traceback" not in run_command("scripts.prepare_dataset", **given).stderr
    traced = run_command("scripts.prepare_dataset", log_level="debug", **given).stderr
    assert "Traceback" in traced
    assert "none.csv" in traced.splitlines()[-1]


def test_a_folder_that_is_there_is_not_overwritten_unasked(prepared_folder, csv_file, roberta_folder):
    given = {"source": csv_file, "tokenizer": roberta_folder, "output_dir": prepared_folder, "labels": ",".join(LABELS)}
    done = run_command("scripts.prepare_dataset", **given)
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    other = prepared_folder.parent / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    done = run_command("scripts.prepare_dataset", "--overwrite", **{**given, "output_dir": other})
    assert done.returncode == 1
    assert (other / "precious.txt").read_text() == "mine"
    before = (prepared_folder / "manifest.json").read_text()
    done = run_command("scripts.prepare_dataset", "--overwrite", **given)
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(before)["data_fingerprint"]
        == json.loads((prepared_folder / "manifest.json").read_text())["data_fingerprint"]
    )


def test_an_unknown_tokenizer_or_a_changed_file_is_named_before_training(prepared_folder, bert_folder, tmp_path):
    import shutil

    with pytest.raises(ValueError, match="--tokenizer"):
        load_prepared(str(prepared_folder), AutoTokenizer.from_pretrained(bert_folder))
    copied = shutil.copytree(prepared_folder, tmp_path / "copy")
    arrow = next(copied.rglob("*.arrow"))
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
