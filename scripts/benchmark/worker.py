"""One contestant, in a process of its own: trains a pass over the documents and says what it took.

    python -m scripts.benchmark.worker '{"contestant": "ours", "documents": "outputs/bench/mix.json", …}'

Started by scripts.benchmark. Prints one JSON object: seconds, peak_mib (resident memory above the loaded model, or
allocated memory on CUDA), documents, tokens, chunks.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModel, AutoTokenizer, TrainerCallback

from data.chunking import ChunkedDocuments, tokenize_batch
from data.collator import DocumentCollator
from modeling.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.trainer import WeightedTrainer
from modeling.training_args import HierarchicalTrainingArguments
from scripts.benchmark.meter import Meter
from scripts.benchmark.padded_loop import PaddedCollator, PaddedLoop

# What each contestant is: the options that differ from ours. `ours` has every lever on.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, fp32": {"bf16": False},
    "ours, attention dropout 0.1": {"attention_dropout": 0.1},
    "ours, one chunk at a time": {"token_budget": 1},
    "ours, not sorted by length": {"sorts": False},
    "ours, 8 live chunks": {"live_chunks": 8},
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


class _Pass(TrainerCallback):
    """Measures the first epoch; the warm-up came before it."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.meter.start()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.stop()


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """A training pass of the project, or of the padded loop, by the same trainer."""
    options = CONTESTANTS[spec["contestant"]] | spec.get("options", {})
    padded = options.get("padded", False)
    tokenizer = AutoTokenizer.from_pretrained(spec["encoder"])
    texts = json.loads(Path(spec["documents"]).read_text(encoding="utf-8"))
    rows = {"id": [str(i) for i in range(len(texts))], "label": [i % 3 for i in range(len(texts))]}
    tokens = tokenize_batch(texts, tokenizer)
    documents = ChunkedDocuments(
        datasets.Dataset.from_dict({**rows, **tokens}),
        tokenizer,
        chunk_length=spec["chunk_length"],
        max_chunks=spec["max_chunks"],
    )
    args = HierarchicalTrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=-(-len(texts) // spec["batch"]),
        bf16=options.get("bf16", True),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    kind = PaddedLoop if padded else HierarchicalRobertaForSequenceClassification
    model = kind.from_encoder(
        spec["encoder"],
        num_labels=3,
        chunk_length=spec["chunk_length"],
        max_chunks=spec["max_chunks"],
        dropout=0.1,
        attention_dropout=options.get("attention_dropout", 0.0),
    ).to(args.device)
    model.live_chunks, model.token_budget = options.get("live_chunks", 0), options.get("token_budget", 4096)
    pad_token_id = tokenizer.pad_token_id
    collator = (
        PaddedCollator(pad_token_id, spec["max_chunks"], spec["chunk_length"])
        if padded
        else DocumentCollator(pad_token_id)
    )
    meter = Meter(args.device)
    trainer = WeightedTrainer(
        model=model, args=args, train_dataset=documents, data_collator=collator, callbacks=[_Pass(meter)]
    )
    warm_up(model.encoder, spec, args)
    trainer.train()
    lengths = [len(chunk) for i in range(len(documents)) for chunk in documents[i]["input_ids"]]
    return meter.result() | {"documents": len(texts), "tokens": sum(lengths), "chunks": len(lengths)}


def bare_encoder(spec: dict[str, Any]) -> dict[str, Any]:
    """The roofline: forward and backward of the encoder alone over as many real tokens, in full dense batches."""
    from transformers import AutoConfig

    args = HierarchicalTrainingArguments(output_dir=tempfile.mkdtemp(), bf16=True, report_to="none")
    texts = json.loads(Path(spec["documents"]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(spec["encoder"])
    body = spec["chunk_length"] - 2
    lengths = [len(ids) for ids in tokenize_batch(texts, tokenizer)["input_ids"]]
    chunks = sum(-(-length // body) for length in lengths)
    tokens = sum(lengths) + 2 * chunks
    config = AutoConfig.from_pretrained(spec["encoder"], attention_probs_dropout_prob=0.0)
    encoder = AutoModel.from_pretrained(spec["encoder"], config=config, add_pooling_layer=False).to(args.device).train()
    rows = max(1, 4096 // spec["chunk_length"])
    meter = Meter(args.device)
    warm_up(encoder, spec, args)
    meter.start()
    left = tokens
    while left > 0:
        length = min(spec["chunk_length"], left)
        ids_nl = torch.randint(1000, 20000, (max(1, min(rows, left // length)), length), device=args.device)
        with torch.autocast(args.device.type, torch.bfloat16):
            loss = encoder(input_ids=ids_nl).last_hidden_state.float().mean()
        loss.backward()
        left -= ids_nl.numel()
    meter.stop()
    return meter.result() | {"documents": len(texts), "tokens": tokens, "chunks": chunks}


def warm_up(encoder: torch.nn.Module, spec: dict[str, Any], args: HierarchicalTrainingArguments) -> None:
    """Threads, kernels and buffers before the clock runs: one chunk, forward and backward."""
    ids_nl = torch.ones(1, spec["chunk_length"], dtype=torch.long, device=args.device)
    with torch.autocast(args.device.type, torch.bfloat16):
        encoder(input_ids=ids_nl).last_hidden_state.float().mean().backward()
    encoder.zero_grad()


def main() -> None:
    spec = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(spec.get("seed", 0))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    started = time.perf_counter()
    result = bare_encoder(spec) if spec["contestant"] == "bare encoder" else train(spec)
    print(json.dumps(result | {"whole_seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
