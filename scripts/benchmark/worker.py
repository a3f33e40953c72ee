"""Benchmark one system in a separate process: train one pass over the documents and print the measurements.

    python -m scripts.benchmark.worker '{"system": "ours", "documents": "outputs/bench/mix_512.json", …}'

Started by scripts.benchmark. Prints one JSON object: seconds, peak_mib (resident memory above the loaded model, or
allocated memory on CUDA), documents, tokens, chunks; for ours also expected_mib and expected_seconds (see
modeling/training/memory.py).
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, TrainerCallback

import modeling.hierarchical_roberta.modeling_hierarchical_roberta as hierarchical
from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from modeling.hierarchical_roberta.chunking import tokenize_batch
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.memory import estimate_memory, seconds_per_chunk
from modeling.training.runtime import configure_malloc, set_num_threads
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.benchmark.meter import Meter
from scripts.benchmark.padded_loop import PaddedCollator, PaddedLoop
from scripts.training.embedding_cache import cached_chunk_vectors

# Options of each system that differ from `ours`, which enables every optimization.
SYSTEMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, fp32": {"bf16": False},
    "ours, freed memory given back": {"settles_memory": False},
    "ours, attention dropout 0.1": {"attention_dropout": 0.1},
    "ours, one chunk at a time": {"chunks_at_once": 0},
    "ours, chunks not sorted by length": {"sorts": False},
    "ours, 16 live chunks": {"live_chunks": 16},
    "ours, gradient checkpointing": {"gradient_checkpointing": True},
    "padded loop, gradient checkpointing": {
        "padded": True,
        "bf16": False,
        "attention_dropout": 0.1,
        "gradient_checkpointing": True,
    },
    "padded loop": {"padded": True, "bf16": False, "attention_dropout": 0.1},
    "padded loop, bf16, attention dropout 0": {"padded": True},
    "bare encoder": {},
}
CHUNKS_AT_ONCE = 8


class _Epochs(TrainerCallback):
    """Measures each epoch. Warm-up happens before the first."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.seconds: list[float] = []

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.stop()
        self.seconds.append(self.meter.seconds)


def texts_of(spec: dict[str, Any]) -> list[str]:
    return json.loads(Path(spec["documents"]).read_text(encoding="utf-8"))


def chunked_documents(spec: dict[str, Any], tokenizer: Any) -> ChunkedDocuments:
    texts = texts_of(spec)
    rows = {"id": [str(i) for i in range(len(texts))], "label": [i % 3 for i in range(len(texts))]}
    table = datasets.Dataset.from_dict({**rows, **tokenize_batch(texts, tokenizer)})
    return ChunkedDocuments(
        table, tokenizer, chunk_length=spec["chunk_length"], max_chunks=spec["max_chunks"], chunk_policy="head"
    )


def training_arguments(**overrides: Any) -> HierarchicalTrainingArguments:
    return HierarchicalTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **overrides,
    )


def build(spec: dict[str, Any], options: dict[str, Any]) -> HierarchicalRobertaForSequenceClassification:
    kind = PaddedLoop if options.get("padded") else HierarchicalRobertaForSequenceClassification
    model = kind.from_encoder(
        spec["encoder"],
        num_labels=3,
        chunk_length=spec["chunk_length"],
        max_chunks=spec["max_chunks"],
        dropout=0.1,
        attention_dropout=options.get("attention_dropout", 0.0),
    )
    model.token_budget = max(1, options.get("chunks_at_once", CHUNKS_AT_ONCE) * spec["chunk_length"])
    model.live_chunks = options.get("live_chunks", 0)
    if options.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable()  # for the warm-up; Trainer enables it when training starts
    return model


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """One training pass of this project or of the padded loop, with the same trainer."""
    options = SYSTEMS[spec["system"]]
    tokenizer = AutoTokenizer.from_pretrained(spec["encoder"])
    documents = chunked_documents(spec, tokenizer)
    args = training_arguments(
        num_train_epochs=1,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=2,
        bf16=options.get("bf16", True),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
    )
    model = build(spec, options).to(args.device)
    if options.get("settles_memory", not options.get("padded")):
        configure_malloc(model, args.device)
    if not options.get("sorts", True):
        hierarchical.plan_encoder_batches = batches_in_order
    pad = tokenizer.pad_token_id
    collator = (
        PaddedCollator(pad, spec["max_chunks"], spec["chunk_length"])
        if options.get("padded")
        else DocumentCollator(pad)
    )
    lengths = [[len(chunk) for chunk in documents[i]["input_ids"]] for i in range(len(documents))]
    counts = {"documents": len(lengths), "tokens": sum(map(sum, lengths)), "chunks": sum(map(len, lengths))}
    meter = Meter(args.device)
    epochs = _Epochs(meter)
    trainer = WeightedTrainer(
        model=model, args=args, train_dataset=documents, data_collator=collator, callbacks=[epochs]
    )
    warm_up(trainer, collator([documents[i] for i in range(min(spec["batch"], len(documents)))]))
    trainer.train()
    result: dict[str, Any] = meter.result() | counts
    if spec["system"] == "ours":
        estimate = estimate_memory(model, trainer.accelerator.autocast)
        largest = sum(sorted((sum(chunks) for chunks in lengths), reverse=True)[: spec["batch"]]) / spec["chunk_length"]
        result["expected_mib"] = estimate.peak(largest) / 2**20
        result["expected_seconds"] = sum(seconds_per_chunk(model, trainer.accelerator.autocast)) * (
            result["tokens"] / spec["chunk_length"]
        )
    return result


def batches_in_order(lengths: list[int], token_budget: int, batch_cost: int, live_chunks: int = 0) -> list[list[int]]:
    """Encoder batches of consecutive chunks, unsorted, each padded to its longest chunk."""
    rows, size = range(len(lengths)), max(1, token_budget // max(lengths))
    return [sorted(rows[start : start + size], key=lambda i: -lengths[i]) for start in rows[::size]]


def warm_up(trainer: WeightedTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Warm up threads, kernels, buffers and optimizer state with one step before timing starts."""
    optimizer = trainer.create_optimizer()
    with trainer.accelerator.autocast():
        trainer.training_step(trainer.model, batch, torch.tensor(1.0))  # the divisor of the loss; any will do
    optimizer.step()
    optimizer.zero_grad()


def bare_encoder(spec: dict[str, Any]) -> dict[str, Any]:
    """Roofline: forward and backward pass of the encoder alone on as many real tokens, in full, dense batches."""
    args = training_arguments(bf16=True)
    tokenizer = AutoTokenizer.from_pretrained(spec["encoder"])
    documents = chunked_documents(spec, tokenizer)
    lengths = [len(chunk) for i in range(len(documents)) for chunk in documents[i]["input_ids"]]
    config = AutoConfig.from_pretrained(spec["encoder"], attention_probs_dropout_prob=0.0)
    encoder = AutoModel.from_pretrained(spec["encoder"], config=config, add_pooling_layer=False).to(args.device).train()
    meter = Meter(args.device)

    def encode(tokens: int) -> None:
        while tokens > 0:
            length = min(spec["chunk_length"], tokens)
            rows = max(1, min(CHUNKS_AT_ONCE, tokens // length))
            ids_nl = torch.randint(5, config.vocab_size, (rows, length), device=args.device)
            with torch.autocast(args.device.type, torch.bfloat16):
                mean = encoder(input_ids=ids_nl).last_hidden_state.float().mean()
            mean.backward()
            tokens -= ids_nl.numel()

    encode(2 * CHUNKS_AT_ONCE * spec["chunk_length"])
    meter.start()
    encode(sum(lengths))
    meter.stop()
    return meter.result() | {"documents": len(documents), "tokens": sum(lengths), "chunks": len(lengths)}


def frozen_encoder(spec: dict[str, Any]) -> dict[str, Any]:
    """Duration of the first epoch with a frozen encoder, which encodes every chunk, and of the later ones."""
    tokenizer = AutoTokenizer.from_pretrained(spec["encoder"])
    documents = chunked_documents(spec, tokenizer)
    args = training_arguments(num_train_epochs=5, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    model = build(spec, {})
    model.freeze_encoder()
    collator, meter = DocumentCollator(tokenizer.pad_token_id), Meter(args.device)
    epochs = _Epochs(meter)
    trainer = WeightedTrainer(model=model, args=args, train_dataset=documents, data_collator=collator)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        vectors = cached_chunk_vectors(model, {"train": documents}, collator, Path(folder), trainer.accelerator)
        encoding = time.perf_counter() - started
        trainer.train_dataset = vectors["train"]
        trainer.add_callback(epochs)
        trainer.train()
    first, *later = epochs.seconds
    stats = trainer.stats.synchronize()
    return meter.result() | {
        "seconds": encoding + first,
        "later_seconds": sum(later) / len(later),
        "data_wait_share": stats["data_seconds"] / stats["seconds"],
        "documents": len(documents),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(spec.get("seed", 0))
    set_num_threads()
    kinds = {"bare encoder": bare_encoder, "frozen encoder": frozen_encoder}
    print(json.dumps(kinds.get(spec["system"], train)(spec)))


if __name__ == "__main__":
    main()
