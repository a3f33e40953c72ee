"""Every family of encoders in docs/encoders.md does what its row says, with tiny random weights.

`python -m tests.test_encoder_families` prints the table anew; with names of families, their rows.
"""

import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, pipeline
from transformers.masking_utils import flash_attention_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from modeling.hierarchical_roberta.encoders import UNPADDED, dropout_fields
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.token_attribution import token_attributions
from tests.conftest import ROOT, make_roberta
from tests.encoder_families import POSITIONS, tiny_family
from tests.test_devices import NoFloat64
from tests.test_model import DOCUMENTS, batch_of, reference_attention

COLUMNS = ("Family", "Reads", "Chunks of other lengths", "Dropout", "`--freeze_layers`", "Checkpointing", "Not trained")
TABLE = re.findall(r"^\| `(\S+)` \| (.*) \|$", (ROOT / "docs/encoders.md").read_text(encoding="utf-8"), re.M)
LIVE = [[12, 9, 16], [11], [16, 16, 10], [13, 14]]  # full batches of 32 tokens hold two chunks of equal length
close = partial(torch.testing.assert_close, atol=2e-6, rtol=1e-4)


def build(folder: Path, **options: float) -> HierarchicalRobertaForSequenceClassification:
    torch.manual_seed(0)
    options = {"num_labels": 3, "chunk_length": 16, "token_pooling": "mean"} | options
    return HierarchicalRobertaForSequenceClassification.from_encoder(str(folder), **options)


def row_of(family: str, folder: Path, tokenizer_folder: Path) -> list[str]:
    """What is said of a family; raises AssertionError where it is wrong."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(tiny_family(family))
    for weight in encoder.parameters():
        weight.data *= 5 if weight.ndim > 1 else 1  # so that tokens matter to each other
    encoder.save_pretrained(folder)
    try:
        model = build(folder).eval()
    except ValueError as error:
        assert family in str(error)
        return ["refused: " + re.split(r" \(|\. |: ", str(error).partition(f"({family}) ")[2])[0]]
    check_documents(model)
    check_export(model, folder / "exported", tokenizer_folder)
    check_attributions(model)
    return [
        "both sides" if reads_both_sides(model) else "the left side",
        "in batches of their own" if model.config.equal_lengths else "together",
        check_dropout(folder),
        check_frozen_layers(folder),
        check_gradients(folder),
        str(sum(not weight.requires_grad for weight in model.parameters())),
    ]


@torch.no_grad()
def check_documents(
    model: HierarchicalRobertaForSequenceClassification, documents: list[list[int]] = DOCUMENTS
) -> None:
    """Logits do not depend on other documents, their order, or padding; nor on the way to leave it out."""
    together = model(**batch_of(model, documents)).logits
    close(torch.cat([model(**batch_of(model, [document])).logits for document in documents]), together)
    close(model(**batch_of(model, documents[::-1])).logits.flip(0), together)
    if model.config.encoder_config.model_type in UNPADDED:
        AttentionInterface.register("flash_reference", reference_attention)
        AttentionMaskInterface.register("flash_reference", flash_attention_mask)
        default = model.encoder.config._attn_implementation
        with torch.autocast("cpu", torch.float16):
            model.encoder.config._attn_implementation = "flash_reference"
            unpadded = model(**batch_of(model, documents)).logits
            model.encoder.config._attn_implementation = default
        torch.testing.assert_close(unpadded, together, atol=1e-3, rtol=0)


@torch.no_grad()
def reads_both_sides(model: HierarchicalRobertaForSequenceClassification) -> bool:
    ids = batch_of(model, [[16]])["input_ids"]
    changed = torch.cat([ids[:, :1], ids[:, 1:2] % 90 + 5, ids[:, 2:]], dim=1)
    first, second = (model.encoder(input_ids=each).last_hidden_state[0, 0] for each in (ids, changed))
    return not torch.allclose(first, second, atol=1e-6)


def gradients(model: HierarchicalRobertaForSequenceClassification, live_chunks: int) -> dict[str, torch.Tensor]:
    model.live_chunks, model.token_budget = live_chunks, 32
    model.zero_grad()
    model.train()(**batch_of(model, LIVE), labels=torch.tensor([0, 1, 2, 1])).loss.backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight.grad for name, weight in trained.items()}


def check_gradients(folder: Path) -> str:
    """Every trained parameter has a gradient: the same with one live chunk, and with activation checkpointing."""
    model = build(folder, dropout=0.0)
    for config, name in dropout_fields(model.config.encoder_config):
        setattr(config, name, type(getattr(config, name))(0))
    model = HierarchicalRobertaForSequenceClassification(model.config)
    model.load_state_dict(build(folder).state_dict())
    model.check_encoder()
    expected = gradients(model, 1000)
    scarce = [name for name in expected if "expert" in name or "router" in name or ".gate." in name]
    assert [name for name, gradient in expected.items() if gradient is None and name not in scarce] == []
    expected = {name: gradient for name, gradient in expected.items() if gradient is not None}
    others = [gradients(model, 1)]
    supported = model.encoder.supports_gradient_checkpointing
    if supported:
        model.gradient_checkpointing_enable()
        others.append(gradients(model, 1000))
    for other in others:
        for name, gradient in expected.items():
            close(other[name], gradient, msg=lambda message, name=name: f"{name}: {message}")
    return "yes" if supported else "no"


def check_dropout(folder: Path) -> str:
    """Both dropouts reach the modules and, switched off, leave nothing to chance."""
    kinds = {"att" in name for _, name in dropout_fields(build(folder).config.encoder_config)}
    options = {"dropout": 0.3} if False in kinds else {}
    options |= {"attention_dropout": 0.2} if True in kinds else {}
    model = build(folder, **options)
    modules = {part.p for part in model.encoder.modules() if isinstance(part, nn.Dropout)}
    assert modules <= {0.0, *options.values()}, modules
    for name in {"dropout", "attention_dropout"} - set(options):
        with pytest.raises(ValueError, match=f"has no .*leave --{name} out"):
            build(folder, **options | {name: 0.1})
    model = build(folder, dropout=0.0, attention_dropout=0.0).train()
    batch = batch_of(model, DOCUMENTS)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    if not options:
        return "none"
    model = build(folder, **options).train()
    assert not torch.equal(*(model.encode_chunks(batch["input_ids"], batch["attention_mask"]) for _ in range(2)))
    return {1: "one for all" if False in kinds else "attention only", 2: "both"}[len(options)]


def check_frozen_layers(folder: Path) -> str:
    """The first layer and what precedes it get no gradients and keep no activations; what follows does."""
    model = build(folder)
    if not model.encoder_layers():
        with pytest.raises(ValueError, match="freeze_layers"):
            model.freeze_layers(1)
        return "no"

    def num_saved() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.train()(**batch_of(model, [[16] * 8]), labels=torch.tensor([1])).loss.backward()
        return sum(sizes)

    everything = num_saved()
    model.zero_grad()
    model.freeze_layers(1)
    assert num_saved() < 0.75 * everything
    moved = {name for name, weight in model.encoder.named_parameters() if weight.grad is not None}
    first, second = ({id(weight) for weight in layer.parameters()} for layer in model.encoder_layers()[:2])
    ids = {id(weight): name for name, weight in model.encoder.named_parameters()}
    assert not moved & {ids[weight] for weight in first if weight not in second}
    assert moved & {ids[weight] for weight in second}
    assert not model.encoder.get_input_embeddings().weight.requires_grad
    model.freeze_layers(len(model.encoder_layers()))
    assert model.encoder_is_frozen
    return "yes"


def check_export(
    model: HierarchicalRobertaForSequenceClassification,
    folder: Path,
    tokenizer_folder: Path,
    documents: list[list[int]] = DOCUMENTS,
) -> None:
    """The exported model is the same elsewhere, and rates a text, also on a device without float64."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder)
    rate = pipeline("text-classification", model=str(folder), trust_remote_code=True)
    batch = batch_of(model, documents)
    with torch.no_grad():
        close(rate.model(**batch).logits, model(**batch).logits)
    assert rate.model.config.equal_lengths == model.config.equal_lengths
    with NoFloat64():
        assert set(rate("Nobody spoke of the murder again. " * 5)[0]["scores"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}


def check_attributions(model: HierarchicalRobertaForSequenceClassification) -> None:
    """Integrated gradients of a chunk's tokens are there for every encoder."""
    batch = batch_of(model, [[12, 12]])
    chunk_CD = model.encode_chunks(batch["input_ids"]).detach()
    blank = batch["input_ids"][0].clone()
    blank[2:-1] = 3
    attribution = token_attributions(model, batch["input_ids"][0], blank, chunk_CD, 0, 1)
    assert attribution.isfinite().all()
    assert attribution.abs().sum() > 0
    assert attribution[:2].abs().sum() == 0  # they are not blanked


@pytest.fixture(scope="module")
def tokenizer_folder(roberta_folder):
    return roberta_folder


@pytest.mark.parametrize(("family", "row"), TABLE, ids=[family for family, _ in TABLE])
def test_family(family, row, tmp_path, tokenizer_folder):
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip("not in this release of transformers")
    assert row_of(family, tmp_path / "encoder", tokenizer_folder) == row.split(" | ")


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONG = {
    "bigbird_pegasus": {},  # block-sparse from 28 tokens on
    "led": {},
    "llama": {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 32, "factor": 2.0}},
    "longt5": {"encoder_attention_type": "transient-global", "local_radius": 7, "global_block_size": 4},
    "modernbert": {},
}


@pytest.mark.parametrize("family", LONG)
def test_chunks_longer_than_windows_and_pretraining(family, tmp_path, tokenizer_folder):
    torch.manual_seed(0)
    config = tiny_family(family)
    for name, value in LONG[family].items():
        setattr(config, name, value)
    AutoModel.from_config(config).save_pretrained(tmp_path / "encoder")
    model = build(tmp_path / "encoder", chunk_length=POSITIONS).eval()
    check_documents(model, [[POSITIONS, 9], [30], [12, 47]])
    check_export(model, tmp_path / "exported", tokenizer_folder, [[POSITIONS, POSITIONS]])


def test_chunk_length_beyond_the_positions_of_an_encoder_decoder(tmp_path):
    config = tiny_family("led")
    config.max_encoder_position_embeddings = POSITIONS
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"exceeds the encoder's {POSITIONS} positions"):
        build(tmp_path, chunk_length=POSITIONS + 1)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_weights_are_fp32_whatever_the_precision_of_the_checkpoint(family, tmp_path):
    AutoModel.from_config(tiny_family(family)).bfloat16().save_pretrained(tmp_path / "encoder")
    model = build(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "exported")
    for each in (model, type(model).from_pretrained(tmp_path / "exported")):
        assert {weight.dtype for weight in each.parameters()} == {torch.float32}


def test_encoder_of_non_finite_weights(roberta_folder, tmp_path):
    encoder = AutoModel.from_pretrained(roberta_folder)
    encoder.encoder.layer[1].output.dense.weight.data[0, 0] = torch.nan
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(roberta\) gives non-finite vectors"):
        build(tmp_path)


def test_parameters_are_trained_where_the_model_was_built_without_gradients(roberta_folder):
    def trained(model: HierarchicalRobertaForSequenceClassification) -> list[str]:
        model.freeze_layers(1)
        return [name for name, weight in model.named_parameters() if weight.requires_grad]

    expected = trained(build(roberta_folder))
    with torch.no_grad():
        assert trained(build(roberta_folder)) == expected


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    make_roberta(folder / "roberta")
    for family in sys.argv[1:] or [family for family, _ in TABLE]:
        try:
            print(f"| `{family}` | {' | '.join(row_of(family, folder / family, folder / 'roberta'))} |", flush=True)
        except Exception as error:
            print(f"{family}: {type(error).__name__} {str(error)[:300]}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
