"""WeightedTrainer: the same mathematics under any batching, learning rates a part, exact evaluation."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import (
    HierarchicalRobertaForSequenceClassification as Model,
)
from modeling.training.losses import balanced_class_weights
from modeling.training.reduction import average_gradients
from modeling.training.sampling import PADDING_INDEX, EpochSampler, balance_across_ranks
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import (
    HierarchicalTrainingArguments,
    choose_precision,
    parse_class_weights,
    parse_severity_weights,
)
from scripts.training.embedding_cache import cached_chunk_vectors
from tests.tiny_training import WEIGHTS, SplitLengths, trainer_for


def trained(model, folder, batch: int, accumulation: int, **arguments) -> tuple[dict[str, torch.Tensor], list[float]]:
    trainer = trainer_for(
        copy.deepcopy(model),
        folder,
        per_device_train_batch_size=batch,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model.state_dict(), losses


@pytest.mark.parametrize("label_smoothing_factor", [0.0, 0.1])
def test_16x1_and_4x4_and_1x16_are_the_same(roberta_model, tmp_path, label_smoothing_factor):
    reference, losses = trained(roberta_model, tmp_path, 16, 1, label_smoothing_factor=label_smoothing_factor)
    assert len(losses) == 4
    for batch, accumulation in ((4, 4), (1, 16)):
        weights, other = trained(
            roberta_model, tmp_path, batch, accumulation, label_smoothing_factor=label_smoothing_factor
        )
        assert other == pytest.approx(losses, abs=1e-5)
        for name, value in reference.items():
            torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


def test_the_first_step_is_torchs_weighted_cross_entropy_over_the_whole_step(roberta_model, tmp_path):
    trainer = trainer_for(
        copy.deepcopy(roberta_model),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_steps=1,
        max_grad_norm=0,
        logging_steps=1,
    )
    gradients = {}

    def keep(optimizer, *_):
        gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    first = list(EpochSampler(50, trainer.args.seed))[:16]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in first])
    labels = batch.pop("labels")
    loss = torch.nn.functional.cross_entropy(roberta_model.eval()(**batch).logits, labels, WEIGHTS)
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in roberta_model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_without_weights_it_is_plain_cross_entropy(roberta_model, tmp_path):
    _, plain = trained(roberta_model, tmp_path, 4, 4, class_weights=None)
    _, ones = trained(roberta_model, tmp_path, 16, 1, class_weights=torch.ones(3))
    assert plain == pytest.approx(ones, abs=1e-5)


def test_eval_loss_is_the_whole_splits_weighted_loss(roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    batch = trainer.data_collator(trainer.eval_dataset.items)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = roberta_model.eval()(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits, labels, WEIGHTS)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["eval_support_a"] + metrics["eval_support_b"] + metrics["eval_support_c"] == 50


def test_groups_hold_every_parameter_once_at_their_own_rates(model, tmp_path):
    trainer = trainer_for(model, tmp_path)
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert list(groups) == [
        "encoder",
        "encoder_no_decay",
        "chunk_attention",
        "chunk_attention_no_decay",
        "head",
        "head_no_decay",
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    for group in groups.values():
        assert group["lr"] == 1e-3 * (2 if group["name"].startswith("head") else 1)
        assert group["weight_decay"] == (0 if group["name"].endswith("no_decay") else 0.01)
        for parameter in group["params"]:
            is_bias_or_norm = names[id(parameter)].endswith("bias") or "LayerNorm" in names[id(parameter)]
            assert is_bias_or_norm == group["name"].endswith("no_decay")


def test_every_groups_rate_is_logged(roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path, logging_steps=1, max_steps=2)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["learning_rate_head"] == pytest.approx(2 * logged["learning_rate_encoder"])


def test_a_frozen_encoder_has_no_group_and_a_frozen_head_is_an_error(roberta_model, tmp_path):
    roberta_model.freeze_encoder()
    names = [group["name"] for group in trainer_for(roberta_model, tmp_path).create_optimizer().param_groups]
    assert not any(name.startswith("encoder") for name in names)
    roberta_model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"(?i)optimizer.*head"):
        trainer_for(roberta_model, tmp_path).create_optimizer()
    roberta_model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen_model"):
        trainer_for(roberta_model, tmp_path).create_optimizer()


def test_a_parameter_that_belongs_nowhere_is_an_error(roberta_model, tmp_path):
    roberta_model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        trainer_for(roberta_model, tmp_path).create_optimizer()


def test_every_parameter_moves_in_training(roberta_model, tmp_path):
    weights, _ = trained(roberta_model, tmp_path, 4, 4)
    still = [name for name, value in roberta_model.named_parameters() if torch.equal(weights[name], value)]
    assert still == []


def test_it_works_with_plain_training_arguments_too(roberta_model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    WeightedTrainer(
        model=roberta_model,
        args=arguments,
        train_dataset=SplitLengths(),
        data_collator=DocumentCollator(1),
        class_weights=balanced_class_weights([20, 20, 10]),
    ).train()


def test_class_weights_of_another_length_are_refused(roberta_model, tmp_path):
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)|\(3,\).*\(2,\)"):
        trainer_for(roberta_model, tmp_path, class_weights=torch.ones(2))


def test_smaller_is_better_for_a_loss(tmp_path):
    arguments = HierarchicalTrainingArguments(output_dir=str(tmp_path), metric_for_best_model="loss")
    assert arguments.greater_is_better is False
    assert HierarchicalTrainingArguments(output_dir=str(tmp_path)).greater_is_better is True
    hamming = HierarchicalTrainingArguments(output_dir=str(tmp_path), metric_for_best_model="eval_hamming_loss")
    assert hamming.greater_is_better is False
    # A label may be called so.
    of_a_class = HierarchicalTrainingArguments(output_dir=str(tmp_path), metric_for_best_model="recall_loss")
    assert of_a_class.greater_is_better is True


@pytest.mark.parametrize(("metric", "falls"), [("f1_macro", False), ("loss", True)])
def test_a_rate_that_waits_for_a_plateau_knows_which_way_is_better(metric, falls, roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path, metric_for_best_model=metric, eval_strategy="epoch")
    trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = "reduce_lr_on_plateau", {"patience": 0}
    trainer.create_optimizer_and_scheduler(4)
    for value in (0.5, 0.6, 0.7):
        trainer.lr_scheduler.step(value)
    assert (trainer.learning_rates()["encoder"] < 1e-3) == falls
    assert trainer.args.lr_scheduler_kwargs == {"patience": 0}  # other schedules, in a search, take no mode


def test_an_incomplete_batch_is_dropped_in_training_only(roberta_model, tmp_path):
    trainer = trainer_for(roberta_model, tmp_path, dataloader_drop_last=True)
    assert len(trainer.predict(trainer.eval_dataset).predictions) == 50  # in batches of 4
    trainer.train()
    assert trainer.stats.synchronize()["documents"] == 48


def test_one_process_on_several_gpus_is_refused_with_the_right_command(roberta_model, tmp_path, monkeypatch):
    monkeypatch.setattr(HierarchicalTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="--multi_gpu --num_processes 2"):
        trainer_for(roberta_model, tmp_path)


@pytest.mark.parametrize(
    ("capability", "capabilities", "expected"),
    [
        ((8, 0), {}, "bf16"),
        ((7, 0), {}, "fp16"),
        ((6, 1), {}, "fp32"),
        (None, {"avx512_bf16": True}, "bf16"),
        (None, {"amx_bf16": True}, "bf16"),
        (None, {"avx512_f": True}, "fp32"),
    ],
)
def test_precision_is_what_the_device_does_natively(capability, capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(use_cpu=capability is None)[0] == expected


def test_blanks_fill_up_the_order_of_several_processes():
    order = list(EpochSampler(50, seed=1, num_processes=2, batch_size=4))
    assert len(order) == 56
    assert sorted(order)[:6] == [PADDING_INDEX] * 6
    assert sorted(order)[6:] == list(range(50))
    first, second = EpochSampler(50, seed=1), EpochSampler(50, seed=1)
    second.set_epoch(1)
    assert list(first) == order[:50] != list(second)


@pytest.mark.parametrize("token_pooling", ["mean", "last"])
def test_a_frozen_encoder_ends_the_same_with_kept_vectors_and_without(splits, roberta_folder, tmp_path, token_pooling):
    """Kept vectors are what the encoder would have made, so pooling and head end with the same weights."""
    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    documents = ChunkedDocuments(splits["train"], tokenizer, chunk_length=16, max_chunks=4, chunk_policy="uniform")
    ends = {}
    for way in ("kept", "encoded again"):
        torch.manual_seed(2)
        model = Model.from_encoder(
            str(roberta_folder), num_labels=3, chunk_length=16, dropout=0.2, token_pooling=token_pooling
        )
        model.freeze_encoder()
        trainer = trainer_for(model, tmp_path / way, documents, num_train_epochs=3)
        if way == "kept":
            kept = cached_chunk_vectors(
                model, {"train": documents}, trainer.data_collator, tmp_path / "cache", trainer.accelerator
            )
            trainer.train_dataset = trainer.eval_dataset = kept["train"]
        torch.manual_seed(3)
        trainer.train()
        ends[way] = (trainer.model.state_dict(), trainer.evaluate())
    for name, value in ends["kept"][0].items():
        torch.testing.assert_close(ends["encoded again"][0][name], value, atol=1e-5, rtol=0)
    assert ends["kept"][1]["eval_f1_macro"] == ends["encoded again"][1]["eval_f1_macro"]
    assert ends["kept"][1]["eval_loss"] == pytest.approx(ends["encoded again"][1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(2, 4, 4), (8, 1, 4), (3, 2, 1)])
def test_processes_are_dealt_the_same_steps_at_like_cost(processes, batch, accumulation):
    """The loader gives a batch to each process in turn; which documents make up a step stays the same."""
    costs = torch.distributions.LogNormal(0.0, 0.7).sample((500,)).tolist()
    plain = list(EpochSampler(500, 1, processes, batch, accumulation))
    dealt = list(EpochSampler(500, 1, processes, batch, accumulation, costs))
    step = processes * batch * accumulation
    slowest = {"plain": 0.0, "dealt": 0.0}
    for start in range(0, len(plain), step):
        assert sorted(dealt[start : start + step]) == sorted(plain[start : start + step])
        for name, order in (("plain", plain), ("dealt", dealt)):
            totals = [0.0] * processes
            for place, index in enumerate(order[start : start + step]):
                totals[place // batch % processes] += costs[index] if index != PADDING_INDEX else 0.0
            slowest[name] += max(totals)
    assert slowest["dealt"] < slowest["plain"]
    assert balance_across_ranks([9, 1, 8, 2, 7, 3, 1, 1], num_processes=2, batch_size=2) == [0, 5, 2, 4, 3, 1, 6, 7]


def test_class_and_severity_weights_on_the_command_line():
    labels = ["General", "Teen", "Mature"]
    assert parse_class_weights("balanced", labels) == "balanced"
    assert parse_class_weights("Mature=3.8, General=0.7,Teen=1.5", labels) == [0.7, 1.5, 3.8]
    assert parse_class_weights('"sex, nudity"=2,a=b=1', ["sex, nudity", "a=b"]) == [2.0, 1.0]
    with pytest.raises(ValueError, match=r'expected.*"sex, nudity"=1.0,a=1.0'):
        parse_class_weights("a=1", ["sex, nudity", "a"])
    for wrong in ("General=0.7", "heavy", "General=a,Teen=1,Mature=1", "General=0,Teen=1,Mature=1"):
        with pytest.raises(ValueError, match="class_weights"):
            parse_class_weights(wrong, labels)
    assert parse_severity_weights(None, 3) == [0.3, 0.3, 0.4]
    assert parse_severity_weights("1,2", 2) == [1, 2]
    with pytest.raises(ValueError, match=r"\b3\b"):
        parse_severity_weights("1,2", 3)


def test_gradients_travel_in_buckets(monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(50)]
    for i, parameter in enumerate(parameters[1:]):
        parameter.grad = torch.full((3,), float(i))
    messages = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: messages.append(flat) or flat.mul_(2))
    average_gradients(parameters, num_processes=4)
    assert len(messages) == 1
    assert parameters[0].grad is None
    assert [parameter.grad.tolist() for parameter in parameters[1:]] == [[i / 2] * 3 for i in range(49)]
    large = torch.nn.Parameter(torch.zeros(3))
    large.grad = gradient = torch.ones(3)
    average_gradients([large], num_processes=4)
    assert messages[-1] is gradient  # no copy of the word embeddings'
    assert gradient.tolist() == [0.5] * 3
