"""Memory: running out of it changes nothing but speed; what a step needs is known before."""

import copy
import gc
import logging
import re

import pytest
import torch
from transformers import AutoTokenizer

import train_hf
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.training.memory import FRAGMENTATION, MemoryEstimate, estimate_memory
from modeling.training.out_of_memory import split_documents
from modeling.training.runtime import configure_malloc, free_memory
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.training.setup import chunk_splits
from tests.conftest import tiny_config, train, training_command
from tests.tiny_training import SplitLengths, trainer_for


def out_of_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class SmallDevice(Model):
    """Has room for so many live chunks in training, and for so many chunks and documents at once in any case."""

    room_for_live, room_at_once, room_for_documents = 10**6, 10**6, 10**6

    def encode_chunks(self, input_ids_NL, *rest):
        live = min(self.live_chunks or len(input_ids_NL), len(input_ids_NL))
        if live > self.room_at_once:
            out_of_memory()
        chunk_ND = super().encode_chunks(input_ids_NL, *rest)
        if chunk_ND.requires_grad and live > self.room_for_live:
            chunk_ND.register_hook(out_of_memory)  # in the backward pass: the head has its gradients already
        return chunk_ND

    def classify(self, chunk_ND, num_chunks_B, count_BM=None):
        if len(num_chunks_B) > self.room_for_documents:
            out_of_memory()
        return super().classify(chunk_ND, num_chunks_B, count_BM)


def small_device(model, **room) -> SmallDevice:
    small = SmallDevice(model.config)
    small.load_state_dict(model.state_dict())
    for name, number in room.items():
        setattr(small, name, number)
    return small


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("room", "said"),
    [
        ({"room_for_live": 3}, "live.chunks"),
        ({"room_at_once": 4}, "live.chunks"),
        ({"room_for_documents": 1}, r"live.chunks.*\b1\b"),
    ],
)
def test_out_of_memory_in_training_changes_no_loss_and_no_weight(
    roberta_model, tmp_path, caplog, room, said, accumulation
):
    given = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    ends = []
    for model in (copy.deepcopy(roberta_model), small_device(roberta_model, **room)):
        trainer = trainer_for(model, tmp_path, logging_steps=1, eval_strategy="epoch", **given)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        ends.append((trainer.state.log_history, trainer.state.global_step, model.state_dict()))
    (history, steps, weights), (other_history, other_steps, other_weights) = ends
    assert steps == other_steps
    for ours, theirs in zip(other_history, history, strict=True):
        for name in {"loss", "learning_rate", "eval_loss", "eval_f1_macro"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, atol=1e-5, rtol=0)
    assert re.search(said, caplog.text)
    assert re.search(r"(?i)(out of memory|OOM)\b.*step 1\b", caplog.text)


def test_repeated_step_draws_the_same_random_numbers(roberta_folder, tmp_path):
    """With dropout on: half the live chunks, but still a whole micro-batch, gives the same bits."""
    ends = []
    for room in ({}, {"room_for_live": 8}):
        torch.manual_seed(5)
        plain = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.2)
        model = small_device(plain, **room)
        model.token_budget = 32
        trainer = trainer_for(model, tmp_path, per_device_train_batch_size=4)
        torch.manual_seed(6)
        trainer.train()
        ends.append(model.state_dict())
        assert bool(model.live_chunks) == bool(room)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_out_of_memory_in_evaluation_alone(roberta_model, tmp_path, caplog):
    expected = trainer_for(roberta_model, tmp_path, per_device_eval_batch_size=16).evaluate()
    small = small_device(roberta_model, room_at_once=2, room_for_documents=3)
    trainer = trainer_for(small, tmp_path, per_device_eval_batch_size=16)
    with caplog.at_level(logging.WARNING):
        found = trainer.evaluate()
    assert re.search(r"(?i)(out of memory|OOM)\b.*evaluat", caplog.text)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert found["eval_f1_macro"] == expected["eval_f1_macro"]
    assert small.live_chunks == 0  # what training may keep alive is another matter


def test_out_of_memory_with_one_chunk_names_what_to_do(roberta_model, tmp_path):
    small = small_device(roberta_model, room_at_once=0)
    with pytest.raises(ValueError, match=r"(?i)(out of memory|OOM)\b.*--freeze_layers"):
        trainer_for(small, tmp_path).train()


def test_other_errors_are_not_taken_for_out_of_memory(roberta_model, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(roberta_model, "encode_chunks", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer_for(roberta_model, tmp_path).train()


def test_split_documents_keeps_the_batch(roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path)
    batch = trainer.data_collator([SplitLengths()[i] for i in range(5)])
    parts = split_documents(batch, 2)
    assert [len(part["labels"]) for part in parts] == [3, 2]
    assert [lengths for part in parts for lengths in part.pop("chunk_lengths")] == batch.pop("chunk_lengths")
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), value)
    assert split_documents(batch, 1) == [batch]
    assert len(split_documents(batch, 64)) == 5


def graph_tensors() -> int:
    gc.collect()
    return sum(isinstance(item, torch.Tensor) and item.grad_fn is not None for item in gc.get_objects())


def test_estimate_memory_leaves_no_graph(roberta_folder):
    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=64, dropout=0.1)
    before = graph_tensors()
    estimate_memory(model)
    assert graph_tensors() == before


@pytest.mark.parametrize("bf16", [False, True])
def test_estimate_memory_is_what_autograd_keeps(roberta_folder, bf16):
    model = Model.from_encoder(str(roberta_folder), num_labels=3, chunk_length=64, dropout=0.1)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16, enabled=bf16)

    before = (torch.get_rng_state(), list(model.token_counts), model.training)
    need = estimate_memory(model, autocast)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (model.token_counts, model.training) == before[1:]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def kept_bytes(padding: int) -> int:
        kept = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast():
            ids = torch.full((30, 64), 7)
            mask = torch.ones_like(ids)
            mask[-1, 64 - padding :] = 0
            vectors = model.train().encode_chunks(ids, mask)
        assert vectors.requires_grad
        return sum(kept.values())

    planned = need.once + 30 * need.per_chunk
    assert planned == pytest.approx(kept_bytes(padding=1), rel=0.005)
    assert planned > kept_bytes(padding=0)  # an attention mask is part of the plan
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert need.state == 12 * trained


def test_live_chunks_within_is_what_memory_holds():
    need = MemoryEstimate(state=100, per_chunk=round(100 / FRAGMENTATION), once=0, working=50, chunks_at_once=8)
    assert need.live_chunks_within(100 + 50 + 4000, num_chunks=40) == 0  # all of them
    assert need.live_chunks_within(100 + 50 + 3980, num_chunks=40) == 36
    assert need.live_chunks_within(100 + 50 + 850, num_chunks=40) == 8
    assert need.live_chunks_within(0, num_chunks=40) == 1
    for fitting in range(1, 1999, 7):  # less than an eighth of what would fit is wasted
        bound = need.live_chunks_within(need.peak(2000, fitting), num_chunks=2000)
        assert 7 / 8 * fitting < bound <= fitting
    for bound in (1, 8, 32):
        assert need.peak(40, bound) == pytest.approx(150 + 100 * bound, rel=0.01)
    assert free_memory(torch.device("cpu")) > 2**20


def test_estimate_memory_of_a_frozen_encoder_keeps_nothing():
    model = Model(tiny_config())
    model.freeze_encoder()
    assert estimate_memory(model).per_chunk == 0


def test_dry_run_estimates_and_leaves_nothing(prepared_folder, roberta_folder, tmp_path):
    done = train(prepared_folder, roberta_folder, tmp_path / "run", "--dry_run", live_chunks=8)
    assert done.returncode == 0, done.stderr
    for words in (r"\b16 tokens", r"\b8 live chunks", r"\b3 steps", r"\d (MiB|GiB)\b"):
        assert re.search(words, done.stdout), words
    assert not (tmp_path / "run").exists()
    frozen = train(prepared_folder, roberta_folder, tmp_path / "run", "--dry_run", "--freeze_encoder")
    assert frozen.returncode == 0, frozen.stderr
    assert re.search(r"(?i)encod", frozen.stdout)
    assert not re.search(r"(?i)encod\w* every", done.stdout)


def test_impossible_values_are_named(prepared_folder, roberta_folder, tmp_path, call_command):
    for live_chunks in ("many", "-1"):
        with pytest.raises(ValueError, match=rf"live_chunks.*{live_chunks}"):
            HierarchicalTrainingArguments(live_chunks=live_chunks)
    with pytest.raises(ValueError, match="freeze_layers"):
        HierarchicalTrainingArguments(freeze_layers=1, freeze_encoder=True)
    with pytest.raises(ValueError, match="--compile_layers"):
        HierarchicalTrainingArguments(torch_compile=True)
    with pytest.raises(ValueError, match=r"freeze_layers.*\b2\b.*\b3\b"):
        call_command(
            train_hf.command, *training_command(prepared_folder, roberta_folder, tmp_path / "run", freeze_layers=3)[2:]
        )


def test_memory_given_back_between_encoder_batches_changes_no_gradient(roberta_model):
    batch = DocumentCollator(1)([SplitLengths()[i] for i in range(4)])
    roberta_model.token_budget = 40
    gradients = []
    for live_chunks in (0, 3):
        model = copy.deepcopy(roberta_model).eval()
        model.live_chunks = live_chunks
        if live_chunks:
            configure_malloc(model, torch.device("cpu"))
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_planned_document_is_as_long_as_the_one_that_is_encoded(roberta_model, roberta_folder, splits, tmp_path):
    """Special tokens and the prefix included."""
    roberta_model.config.update({"max_chunks": 99, "chunk_prefix": "The lamp: "})
    args = trainer_for(roberta_model, tmp_path).args
    chunked, lengths = chunk_splits(splits, AutoTokenizer.from_pretrained(roberta_folder), roberta_model, args)
    chunks = [chunked["test"][index]["input_ids"] for index in range(len(chunked["test"]))]
    assert lengths["test"].num_chunks.tolist() == [len(each) for each in chunks]
    assert lengths["test"].tokens() == pytest.approx([sum(map(len, each)) for each in chunks])
