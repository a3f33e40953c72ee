"""LoRA: adapters in place of the encoder's weights, exact resuming, plain models in checkpoints and exports."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, DebertaV2Config, ElectraConfig, ModernBertConfig

from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.training.lora import add_adapters, merge_adapters
from modeling.training.memory import estimate_memory
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.training.setup import check_checkpoint, checkpoint_activations
from tests.conftest import assert_refused, train
from tests.tiny_training import SplitLengths, trainer_for

pytest.importorskip("peft", reason="peft, of the extra `lora`, is not installed")

BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


def adapted(model: Model, rank: int = 4, **options) -> Model:
    """A copy of the model with adapters that are random, and not zero as at the start of training."""
    model = copy.deepcopy(model)
    add_adapters(model, rank, **options)
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return model


def batch_of(model: Model, folder: Path, num_documents: int = 6) -> dict:
    batch = next(iter(trainer_for(model, folder, SplitLengths(num_documents)).get_train_dataloader()))
    return {name: value for name, value in batch.items() if name != "ids"}


def gradients(model: Model, batch: dict, bf16: bool = False) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(0)
    with BFLOAT16(enabled=bf16):
        loss = model(**batch).loss
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_a_new_adapter_changes_nothing(model, tmp_path):
    batch = batch_of(model, tmp_path)
    expected = model.eval()(**batch).logits
    add_adapters(model, 4)
    assert torch.equal(model.eval()(**batch).logits, expected)


def test_training_moves_every_adapter_and_nothing_else_of_the_encoder(model, tmp_path):
    add_adapters(model, 4)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer_for(model, tmp_path).train()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_" in name or not name.startswith("encoder.")}
    # Query, key, value, attention's output and both of the feed-forward layers, in both layers.
    assert sum("lora_A" in name for name in moved) == sum("lora_B" in name for name in moved) == 12


@pytest.mark.parametrize(
    ("config", "num_adapters"),
    [
        (partial(ElectraConfig, embedding_size=16), 13),  # the embeddings are projected to the width of the layers
        (partial(DebertaV2Config, relative_attention=True, pos_att_type=["c2p", "p2c"]), 16),
        (partial(ModernBertConfig, pad_token_id=1), 8),
    ],
)
def test_every_linear_layer_is_adapted_whatever_its_name(config, num_adapters, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    encoder = config(vocab_size=99, max_position_embeddings=66, **sizes).to_dict()
    model = Model(HierarchicalRobertaConfig(encoder_config=encoder, num_labels=3, chunk_length=16)).eval()
    plain = list(model.state_dict())
    model = adapted(model)
    batch = batch_of(model, tmp_path)
    reached = gradients(model, batch)
    assert sum("lora_A" in name and bool(value.any()) for name, value in reached.items()) == num_adapters
    expected = model.eval()(**batch).logits
    merge_adapters(model)
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    assert set(model.state_dict()) == set(plain)


def test_a_checkpoint_is_a_plain_model_and_so_is_the_merged_one(model, tmp_path, monkeypatch):
    plain = set(model.state_dict())
    add_adapters(model, 4)
    trainer_for(model, tmp_path / "run", save_strategy="epoch").train()
    batch = batch_of(model, tmp_path)
    expected = model.eval()(**batch).logits
    merge_adapters(model)
    model.save_pretrained(tmp_path / "exported")
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    for folder in (tmp_path / "run" / "checkpoint-4", tmp_path / "exported"):
        loaded, report = Model.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        logits = loaded.eval()(**batch).logits
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert torch.equal(logits, model(**batch).logits)
        other = Model.from_encoder(str(folder), num_labels=2, chunk_length=16)  # its encoder, for other labels
        theirs = other.encoder.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.encoder.state_dict().items())
        assert "lora" not in other.config.to_json_string()
    assert set(load_file(tmp_path / "exported" / "model.safetensors")) == plain
    assert "lora" not in (tmp_path / "exported" / "config.json").read_text()
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())
    merge_adapters(model)  # a model without adapters stays as it is


def with_dropout(encoder: Path, seed: int = 5, rank: int = 4) -> Model:
    torch.manual_seed(seed)
    model = Model.from_encoder(str(encoder), num_labels=3, chunk_length=16, dropout=0.2, attention_dropout=0.1)
    add_adapters(model, rank)
    return model


def test_resuming_ends_with_the_same_bits(roberta_folder, tmp_path):
    whole, resumed = (
        trainer_for(with_dropout(roberta_folder, seed), tmp_path / str(seed), save_strategy="epoch", num_train_epochs=2)
        for seed in (5, 6)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "5" / "checkpoint-4"))
    theirs = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in whole.model.named_parameters())
    ours, theirs = (torch.load(tmp_path / str(seed) / "checkpoint-8" / "optimizer.pt")["state"] for seed in (5, 6))
    assert len(ours) > 24
    for number, moments in ours.items():
        assert all(torch.equal(value, theirs[number][name]) for name, value in moments.items())


def test_the_best_model_is_loaded_at_the_end(roberta_folder, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "num_train_epochs": 2}  # the loss falls
    trainer = trainer_for(with_dropout(roberta_folder), tmp_path, **options)
    trainer.train()
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (4, 8))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name])
        assert not name.endswith("lora_A.default.weight") or not torch.equal(value, last[name])


def test_16x1_and_4x4_are_the_same(roberta_model, tmp_path):
    weights = []
    for batch, accumulation in ((16, 1), (4, 4)):
        model = adapted(roberta_model)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer_for(model, tmp_path, **options).train()
        weights.append({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", ["live_chunks", "gradient_checkpointing", "compile_layers"])
def test_gradients_are_the_same_with_less_memory_or_compiled(option, roberta_model, tmp_path):
    model = adapted(roberta_model)
    model.token_budget = 32
    batch = batch_of(model, tmp_path)
    expected = gradients(model, batch)
    if option == "live_chunks":
        model.live_chunks = 4
    elif option == "gradient_checkpointing":
        checkpoint_activations(model, {"use_reentrant": False})
    else:
        model.compile_layers(backend="eager")
    torch.testing.assert_close(gradients(model, batch), expected, atol=1e-6, rtol=1e-5)


def test_optimizer_groups_hold_the_adapters_at_the_encoders_rate(roberta_model, tmp_path):
    add_adapters(roberta_model, 4)
    trainer = trainer_for(roberta_model, tmp_path, weight_decay=0.1)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    adapters = [weight for name, weight in roberta_model.named_parameters() if "lora_" in name]
    assert {id(weight) for weight in groups["encoder"]["params"]} == {id(weight) for weight in adapters}
    assert "encoder_no_decay" not in groups  # of biases and norms, which are frozen
    assert (groups["encoder"]["lr"], groups["encoder"]["weight_decay"]) == (1e-3, 0.1)
    assert groups["head"]["lr"] == 2e-3


def test_memory_is_that_of_the_adapters_and_one_copy_of_the_weights(roberta_folder):
    plain = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=64, dropout=0.1, attention_dropout=0.0)
    model = adapted(plain, 2, autocast_dtype=torch.bfloat16)
    for each in (plain, model):
        each.token_budget = 256  # four chunks an encoder batch
    need = estimate_memory(model, BFLOAT16)
    head = sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("encoder."))
    assert need.state == 12 * model.count_trainable_parameters() < 12 * (head + 4000)
    full = estimate_memory(plain, BFLOAT16)
    assert need.state < full.state / 5
    assert need.per_chunk < 0.93 * full.per_chunk  # no input is kept in two precisions
    resident = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), BFLOAT16():
        vectors = model.train().encode_chunks(torch.full((30, 64), 7))
    assert vectors.requires_grad
    num_bytes = sum(size for address, size in kept.items() if address not in resident)
    assert num_bytes <= 30 * need.per_chunk + need.once  # not a copy of the weights for each of the eight batches
    assert need.once < 2 * model.count_trainable_parameters()  # the copies of the adapters


def test_the_copy_of_the_weights_changes_no_bit(roberta_model, tmp_path):
    batch = batch_of(roberta_model, tmp_path)
    with_copy = gradients(adapted(roberta_model, autocast_dtype=torch.bfloat16), batch, bf16=True)
    without = gradients(adapted(roberta_model), batch, bf16=True)
    assert len(with_copy) > 24
    assert all(torch.equal(value, without[name]) for name, value in with_copy.items())
    in_fp32 = gradients(adapted(roberta_model, autocast_dtype=torch.bfloat16), batch)
    assert all(torch.equal(value, in_fp32[name]) for name, value in gradients(adapted(roberta_model), batch).items())


def test_dropout_stays_on_but_for_frozen_layers(roberta_folder):
    model = with_dropout(roberta_folder).train()
    dropouts = [part for part in model.encoder.modules() if isinstance(part, torch.nn.Dropout)]
    assert len(dropouts) > 4
    assert all(part.training for part in dropouts)
    assert all(layer.attention.self.training for layer in model.encoder_layers())  # drops attention weights

    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.2)
    model.freeze_layers(1)
    add_adapters(model, 4)
    first, second = model.train().encoder_layers()
    assert not any(part.training for frozen in (model.encoder.embeddings, first) for part in frozen.modules())
    assert all(part.training for part in second.modules() if isinstance(part, torch.nn.Dropout))


def test_frozen_layers_have_no_adapters_and_the_backward_pass_ends_above_them(roberta_model, tmp_path):
    roberta_model.freeze_layers(1)
    model = adapted(roberta_model)
    first, second = model.encoder_layers()
    assert not any("lora" in name for name, _ in first.named_modules())
    reached = []
    first.register_forward_hook(lambda _, inputs, output: reached.append(output.requires_grad))
    gradients(model, batch_of(model, tmp_path))
    assert set(reached) == {False}
    assert all(weight.grad is not None for name, weight in second.named_parameters() if "lora_" in name)


def test_what_cannot_be_done_is_refused_in_a_sentence(roberta_model, roberta_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`freeze_encoder`.*`lora_rank`"):
        HierarchicalTrainingArguments(output_dir=str(tmp_path), freeze_encoder=True, lora_rank=4)
    with pytest.raises(ValueError, match="`lora_rank` must be at least 0"):
        HierarchicalTrainingArguments(output_dir=str(tmp_path), lora_rank=-1)
    frozen = copy.deepcopy(roberta_model)
    frozen.freeze_layers(2)
    with pytest.raises(ValueError, match=r"--lora_rank.*linear layers.*roberta"):
        add_adapters(frozen, 4)
    state = with_dropout(roberta_folder).state_dict()
    other = copy.deepcopy(roberta_model)
    other.encoder_layers()[1].output.dense.weight.data[3, 5] += 0.01
    add_adapters(other, 4)
    for other_state in (state, roberta_model.state_dict()):
        with pytest.raises(ValueError, match=r"another encoder.*layer\.\d\..*--encoder and --freeze_layers"):
            other.load_state_dict(other_state)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[lora\]'"):
        add_adapters(roberta_model, 4)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (4, 0), (0, 4)])
def test_a_checkpoint_of_another_rank_is_not_resumed(old, new, roberta_model, tmp_path):
    models = [adapted(roberta_model, rank) if rank else roberta_model for rank in (old, new)]
    trainer_for(models[0], tmp_path, save_strategy="epoch").train()
    check = partial(check_checkpoint, tmp_path / "checkpoint-4", data_fingerprint="", needs_best=False)
    check(models[0].config)
    with pytest.raises(ValueError, match=f"lora_rank: {old or None} in checkpoint, {new or None} now"):
        check(models[1].config)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_exports_a_plain_model_and_two_processes_the_same(
    finished_run, prepared_folder, roberta_folder, tmp_path
):
    given = {"lora_rank": 4, "dropout": 0.0, "attention_dropout": 0.0, "num_train_epochs": 2, "learning_rate": 1e-2}
    outputs = [tmp_path / "one", tmp_path / "two"]
    for processes, output_dir in enumerate(outputs, 1):
        batch = {"per_device_train_batch_size": 8 // processes, "gradient_accumulation_steps": 2}
        done = train(prepared_folder, roberta_folder, output_dir, processes=processes, **given, **batch)
        assert done.returncode == 0, done.stderr
    one, two, full, encoder = (
        load_file(folder / "model.safetensors") for folder in (*outputs, finished_run, roberta_folder)
    )
    assert one.keys() == two.keys() == full.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
        if name.startswith("encoder."):
            is_adapted = ".layer." in name and "LayerNorm" not in name and name.endswith("weight")
            assert torch.equal(value, encoder[name.removeprefix("encoder.")]) != is_adapted, name
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (outputs[0], finished_run))
    assert ours.keys() == theirs.keys()
    AutoModelForSequenceClassification.from_pretrained(outputs[0], trust_remote_code=True)
    log = (outputs[0] / "training.log").read_text()
    adapters = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 37))  # layers × rank × (inputs + outputs)
    head = sum(value.numel() for name, value in one.items() if name.startswith(("pooling.", "classifier.")))
    assert f"{adapters + head:,} of {sum(value.numel() for value in one.values()) + adapters - 64:,} parameters" in log
    assert "rank 4" in (outputs[0] / "README.md").read_text()
    done = train(
        prepared_folder, roberta_folder, outputs[0], resume_from_checkpoint="auto", **{**given, "lora_rank": 8}
    )
    assert_refused(done, "lora_rank: 4 in checkpoint, 8 now")
