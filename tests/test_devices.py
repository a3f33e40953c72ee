"""What a GPU, a Mac or half precision would meet, as far as a CPU can show it."""

import logging
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.distributed
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.flash_attention import get_target_dtype

from modeling.hierarchical_roberta.chunk_attribution import logits_of_subsets
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.hierarchical_roberta.pipeline import HierarchicalClassificationPipeline
from modeling.hierarchical_roberta.pooling import mean_of_tokens
from modeling.hierarchical_roberta.precision import full_precision
from modeling.hierarchical_roberta.prefetch import prefetched
from modeling.training.callbacks import SignalCallback
from modeling.training.losses import weight_sum, weighted_loss_sum
from modeling.training.runtime import peak_memory
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.training import setup as training_setup
from tests.conftest import tiny_config, train, training_command
from tests.processes import ROOT, start_ranks
from tests.tiny_training import SplitLengths, trainer_for


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


def pipeline_of(model, folder, **options) -> HierarchicalClassificationPipeline:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HierarchicalClassificationPipeline(
        model=model, tokenizer=tokenizer, task="text-classification", **{"device": "cpu", **options}
    )


# ---- the device that was asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_pipeline_takes_its_device_in_a_distributed_job(roberta_model, roberta_folder, process_group, device):
    """`meta` stands for a GPU: transformers' Pipeline would leave the model where it is (huggingface/transformers 5.23)."""
    classifier = pipeline_of(roberta_model, roberta_folder, device=device)
    assert classifier.device.type == classifier.model.device.type == "meta"


def test_choices_follow_the_device_of_the_run(monkeypatch):
    """A machine with a GPU whose run uses the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = HierarchicalTrainingArguments(use_cpu=True)
    assert (args.dataloader_num_workers, args.dataloader_pin_memory) == (0, False)
    assert peak_memory(torch.device("cpu"))["peak_memory_gib"] > 0.01


def test_allocated_and_reserved_memory_of_a_gpu_are_both_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    assert peak_memory(torch.device("cuda")) == {"peak_memory_gib": 1, "peak_reserved_gib": 3}


def test_processes_that_cannot_meet_by_gloo_are_told_what_to_name(process_group, monkeypatch):
    def unreachable(**kwargs):
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(torch.distributed, "new_group", unreachable)
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME"):
        SignalCallback()


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as Apple's GPUs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} makes float64")
        return result


def test_pipeline_and_training_need_no_float64(roberta_model, roberta_folder, tmp_path):
    classifier = pipeline_of(roberta_model, roberta_folder)
    expected = classifier("Once upon a time. The end.")
    trainer = trainer_for(roberta_model, tmp_path, eval_strategy="epoch")
    with NoFloat64():
        assert classifier("Once upon a time. The end.") == expected
        trainer.train()
    with pytest.raises(TypeError, match="makes float64"), NoFloat64():
        torch.ones(1, dtype=torch.float64)


# ---- precision -------------------------------------------------------------------------------------------------------


def half_only(module, query, key, value, attention_mask, **kwargs):
    """As flash attention: fp16 and bf16 only, in the type that transformers' own function finds for it."""
    dtype = get_target_dtype(query, module) or query.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None


def test_flash_attention_is_left_out_where_it_cannot_read_fp32(roberta_model, tmp_path):
    AttentionInterface.register("flash_half", half_only)
    documents = [{"input_ids": [torch.randint(5, 300, (16,))], "labels": i % 3} for i in range(8)]
    expected = trainer_for(roberta_model, tmp_path, documents).predict(documents).predictions
    roberta_model.encoder.config._attn_implementation = "flash_half"
    trainer = trainer_for(roberta_model, tmp_path, documents, bf16=True, num_train_epochs=0.5)
    np.testing.assert_allclose(trainer.predict(documents).predictions, expected, atol=1e-6)
    trainer.train()  # with it, under autocast
    assert roberta_model.encoder.config._attn_implementation == "flash_half"


def test_attention_that_would_drop_its_dropout_is_refused(roberta_folder):
    with pytest.raises(ValueError, match=r"flash_attention_3.*--attention_dropout 0"):
        Model.from_encoder(str(roberta_folder), num_labels=3, attn_implementation="flash_attention_3")


@pytest.mark.parametrize("is_padded", [False, True])
def test_means_over_tokens_are_fp32_under_autocast(is_padded):
    token_NLD = (torch.randn(2, 512, 8) + 3).to(torch.bfloat16)
    mask_NL = torch.ones(2, 512, dtype=torch.long)
    if is_padded:
        mask_NL[1, 300:] = 0
    expected = [(token_NLD[i, : mask_NL[i].sum()].double().mean(dim=0)) for i in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        mean_ND = mean_of_tokens(token_NLD, mask_NL if is_padded else None)
    assert mean_ND.dtype == torch.float32
    torch.testing.assert_close(mean_ND.double(), torch.stack(expected), atol=1e-6, rtol=1e-6)


def test_half_precision_gradients_do_not_get_worse_with_the_number_of_encoder_batches(roberta_folder):
    model = Model.from_encoder(
        str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.0, attention_dropout=0.0
    ).train()
    ids_NL = torch.randint(5, 300, (400, 16))
    lengths = [[16] * 400]

    def gradients(num_chunks_a_batch: int, bf16: bool) -> torch.Tensor:
        model.token_budget = 16 * num_chunks_a_batch
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(input_ids=ids_NL, num_chunks=torch.tensor([400]), chunk_lengths=lengths)
        output.logits[0, 1].backward()
        layers = model.encoder_layers()
        return torch.cat([weight.grad.flatten() for layer in layers for weight in layer.parameters()])

    expected = gradients(400, bf16=False)
    few, many = ((gradients(size, bf16=True) - expected).norm() / expected.norm() for size in (100, 1))
    assert many < 1.5 * few  # four batches and 400; with one sum in bf16 over all of them it is several times more


def test_predictions_and_word_counts_are_fp32_whatever_matrix_products_are_set_to(roberta_model, tmp_path, monkeypatch):
    torch.manual_seed(0)
    viewing = Model(tiny_config(lexical_features=8)).eval()
    viewing.lexical.set_weights(torch.arange(5, 13), torch.randn(3, 8), torch.zeros(3))
    chunk_CD, count_CM = torch.randn(40, 32), torch.randint(0, 5000, (40, 8)).float()
    kept_SC = torch.rand(64, 40) < 0.5
    kept_SC[:, 0] = True
    expected = logits_of_subsets(viewing, chunk_CD, kept_SC, count_CM)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of_subsets(viewing, chunk_CD, kept_SC, count_CM), expected)

    matmul, seen = torch.backends.cuda.matmul, []
    encode_chunks = roberta_model.encode_chunks

    def watched(*args):
        seen.append((matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return encode_chunks(*args)

    monkeypatch.setattr(roberta_model, "encode_chunks", watched)
    trainer = trainer_for(roberta_model, tmp_path, bf16=True)
    matmul.fp32_precision = "tf32"
    try:
        trainer.predict(SplitLengths())
        assert set(seen) == {("ieee", False)}
        assert matmul.fp32_precision == "tf32"  # as it was given
    finally:
        matmul.fp32_precision = "none"


def test_prediction_in_half_precision_is_near_and_marked(roberta_model, roberta_folder):
    classifier = pipeline_of(roberta_model, roberta_folder)
    text = "Once upon a time there was a fox. " * 8
    [exact], [half] = classifier(text), classifier(text, precision="bf16")
    assert exact["scores"] != half["scores"]
    assert half["scores"] == pytest.approx(exact["scores"], abs=0.02)
    with pytest.raises(ValueError, match=r"precision.*fp32.*bf16.*fp16.*int8"):
        classifier(text, precision="int8")


# ---- several processes ----------------------------------------------------------------------------------------------


def test_the_process_with_least_memory_bounds_live_chunks_on_all(roberta_model, splits, tmp_path, monkeypatch):
    trainer = trainer_for(roberta_model, tmp_path, live_chunks="8")
    sizes = {"train": training_setup.SplitLengths(np.array([3, 4]), np.array([16, 16]))}
    monkeypatch.setattr(training_setup, "gather_object", lambda bounds: [0, *bounds, 4])
    training_setup.plan_memory(roberta_model, sizes, trainer.args, trainer.accelerator)
    assert roberta_model.live_chunks == 4
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # which plans anew for every shape


# ---- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["attention", "mean", "max"])
@pytest.mark.parametrize(
    "extra", [{}, {"lexical_features": 4}, {"chunk_transformer_layers": 1}, {"token_pooling": "last"}]
)
def test_a_step_asks_the_device_nothing_where_the_host_knows_the_lengths(pooling, extra):
    """Fake tensors have no values: what reads one (and, on a GPU, waits for it) raises."""
    model = Model(tiny_config(pooling=pooling, **extra)).train()
    model.token_budget, model.live_chunks = 32, 4
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids_NL = torch.randint(5, 90, (6, 16))
        batch = {"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL), "num_chunks": torch.tensor([2, 4])}
        labels, weights = torch.zeros(2, dtype=torch.long), torch.ones(3)
        logits = model(**batch, chunk_lengths=[[16] * 2, [16] * 4]).logits
        (weighted_loss_sum(logits, labels, weights) / weight_sum(labels, weights)).backward()
        with pytest.raises(DataDependentOutputException):
            model(**batch)


def test_lengths_from_the_host_change_nothing(model):
    batch = trainer_for(model, "unused").data_collator([SplitLengths()[i] for i in range(4)])
    with_lengths = model.eval()(**batch).logits
    del batch["chunk_lengths"]
    assert torch.equal(model(**batch).logits, with_lengths)


def test_training_mode_is_set_again_only_where_something_changed(roberta_model, monkeypatch):
    roberta_model.train()
    calls = []
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: calls.append(mode) or self)
    roberta_model.train()
    assert not calls
    monkeypatch.undo()
    roberta_model.encoder.eval()
    assert roberta_model.train().encoder.training
    roberta_model.encoder_layers()[0].requires_grad_(False)
    assert not roberta_model.train().encoder_layers()[0].training
    roberta_model.encoder_layers()[0].requires_grad_(True)
    assert roberta_model.train().encoder_layers()[0].training
    assert not roberta_model.eval().encoder.training


def test_what_comes_next_is_made_while_what_is_there_is_used():
    """By a thread; the caller's own iterator is read by the caller's thread, and no further than it is told."""
    read, made, second = [], [], threading.Event()

    def items():
        for number in range(4):
            read.append(threading.current_thread())
            yield number

    def make(number: int) -> int:
        made.append(threading.current_thread())
        if number == 1:
            second.set()
        if number == 3:
            raise ValueError("row 4 has no text")
        return number

    results = prefetched(make, items(), 1)
    assert next(results) == 0
    assert second.wait(10)  # the second, though nobody has asked for it
    assert len(read) == 2
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="row 4 has no text"):
        next(results)
    assert set(read) == {threading.current_thread()}
    assert threading.current_thread() not in made


def test_fp32_holds_in_every_thread_until_the_last_has_left(monkeypatch):
    matmul, entered, leave = torch.backends.cuda.matmul, threading.Event(), threading.Event()

    def stay() -> None:
        with full_precision(torch.device("cpu")):
            entered.set()
            leave.wait(10)

    matmul.fp32_precision = "tf32"
    try:
        thread = threading.Thread(target=stay)
        with full_precision(torch.device("cpu")):
            thread.start()
            assert entered.wait(10)
        assert matmul.fp32_precision == "ieee"  # the other thread is still inside
        leave.set()
        thread.join()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "none"


def test_ranks_with_gpus_answer_the_question_before(process_group):
    stop = SignalCallback(grace_seconds=0)
    assert not stop.asks_ahead  # on a CPU a micro-batch may take as long as the grace period
    stop.received, stop.received_at = 15, 0.0
    assert stop.deadline_reached()
    stop.agreed, stop.asks_ahead = None, True
    assert [stop.deadline_reached(), stop.deadline_reached()] == [False, True]
    assert stop.sync() == 15


def test_compiled_layers_give_the_same_gradients_with_live_chunks(roberta_model):
    """Recomputed batches must take the graph that they took forwards."""
    lengths = [[16, 16, 9], [12], [16, 5]]
    batch = {"input_ids": torch.randint(5, 300, (6, 16)), "num_chunks": torch.tensor([3, 1, 2])}
    batch["attention_mask"] = (torch.arange(16) < torch.tensor(sum(lengths, []))[:, None]).long()  # noqa: RUF017
    roberta_model.token_budget, roberta_model.live_chunks = 32, 3

    def gradients() -> list[torch.Tensor]:
        roberta_model.zero_grad()
        roberta_model.train()(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
        return [parameter.grad for parameter in roberta_model.parameters()]

    expected = gradients()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    roberta_model.compile_layers(backend=backend)
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    roberta_model.eval()(**batch)
    assert 1 <= len(graphs) <= 12
    assert torch._dynamo.config.recompile_limit >= 32


# ---- whole runs ------------------------------------------------------------------------------------------------------

STUCK = """
import runpy, sys, time, torch.distributed
torch.distributed.destroy_process_group = lambda *_: time.sleep(10**6)  # as nccl's may, while another rank does not call it
sys.argv[0] = "train_hf.py"
runpy.run_path("train_hf.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_on_one_rank_ends_it_at_once(prepared_folder, roberta_folder, tmp_path):
    """Rank 1 is given an encoder that is not there; leaving the process group would wait for rank 0."""
    command = [sys.executable, "-c", STUCK]
    commands = [
        [*command, *training_command(prepared_folder, encoder, tmp_path / "run", ddp_timeout=20)[2:]]
        for encoder in (roberta_folder, tmp_path / "nowhere")
    ]
    ranks = start_ranks(commands, cwd=ROOT, stderr=subprocess.PIPE)
    try:
        said = ranks[1].communicate(timeout=120)[1]
        assert ranks[1].returncode == 1
        assert "nowhere" in said
        assert "Traceback" not in said
        assert ranks[0].wait(timeout=120) == 1
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_full_determinism_runs_and_resumes_to_the_same_bits(prepared_folder, roberta_folder, tmp_path):
    given = {"full_determinism": True, "dropout": 0.1, "live_chunks": 4, "save_strategy": "steps", "save_steps": 3}
    given |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = train(prepared_folder, roberta_folder, tmp_path / "whole", **given)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "part" / "checkpoint-6")
    part = train(prepared_folder, roberta_folder, tmp_path / "part", resume_from_checkpoint="auto", **given)
    assert part.returncode == 0, part.stderr
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert same[0] == same[1]


def test_the_first_steps_that_the_fp16_scaler_skips_are_no_warning(roberta_model, tmp_path, caplog):
    trainer = trainer_for(roberta_model, tmp_path, gradient_accumulation_steps=1, per_device_train_batch_size=16)
    trainer.args.fp16 = True  # as on a GPU; here nothing but the warning depends on it
    forward = roberta_model.classify

    def overflowing(*args):
        logits_BK, weights_N = forward(*args)
        return logits_BK * float("inf"), weights_N

    roberta_model.classify = overflowing
    with caplog.at_level(logging.INFO):
        trainer.train()
    levels = [
        record.levelname for record in caplog.records if re.search(r"(?i)step \d+.*\b(inf|nan)\b", record.message)
    ]
    assert levels[:2] == ["INFO", "INFO"]
    assert set(levels[2:]) == {"WARNING"}
