"""The model: a document's logits are its own, memory tricks change nothing, and it loads anywhere."""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForSequenceClassification, DistilBertConfig, ViTConfig, ViTModel

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification,
    plan_encoder_batches,
)
from tests.conftest import tiny_config

Model = HierarchicalRobertaForSequenceClassification


def batch_of(model, documents: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random chunks of the given lengths; the same document has the same tokens wherever it stands."""
    pad = getattr(model.config.encoder_config, "pad_token_id", None) or 0
    lengths = [length for document in documents for length in document]
    input_ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + 31 * length)
        input_ids[row, :length] = torch.randint(5, 99, (length,), generator=generator)
        mask[row, :length] = 1
    num_chunks = torch.tensor([len(document) for document in documents])
    return {"input_ids": input_ids, "attention_mask": mask, "num_chunks": num_chunks}


DOCUMENTS = [[12, 9, 16], [2], [16, 16, 7, 5, 11], [3, 14]]


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
@pytest.mark.parametrize("layers", [0, 1])
def test_logits_do_not_depend_on_neighbours_padding_or_order(model, pooling, layers):
    torch.manual_seed(2)
    config = HierarchicalRobertaConfig(
        **{**model.config.to_dict(), "pooling": pooling, "chunk_transformer_layers": layers}
    )
    model = Model(config).eval()
    together = model(**batch_of(model, DOCUMENTS)).logits
    alone = torch.cat([model(**batch_of(model, [document])).logits for document in DOCUMENTS])
    reversed_ = model(**batch_of(model, DOCUMENTS[::-1])).logits.flip(0)
    padded = batch_of(model, DOCUMENTS)
    pad = model.config.encoder_config.pad_token_id
    padded["input_ids"] = torch.nn.functional.pad(padded["input_ids"], (0, 9), value=pad)
    padded["attention_mask"] = torch.nn.functional.pad(padded["attention_mask"], (0, 9))
    for other in (alone, reversed_, model(**padded).logits):
        torch.testing.assert_close(other, together, atol=1e-6, rtol=1e-5)


def test_the_order_of_chunks_matters_only_to_the_chunk_transformer(model):
    swapped = [DOCUMENTS[0][::-1]]
    plain = model.eval()(**batch_of(model, [DOCUMENTS[0]])).logits
    torch.testing.assert_close(model(**batch_of(model, swapped)).logits, plain, atol=1e-6, rtol=1e-5)
    torch.manual_seed(0)
    layered = Model(tiny_config(chunk_transformer_layers=1)).eval()
    one, other = (layered(**batch_of(layered, documents)).logits for documents in ([DOCUMENTS[0]], swapped))
    assert (one - other).abs().max() > 1e-5


def test_weights_of_a_documents_chunks_sum_to_one(model):
    weights = model.eval()(**batch_of(model, DOCUMENTS)).chunk_weights.split([3, 1, 5, 2])
    assert [round(w.sum().item(), 5) for w in weights] == [1.0] * 4


@pytest.mark.parametrize("token_budget", [1, 20, 64, 4096])
def test_encoder_batches_change_nothing(model, token_budget):
    expected = model.eval()(**batch_of(model, DOCUMENTS)).logits
    model.token_budget = token_budget
    torch.testing.assert_close(model(**batch_of(model, DOCUMENTS)).logits, expected, atol=1e-6, rtol=1e-5)


def test_the_plan_of_encoder_batches_holds_each_chunk_once_within_the_budget():
    lengths = [5, 16, 3, 16, 9, 2, 2, 11]
    plan = plan_encoder_batches(lengths, token_budget=32, batch_cost=8, live_chunks=3)
    assert sorted(row for rows in plan for row in rows) == list(range(8))
    assert all(len(rows) * max(lengths[row] for row in rows) <= 32 and len(rows) <= 3 for rows in plan)
    assert plan_encoder_batches([100], token_budget=1, batch_cost=0) == [[0]]
    # Padding of 12 tokens is dearer than another batch that costs 8, and cheaper than one that costs 16.
    assert plan_encoder_batches([16, 16, 4], token_budget=64, batch_cost=8) == [[0, 1], [2]]
    assert plan_encoder_batches([16, 16, 4], token_budget=64, batch_cost=16) == [[0, 1, 2]]


def test_encoder_batches_suit_the_device(roberta_model):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert roberta_model.encoder_batch_size() == roberta_model.encoder_batch_size(cpu) == (4096, 64)
    assert roberta_model.encoder_batch_size(cuda) == (16384, 2048)
    roberta_model.live_chunks = 16
    assert roberta_model.encoder_batch_size(cuda) == (4096, 2048)
    roberta_model.token_budget = 512
    assert roberta_model.encoder_batch_size(cuda) == (512, 2048)


LONG_CHUNKS = [[12, 9, 16], [11], [16, 16, 10], [13, 14]]  # two of them fill a micro-batch of 32 tokens


def gradients(model, live_chunks: int, token_budget: int = 32, bf16: bool = False) -> dict[str, torch.Tensor]:
    model.live_chunks, model.token_budget = live_chunks, token_budget
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.train()(**batch_of(model, LONG_CHUNKS), labels=torch.tensor([0, 1, 2, 1])).loss
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_encoded_again_give_the_same_gradients_bit_for_bit_with_dropout_on(roberta_folder, bf16, checkpointing):
    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.2, attention_dropout=0.2)
    if checkpointing:
        model.gradient_checkpointing_enable()
    # Two chunks a micro-batch in all: 1000 keeps them alive, 2 and 4 encode some or all micro-batches again.
    kept, again, some = (gradients(model, live_chunks, bf16=bf16) for live_chunks in (1000, 2, 4))
    assert all(torch.equal(kept[name], again[name]) and torch.equal(kept[name], some[name]) for name in kept)


@pytest.mark.parametrize(("live_chunks", "token_budget"), [(1, 32), (3, 32), (5, 64), (0, 16), (0, 4096)])
def test_other_encoder_batches_give_the_same_gradients_to_rounding(roberta_model, live_chunks, token_budget):
    expected, other = gradients(roberta_model, 0), gradients(roberta_model, live_chunks, token_budget)
    for name in expected:
        torch.testing.assert_close(other[name], expected[name], atol=1e-6, rtol=1e-4)


def test_chunks_encoded_again_under_the_fp16_scaler(roberta_folder):
    """fp16 has a scaler, which finds infinite gradients and skips the step: with either, the same steps happen."""
    ends = []
    for live_chunks in (0, 2):
        torch.manual_seed(3)
        model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.2)
        model.live_chunks, model.token_budget = live_chunks, 32
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # So large a scale at first overflows: the first step is skipped and the scale halved until it fits.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
        torch.nn.init.normal_(model.classifier.weight)
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model.train()(**batch_of(model, LONG_CHUNKS), labels=torch.tensor([0, 1, 2, 1])).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append((scaler.get_scale(), model.state_dict()))
    assert ends[0][0] == ends[1][0] < 2.0**22
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_the_encoder_keeps_no_activations_beyond_the_live_chunks(roberta_model):
    saved = []
    documents = batch_of(roberta_model, [[16] * 40])

    def num_saved(live_chunks: int) -> int:
        saved.clear()
        roberta_model.live_chunks, roberta_model.token_budget = live_chunks, 32
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            roberta_model.train()(**documents, labels=torch.tensor([0]))
        return sum(saved)

    assert num_saved(4) < num_saved(0) / 4
    assert num_saved(40) == num_saved(0)  # within the bound nothing is encoded twice


def test_a_frozen_encoder_is_still_and_trains_nothing(roberta_folder):
    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.3)
    everything = model.count_trainable_parameters()
    model.freeze_encoder()
    model.train()
    batch = batch_of(model, DOCUMENTS)
    first, second = (model.encode_chunks(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
    assert torch.equal(first, second)
    model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert model.classifier.weight.grad is not None
    assert 0 < model.count_trainable_parameters() < everything


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_frozen_layers_keep_nothing_and_move_nothing(roberta_folder, kind):
    if kind == "roberta":
        model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.3)
    else:
        sizes = {"dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
        model = Model(
            HierarchicalRobertaConfig(encoder_config=DistilBertConfig(vocab_size=400, **sizes), chunk_length=16)
        )

    def saved() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.train()(**batch_of(model, [[16] * 8]), labels=torch.tensor([1])).loss
        loss.backward()
        return sum(sizes)

    everything = saved()
    model.zero_grad()
    model.freeze_layers(1)
    assert saved() < 0.6 * everything
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("layer.1." in name for name in trained)
    assert not any("layer.0." in name or "embeddings" in name for name in trained)
    with pytest.raises(ValueError, match=r"freeze_layers.*\b2\b.*\b3\b"):
        model.freeze_layers(3)


def reference_attention(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """What flash attention does with cumulative lengths: every chunk attends to itself."""
    assert attention_mask is None
    if cu_seq_lens_q is None:
        parts = [torch.nn.functional.scaled_dot_product_attention(query, key, value)]
    else:
        ends = cu_seq_lens_q.tolist()
        parts = [
            torch.nn.functional.scaled_dot_product_attention(*(x[:, :, start:end] for x in (query, key, value)))
            for start, end in itertools.pairwise(ends)
        ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("token_pooling", ["mean", "cls", "last"])
def test_the_unpadded_path_gives_what_the_padded_one_gives(model, token_pooling):
    """The kernel itself needs a GPU; what it is given does not. In fp16, since in fp32 the padded path stands in."""
    AttentionInterface.register("flash_reference", reference_attention)
    model.config.token_pooling = token_pooling
    with torch.autocast("cpu", torch.float16):
        expected = model.eval()(**batch_of(model, DOCUMENTS)).logits
        model.encoder.config._attn_implementation = "flash_reference"
        unpadded = model(**batch_of(model, DOCUMENTS)).logits
    torch.testing.assert_close(unpadded, expected, atol=2e-4, rtol=0)
    assert not torch.equal(unpadded, expected)  # it was another path


@pytest.mark.parametrize("token_pooling", ["mean", "cls", "last"])
def test_a_chunk_vector_is_pooled_from_the_chunks_own_tokens(model, token_pooling):
    """With padding, without any, with a mask or none, and beside the dummy batch of a rank that has fewer."""
    model = Model(HierarchicalRobertaConfig(**{**model.config.to_dict(), "token_pooling": token_pooling})).eval()

    def encoded(lengths: list[int], with_mask: bool = True) -> torch.Tensor:
        batch = batch_of(model, [lengths])
        mask = batch["attention_mask"] if with_mask else None
        return model.encode_chunks(batch["input_ids"], mask).detach()

    def pooled(length: int) -> torch.Tensor:
        [token_LD] = model.encoder(batch_of(model, [[length]])["input_ids"]).last_hidden_state.detach()
        return {"mean": token_LD.mean(dim=0), "cls": token_LD[0], "last": token_LD[-1]}[token_pooling]

    expected = {length: pooled(length) for length in (5, 9, 16)}
    cases = [([16, 5, 9, 5], True), ([9, 9], True), ([9, 9], False)]
    for agree in (None, lambda recomputes: [*recomputes, True]):
        model.agree_on_batches = agree
        for lengths, with_mask in cases:
            rows = torch.stack([expected[length] for length in lengths])
            torch.testing.assert_close(encoded(lengths, with_mask), rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize("token_pooling", ["cls", "last"])
def test_gradients_of_pooled_tokens_do_not_depend_on_recomputation_or_other_ranks(roberta_model, token_pooling):
    roberta_model.config.token_pooling = token_pooling
    kept, again = (gradients(roberta_model, live_chunks) for live_chunks in (1000, 2))
    roberta_model.agree_on_batches = lambda recomputes: [*recomputes, True]
    agreed = gradients(roberta_model, 2)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    for name in kept:
        torch.testing.assert_close(agreed[name], kept[name], atol=1e-6, rtol=1e-4)


def test_an_export_from_before_token_pooling_and_prefixes_loads_as_it_was(roberta_model, tmp_path):
    roberta_model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["token_pooling"], saved["chunk_prefix"], saved["num_prefix_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    batch = batch_of(roberta_model, DOCUMENTS)
    assert torch.equal(Model.from_pretrained(tmp_path)(**batch).logits, roberta_model.eval()(**batch).logits)


def test_chunk_vectors_stand_for_their_tokens(model):
    batch = batch_of(model.eval(), DOCUMENTS)
    whole = model(**batch)
    again = model(chunk_vectors=whole.chunk_vectors, num_chunks=batch["num_chunks"])
    assert torch.equal(whole.logits, again.logits)
    with pytest.raises(ValueError, match=r"input_ids.*chunk_vectors"):
        model(num_chunks=batch["num_chunks"])


def test_gradient_checkpointing_inside_the_encoder_changes_no_gradient(roberta_model):
    plain = gradients(roberta_model, 0)
    roberta_model.gradient_checkpointing_enable()
    checkpointed = gradients(roberta_model, 0)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_it_loads_from_its_own_folder_without_this_project(model, tmp_path):
    model.config.token_pooling = "last"
    model.eval().save_pretrained(tmp_path / "saved")
    batch = batch_of(model, DOCUMENTS)
    torch.save({"batch": batch, "logits": model(**batch).logits}, tmp_path / "expected.pt")
    moved = tmp_path / "elsewhere" / "model"
    shutil.move(tmp_path / "saved", moved)
    code = (
        "import sys, torch\n"
        "from transformers import AttentionInterface, AutoModelForSequenceClassification\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "assert torch.equal(model(**expected['batch']).logits, expected['logits'])\n"
        "assert 'modeling' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(moved), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert isinstance(Model.from_pretrained(moved), Model)
    assert (
        AutoModelForSequenceClassification.from_pretrained(moved, trust_remote_code=True).config.pooling == "attention"
    )


def test_a_checkpoint_whose_encoder_weights_are_named_otherwise_is_refused(roberta_folder, tmp_path):
    shutil.copytree(roberta_folder, tmp_path / "renamed")
    weights = load_file(tmp_path / "renamed" / "model.safetensors")
    renamed = {f"backbone.{name}": value for name, value in weights.items()}
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"renamed.*\d+.*weights"):
        Model.from_encoder(str(tmp_path / "renamed"), num_labels=3, chunk_length=16)


def test_dropouts_are_set_where_the_encoder_keeps_them(roberta_folder):
    model = Model.from_encoder(str(roberta_folder), num_labels=2, chunk_length=16, dropout=0.25, attention_dropout=0.0)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    attention = {name: rate for name, rate in rates.items() if "attention.self" in name}
    assert set(attention.values()) == {0.0}
    assert {rate for name, rate in rates.items() if name not in attention} == {0.25}


def test_an_encoder_without_a_pooler(tmp_path):
    config = DistilBertConfig(vocab_size=99, dim=32, hidden_dim=37, n_layers=1, n_heads=4, max_position_embeddings=64)
    model = Model(HierarchicalRobertaConfig(encoder_config=config, num_labels=2, chunk_length=16)).eval()
    assert model(**batch_of(model, DOCUMENTS)).logits.shape == (4, 2)


def test_an_encoder_that_is_none_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"encoder \(vit\) cannot read a chunk"):
        Model.from_encoder(str(tmp_path), num_labels=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_overlap": 600, "chunk_length": 512}, r"chunk_overlap.*600.*chunk_length.*510"),
        ({"max_chunks": 0}, "max_chunks.*1"),
        ({"token_pooling": "median"}, "token_pooling.*mean, cls, last.*median"),
        ({"chunk_length": 2}, "chunk_length.*3"),
        ({"classifier_dropout": 1.0}, "classifier_dropout"),
    ],
)
def test_a_config_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalRobertaConfig(**fields)


def test_a_chunk_longer_than_the_encoders_positions_is_refused(roberta_folder):
    with pytest.raises(ValueError, match=r"chunk_length.*65.*\b64\b"):
        Model.from_encoder(str(roberta_folder), num_labels=2, chunk_length=65)
