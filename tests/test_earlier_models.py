"""A model saved by an earlier commit of this project still gives the scores that it gave then.

Each folder of tests/earlier_models is named after its commit: a finished run on tiny data, and what `scripts.predict` said there.
"""

import json

import pytest
from transformers import pipeline

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from scripts.common.loading import load_classifier
from scripts.predict import main as predict_main
from tests.conftest import ROOT

FOLDERS = sorted((ROOT / "tests/earlier_models").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_model_of_an_earlier_commit_predicts_what_it_did(folder, tmp_path, call_command, capsys):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    (tmp_path / "text.txt").write_text(expected["text"], encoding="utf-8")
    call_command(predict_main, model=folder, source=tmp_path / "text.txt")
    result = json.loads(capsys.readouterr().out)
    assert (result["label"], result["num_chunks"]) == (expected["label"], expected["num_chunks"])
    assert result["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    # Saved anew, it brings today's code, with which anyone can load it.
    model, tokenizer = load_classifier(str(folder))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    rate = pipeline("text-classification", model=str(tmp_path / "saved"), trust_remote_code=True)
    assert rate(expected["text"])[0]["scores"] == pytest.approx(expected["scores"], abs=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_encoder_is_where_training_can_start(folder):
    model = HierarchicalRobertaForSequenceClassification.from_encoder(str(folder), num_labels=4, chunk_length=32)
    theirs = load_classifier(str(folder))[0].encoder.state_dict()
    assert all((value == theirs[name]).all() for name, value in model.encoder.state_dict().items())
