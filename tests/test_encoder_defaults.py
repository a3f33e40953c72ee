"""token_pooling and chunk_prefix that nobody gave: those of the encoder's own files, name or kind, and the log says so."""

import json
import logging
import shutil

import pytest
from transformers import LlamaConfig, LlamaModel, MarianConfig

from modeling.hierarchical_roberta.encoder_defaults import encoder_defaults
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from tests.conftest import assert_refused, tiny_config, train

ROBERTA = tiny_config().encoder_config
LLAMA = LlamaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37)


def old_modes(*names: str) -> dict:
    """As older releases of sentence-transformers write their pooling."""
    fields = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": name in names for name in fields}}


def write_files(folder, pooling: object = None, prompts: dict | None = None, kind: str = "models") -> None:
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"sentence_transformers.{kind}.Transformer"}]
    if pooling is not None:
        modules += [{"idx": 1, "name": "1", "path": "1_Pooling", "type": f"sentence_transformers.{kind}.Pooling"}]
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "modules.json").write_text(json.dumps(modules))
    if prompts is not None:
        content = {"prompts": prompts, "default_prompt_name": None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "files", "config", "expected"),
    [
        # Nothing is known.
        ("roberta-base", None, ROBERTA, ("mean", "")),
        ("tinyllama", None, LLAMA, ("last", "")),
        ("opus-mt", None, MarianConfig(), ("mean", "")),
        # By its files.
        ("any", {"pooling": old_modes("cls_token")}, ROBERTA, ("cls", "")),
        ("any", {"pooling": old_modes("mean_tokens")}, LLAMA, ("mean", "")),
        ("any", {"pooling": old_modes("lasttoken")}, ROBERTA, ("last", "")),
        ("any", {"pooling": {"embedding_dimension": 32, "pooling_mode": "cls"}}, ROBERTA, ("cls", "")),
        (
            "any",
            {"pooling": {"pooling_mode": "lasttoken"}, "kind": "sentence_transformer.modules.pooling"},
            ROBERTA,
            ("last", ""),
        ),
        ("any", {"pooling": {"pooling_mode": ["cls"]}}, ROBERTA, ("cls", "")),
        (
            "any",
            {"prompts": {"query": "search_query: ", "passage": "search_document: "}},
            ROBERTA,
            ("mean", "search_document: "),
        ),
        ("any", {"prompts": {"document": "title: ", "Classification": "task: "}}, LLAMA, ("last", "task: ")),
        ("any", {"prompts": {"query": "Instruct: "}}, ROBERTA, ("mean", "")),
        # Not supported.
        ("any", {"pooling": old_modes("max_tokens")}, ROBERTA, ("mean", "")),
        ("any", {"pooling": old_modes("cls_token", "mean_tokens")}, ROBERTA, ("mean", "")),
        ("any", {"pooling": {"pooling_mode": "weightedmean"}}, LLAMA, ("mean", "")),
        # By its name; files come first, and an empty prompt says nothing.
        ("e5-base-v2", None, ROBERTA, ("mean", "query: ")),
        ("multilingual-e5-large-instruct", None, ROBERTA, ("mean", "")),
        ("bge-small-en-v1.5", None, ROBERTA, ("cls", "")),
        ("bge-multilingual-gemma2", None, LLAMA, ("last", "")),
        ("nomic-embed-text-v1.5", None, ROBERTA, ("mean", "classification: ")),
        ("bge-base-en", {"pooling": old_modes("mean_tokens")}, ROBERTA, ("mean", "")),
        ("e5-small", {"prompts": {"query": "", "document": ""}}, ROBERTA, ("mean", "query: ")),
        ("e5-large", {"prompts": {"passage": "passage: "}}, ROBERTA, ("mean", "passage: ")),
    ],
)
def test_defaults_are_the_encoders_own(name, files, config, expected, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    config.save_pretrained(folder)
    if files is not None:
        write_files(folder, **files)
    chosen = encoder_defaults(str(folder), "main", config)
    assert (chosen["token_pooling"][0], chosen["chunk_prefix"][0]) == expected


@pytest.mark.parametrize("content", ["[{", "[1]", '[{"type": "Pooling"}]'])
def test_a_file_of_another_content_is_named(content, tmp_path):
    ROBERTA.save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(ValueError, match=r"modules\.json"):
        encoder_defaults(str(tmp_path), "main", ROBERTA)


def test_from_encoder_takes_them_unless_given_and_logs_where_from(roberta_folder, tmp_path, caplog):
    folder = shutil.copytree(roberta_folder, tmp_path / "encoder")
    write_files(folder, pooling=old_modes("max_tokens"), prompts={"document": "passage: "})
    for given, expected in (
        ({}, ("mean", "passage: ")),
        ({"token_pooling": None, "chunk_prefix": None}, ("mean", "passage: ")),
        ({"token_pooling": "cls"}, ("cls", "passage: ")),
        ({"chunk_prefix": ""}, ("mean", "")),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model = HierarchicalRobertaForSequenceClassification.from_encoder(str(folder), chunk_length=16, **given)
        assert (model.config.token_pooling, model.config.chunk_prefix) == expected
        [said] = [record for record in caplog.records if record.name.endswith("encoder_defaults")]
        assert repr(expected[0]) in said.message
        assert repr(expected[1]) in said.message
        assert ("max" in said.message) == ("token_pooling" not in given or given["token_pooling"] is None)
    with caplog.at_level(logging.INFO):
        HierarchicalRobertaForSequenceClassification.from_encoder(str(roberta_folder), chunk_length=16)
    assert caplog.records[-1].detail  # of defaults, in training.log alone


def test_a_decoder_pools_its_last_token(tmp_path):
    LlamaModel(LLAMA).save_pretrained(tmp_path)
    assert HierarchicalRobertaForSequenceClassification.from_encoder(str(tmp_path)).config.token_pooling == "last"


@pytest.mark.slow
def test_training_records_resumes_and_hands_on_what_the_encoder_chose(prepared_folder, roberta_folder, tmp_path):
    folder = shutil.copytree(roberta_folder, tmp_path / "encoder")
    write_files(folder, pooling=old_modes("cls_token"), prompts={"classification": "The lamp: "})
    run = tmp_path / "run"
    given = {"num_train_epochs": 1, "chunk_length": 24}
    done = train(prepared_folder, folder, run, **given)
    assert done.returncode == 0, done.stderr
    assert "1_Pooling/config.json" in done.stderr
    saved = json.loads((run / "config.json").read_text())
    recorded = json.loads((run / "training_history.json").read_text())["config"]
    for name, value in (("token_pooling", "cls"), ("chunk_prefix", "The lamp: ")):
        assert saved[name] == recorded[name] == value
    assert saved["num_prefix_tokens"] > 1
    assert "each after `The lamp: `, cls token of each" in (run / "README.md").read_text()
    # Files that are gone, or an option, may not change what a run resumes with.
    resumed = {"resume_from_checkpoint": "auto", "num_train_epochs": 2, "chunk_length": 24}
    done = train(prepared_folder, folder, run, **resumed)
    assert done.returncode == 0, done.stderr
    for extra in ({"token_pooling": "mean"}, {"chunk_prefix": ""}):
        assert_refused(train(prepared_folder, folder, run, **(resumed | extra)), next(iter(extra)), "in checkpoint")
    shutil.rmtree(folder / "1_Pooling")
    assert_refused(train(prepared_folder, folder, run, **resumed), "token_pooling: cls in checkpoint, mean now")
    # A finished run is an encoder with the same.
    done = train(prepared_folder, run, tmp_path / "next", **given)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "next" / "config.json").read_text())
    assert (saved["token_pooling"], saved["chunk_prefix"]) == ("cls", "The lamp: ")
    model = HierarchicalRobertaForSequenceClassification.from_encoder(str(run), chunk_length=24, token_pooling="mean")
    assert (model.config.token_pooling, model.config.chunk_prefix) == ("mean", "The lamp: ")


def test_files_come_from_the_cached_revision_of_a_repository(tmp_path, monkeypatch):
    cache = tmp_path / "models--org--e5-base"
    for revision, commit, mode in (("main", "a" * 40, "cls"), ("older", "b" * 40, "lasttoken")):
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True)
        ROBERTA.save_pretrained(cache / "snapshots" / commit)
        write_files(cache / "snapshots" / commit, pooling={"pooling_mode": mode})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, expected in (("main", "cls"), ("older", "last"), ("b" * 40, "last")):
        chosen = encoder_defaults("org/e5-base", revision, ROBERTA)
        assert (chosen["token_pooling"][0], chosen["chunk_prefix"][0]) == (expected, "query: ")
