"""`--encoder FINISHED_RUN`: its encoder and tokenizer, a new pooling and head for other labels, and none of its code."""

import json

import pytest
from safetensors.torch import load_file

from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.checkpointing import list_checkpoints
from scripts.training.embedding_cache import cache_key
from tests.conftest import run_command, tiny_rows, train, write_csv

pytestmark = pytest.mark.slow

OTHER_LABELS = {"General": "no", "Teen": "no", "Mature": "yes"}


@pytest.fixture
def run_with_code(run_copy, tmp_path):
    """A run whose code, were it executed, would leave a file behind."""
    for file in run_copy.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert "auto_map" in json.loads((run_copy / "config.json").read_text())
    yield run_copy
    assert not (tmp_path / "executed").exists()


def test_run_is_an_encoder_for_other_labels(run_with_code, tmp_path):
    rows = [{**row, "label": OTHER_LABELS[row["label"]]} for row in tiny_rows()]
    source = write_csv(tmp_path / "other.csv", rows)
    done = run_command(
        "scripts.prepare_dataset", source=source, tokenizer=run_with_code, output_dir=tmp_path / "data", labels="no,yes"
    )
    assert done.returncode == 0, done.stderr
    checkpoint = list_checkpoints(str(run_with_code))[-1]
    for encoder in (run_with_code, checkpoint):
        output_dir = tmp_path / f"from_{encoder.name}"
        given = {"freeze_encoder": True, "num_train_epochs": 1, "max_chunks": 3}
        done = train(tmp_path / "data", encoder, output_dir, **given)
        assert done.returncode == 0, done.stderr
        said = [line for line in done.stderr.splitlines() if "Starting from the encoder" in line]
        assert len(said) == 1
        for word in (str(encoder), "General, Teen, Mature", "max_chunks 3", "max_chunks 4"):
            assert word in said[0]
        config = json.loads((output_dir / "config.json").read_text())
        assert "inherited" in done.stderr
        assert config["id2label"] == {"0": "no", "1": "yes"}
        assert (config["max_chunks"], config["model_type"]) == (3, "hierarchical_roberta")
        theirs, ours = load_file(encoder / "model.safetensors"), load_file(output_dir / "model.safetensors")
        encoder_names = [name for name in ours if name.startswith("encoder.")]
        assert len(encoder_names) > 30
        assert all(ours[name].equal(theirs[name]) for name in encoder_names)
        assert ours["classifier.weight"].shape[0] == 2


def test_embeddings_of_a_trained_encoder_are_cached_apart(finished_run, roberta_folder):
    manifest = {"data_fingerprint": "data"}
    models = [
        HierarchicalRobertaForSequenceClassification.from_encoder(str(folder), num_labels=2, chunk_length=16)
        for folder in (roberta_folder, finished_run, finished_run)
    ]
    before, trained, again = (cache_key(model, manifest, "fp32") for model in models)
    assert before != trained == again


@pytest.mark.parametrize("option", [{"token_pooling": "cls"}, {"chunk_prefix": "passage: "}])
def test_embeddings_are_cached_apart_by_what_changes_them(roberta_model, option):
    before, trained = cache_key(roberta_model, {"data_fingerprint": "data"}, "fp32"), roberta_model.config
    trained.update({"pooling": "mean", "chunk_transformer_layers": 1})  # on top of the embeddings
    assert cache_key(roberta_model, {"data_fingerprint": "data"}, "fp32") == before
    trained.update(option)
    assert cache_key(roberta_model, {"data_fingerprint": "data"}, "fp32") != before


def test_run_without_some_of_its_encoder_is_refused(run_copy):
    from safetensors.torch import save_file

    weights = load_file(run_copy / "model.safetensors")
    name = next(name for name in weights if name.startswith("encoder.encoder.layer.1"))
    del weights[name]
    save_file(weights, run_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.removeprefix("encoder.").replace(".", r"\.")):
        HierarchicalRobertaForSequenceClassification.from_encoder(str(run_copy), num_labels=2, chunk_length=16)
