"""Train a hierarchical classifier of long documents.

    accelerate launch --config_file accelerate_config.yaml train_hf.py --config scripts/recipes/roberta_base.yaml \\
        --dataset_dir outputs/stories --output_dir outputs/run

parse → data → model → WeightedTrainer → train → evaluate → export. Every field of TrainingArguments is an option too;
a recipe gives defaults and the command line overrides them.
"""

import logging
import pickle
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed import DistError
from transformers import PreTrainedTokenizerBase, ProgressCallback, set_seed

from data.chunked import ChunkedDocuments
from data.chunking import chunk_sizes, coverage, special_token_frame
from data.collator import DocumentCollator
from data.prepared import load_prepared, num_tokens_of
from data.streamed import StreamedDocuments, prepared_stream, source_stream
from modeling.callbacks import EarlyStopping, History, LogLines, StopOnSignal
from modeling.checkpoints import find_checkpoint
from modeling.health import HealthWatch, extreme_weights_message, frozen_model_message
from modeling.losses import balanced_class_weights
from modeling.metrics import check_metric_name, compute_metrics_fn
from modeling.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.resources import settle_freed_memory, use_all_cores
from modeling.resumable_trainer import GivenUp
from modeling.tensorboard import TensorBoard
from modeling.trainer import WeightedTrainer
from modeling.training_args import (
    HierarchicalTrainingArguments,
    parse_class_weights,
    parse_severity_weights,
)
from scripts.chunk_vectors import cache_key, cached_chunk_vectors, document_means
from scripts.command_line import run_main
from scripts.hub import take_token_off_the_command_line
from scripts.hub_pusher import HubPusher, start_pushing
from scripts.lexical_view import fit_lexical_view
from scripts.logs import set_up_logging
from scripts.output_dir import claim_output_dir, clear_earlier_run, lock_output_dir, remove_if_empty
from scripts.prepare_dataset import load_tokenizer
from scripts.recipe import parse_with_recipe
from scripts.run_plan import Documents, choose_live_chunks, describe_run
from scripts.run_record import run_record
from scripts.run_results import evaluate_splits, export

logger = logging.getLogger("train_hf")
# How gloo's errors, which have no type of their own, tell that another process is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")


@dataclass
class ModelArguments:
    """The encoder and what is built on it."""

    encoder: str = field(metadata={"help": "Encoder: name on the hub or folder."})
    encoder_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the encoder on the hub."})
    chunk_length: int = field(default=512, metadata={"help": "Tokens in a chunk, special tokens included."})
    chunk_overlap: int = field(default=0, metadata={"help": "Tokens that a chunk shares with the one before it."})
    max_chunks: int = field(default=20, metadata={"help": "The most chunks of a document that are read."})
    chunk_policy: str = field(
        default="uniform", metadata={"help": "Past max_chunks: head, head_tail, uniform, random."}
    )
    pooling: str = field(default="attention", metadata={"help": "attention, mean or max."})
    pooling_size: int | None = field(default=None, metadata={"help": "Width of the attention's hidden layer."})
    chunk_transformer_layers: int = field(default=0, metadata={"help": "Transformer layers over the chunk vectors."})
    lexical_features: int = field(
        default=0, metadata={"help": "Tokens whose counts in the whole document weigh in beside the encoder."}
    )
    dropout: float | None = field(default=None, metadata={"help": "Every dropout but attention's, encoder and head."})
    attention_dropout: float | None = field(default=None, metadata={"help": "The encoder's attention dropout."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The encoder's attention: sdpa (the default), flash_attention_2, eager."}
    )


@dataclass
class DataArguments:
    """The documents."""

    dataset_dir: str = field(metadata={"help": "A folder made by scripts.prepare_dataset."})
    train_source: str | None = field(
        default=None,
        metadata={
            "help": "With --streaming: CSV, JSONL, Parquet or the like with columns text and label, read in place of the "
            "prepared training split (which then tells labels, class weights and lengths). Default: that split."
        },
    )


def main(model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments) -> int:
    """One run. Returns the exit status."""
    writes = args.process_index == 0 and not args.dry_run
    with lock_output_dir(Path(args.output_dir)) if writes else nullcontext():
        set_up_logging(Path(args.output_dir) if writes else None, terminal_level(args))
        logger.info(f"Precision: {args.precision} ({args.precision_reason}).")
        if args.device.type == "cpu":
            logger.info(f"{use_all_cores(args.cpu_threads)} threads on the CPU.")
        try:
            with start_pushing(args) or nullcontext() as pusher:
                return run(model_args, data_args, args, pusher)
        except RuntimeError as error:
            if args.world_size > 1 and (isinstance(error, DistError) or any(sign in str(error) for sign in LOST)):
                raise ValueError(lost_contact_message(args.process_index, error)) from error
            raise
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"A file of the checkpoint {args.resume_from_checkpoint} holds more than tensors, and is not loaded, since "
                f"it could run code ({str(error).splitlines()[0]})."
            ) from error


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: HierarchicalTrainingArguments,
    pusher: HubPusher | None,
) -> int:
    """The run, stage by stage. Returns the exit status."""
    if data_args.train_source and not args.streaming:
        raise ValueError("--train_source is read as a stream: say --streaming too, or prepare the source.")
    resume, overwrite = args.resume_from_checkpoint, args.overwrite_output_dir
    checkpoint = None if args.dry_run else claim_output_dir(args.output_dir, resume, overwrite)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.encoder, model_args.encoder_revision)
    splits, manifest = load_prepared(data_args.dataset_dir, tokenizer)
    labels = splits["train"].features["label"].names
    class_weights = choose_class_weights(splits["train"], labels, args.class_weights)
    severity_weights = parse_severity_weights(args.severity_weights, len(labels))
    check_metric_name(args.metric_for_best_model, labels)
    model = build_model(model_args, labels, args)
    chunked, sizes = chunk_splits(splits, tokenizer, model, args)
    collator = DocumentCollator(tokenizer.pad_token_id, with_ids=True)
    trainer = WeightedTrainer(
        model=model,
        args=args,
        class_weights=class_weights,
        head_lr_multiplier=args.head_lr_multiplier,
        document_costs=sizes["train"].costs(model.config.hidden_size),
        max_loss_spike=args.max_loss_spike,
        data_collator=collator,
        train_dataset=chunked["train"],
        eval_dataset=chunked["validation"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics_fn(labels, severity_weights),
    )
    plan_memory(model, sizes, args, trainer.accelerator)
    if args.dry_run:
        if args.should_save:
            print(describe_run(model, sizes, args, trainer.accelerator.autocast))
            remove_if_empty(args.output_dir)
        return 0
    if model.lexical is not None:
        fit_lexical_view(model.lexical, chunked["train"], class_weights, args.process_index)
    config = run_record((model_args, data_args, args), args, manifest, splits, class_weights)
    documents: dict[str, Any] = dict(chunked)
    if args.freeze_encoder:
        key = cache_key(model, manifest["data_fingerprint"], args.precision)
        folder = Path(data_args.dataset_dir) / ".chunk_vectors" / key
        vectors = cached_chunk_vectors(model, chunked, collator, folder, trainer.accelerator)
        model.standardize(document_means(vectors["train"]))
        documents = dict(vectors)
    if args.streaming:
        documents["train"] = stream_of(data_args.train_source, chunked["train"], labels, args)
    trainer.train_dataset, trainer.eval_dataset = documents["train"], documents["validation"]
    history, health, stop = add_callbacks(trainer, labels, config, args)
    if pusher is not None:
        trainer.add_callback(pusher)
    if checkpoint is None and args.should_save:
        clear_earlier_run(args.output_dir)
    with stop.listening():
        with suppress(GivenUp):  # in an evaluation before the first step
            trainer.train(resume_from_checkpoint=checkpoint)
        stop.agree()
    trainer.stop = None
    if health.failure or stop.exit_status:
        if pusher is not None:
            left = stop.seconds_left if stop.exit_status else args.grace_seconds
            pusher.finish(None, seconds=max(left, 1.0), final=False)
        # A launcher ends the other processes as soon as one has failed: the first one first pushes what it has.
        trainer.accelerator.wait_for_everyone()
    if health.failure:
        raise ValueError(health.failure)
    if stop.exit_status:
        step = trainer.state.global_step
        saved = (
            f"after step {step}; its checkpoint is saved"
            if step
            else "before a step was done; there is nothing to save"
        )
        logger.warning(f"Stopped by a signal {saved}. Go on with --resume_from_checkpoint auto.")
        return stop.exit_status
    # On the tokens, also where the encoder was frozen: kept vectors have the precision of training.
    metrics = evaluate_splits(trainer, chunked, splits, labels)
    export(trainer, history, metrics, labels)
    if pusher is None:
        return 0
    last = find_checkpoint(args.output_dir, "auto")
    return 0 if pusher.finish(Path(last) if last else None) else 1


# ---- the stages ------------------------------------------------------------------------------------------------------


def lost_contact_message(process: int, error: RuntimeError) -> str:
    """What a process says whose collective call failed, since another one is gone."""
    return (
        f"Process {process} has lost the others ({' '.join(str(error).split())[:200]}): one of them has ended, as the "
        "launcher says below, or its machine cannot be reached. Start all of them again with --resume_from_checkpoint auto."
    )


def terminal_level(args: HierarchicalTrainingArguments) -> int:
    """From which level on this process says on the terminal what it logs."""
    if args.process_index > 0:
        return logging.WARNING
    return args.get_process_log_level() if args.log_level != "passive" else logging.INFO


def choose_class_weights(train: datasets.Dataset, labels: list[str], choice: str) -> torch.Tensor | None:
    """Class weights (K,) from the training labels, as given, or None."""
    weights = parse_class_weights(choice, labels)
    counts = np.bincount(np.asarray(train["label"], dtype=np.int64), minlength=len(labels)).tolist()
    if absent := [label for label, count in zip(labels, counts, strict=True) if count == 0]:
        raise ValueError(
            f"No training document is labelled {', '.join(absent)}: the class cannot be learned. Give some, "
            "or prepare the data without that label."
        )
    if weights == "none":
        return None
    tensor = (
        balanced_class_weights(dict(zip(labels, counts, strict=True)))
        if weights == "balanced"
        else torch.tensor(weights)
    )
    by_label = dict(zip(labels, tensor.tolist(), strict=True))
    count_of = dict(zip(labels, counts, strict=True))
    shown = ", ".join(f"{label} {weight:.2f} ({count_of[label]} documents)" for label, weight in by_label.items())
    logger.info(f"Class weights: {shown}.")
    if message := extreme_weights_message(by_label, count_of):
        logger.warning(message)
    return tensor


def build_model(
    model_args: ModelArguments, labels: list[str], args: HierarchicalTrainingArguments
) -> HierarchicalRobertaForSequenceClassification:
    """Encoder and new head, with the chunk geometry in the config."""
    geometry = ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy")
    parts = ("pooling", "pooling_size", "chunk_transformer_layers", "lexical_features")
    try:
        model = HierarchicalRobertaForSequenceClassification.from_encoder(
            model_args.encoder,
            dropout=model_args.dropout,
            attention_dropout=model_args.attention_dropout,
            attn_implementation=model_args.attn_implementation,
            revision=model_args.encoder_revision,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **{name: getattr(model_args, name) for name in (*geometry, *parts)},
        )
    except (OSError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"The encoder {model_args.encoder!r} cannot be loaded: {error}") from error
    model.token_budget = args.token_budget
    if args.freeze_encoder:
        model.freeze_encoder()
    model.freeze_layers(args.freeze_layers)
    if args.compile_layers:
        model.compile_layers()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    if message := frozen_model_message(model):
        raise ValueError(message)
    logger.info(f"{model.count_trainable_parameters():,} of {model.num_parameters():,} parameters are trained.")
    return model


def chunk_splits(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model: HierarchicalRobertaForSequenceClassification,
    args: HierarchicalTrainingArguments,
) -> tuple[dict[str, ChunkedDocuments], dict[str, Documents]]:
    """Each split as chunks, after saying what share of it is cut; and its documents' lengths."""
    config = model.config
    if args.dataloader_persistent_workers and config.chunk_policy == "random":
        raise ValueError(
            "Persistent loader workers would draw the same random chunks in every epoch: leave "
            "--dataloader_persistent_workers out, or choose another --chunk_policy."
        )
    chunked, sizes = {}, {}
    num_special = sum(map(len, special_token_frame(tokenizer)))
    for name, part in splits.items():
        chunked[name] = ChunkedDocuments(
            part,
            tokenizer,
            chunk_length=config.chunk_length,
            chunk_overlap=config.chunk_overlap,
            max_chunks=config.max_chunks,
            chunk_policy=config.chunk_policy,
            training=name == "train",
            seed=args.seed,
        )
        num_tokens = num_tokens_of(part)
        geometry = (config.chunk_length, config.chunk_overlap, config.max_chunks, num_special)
        sizes[name] = Documents(*chunk_sizes(num_tokens, *geometry))
        cut = coverage(num_tokens, chunked[name].chunker.body_length, config.chunk_overlap, config.max_chunks)
        logger.info(
            f"{name}: {cut['documents']} documents, {cut['tokens']:,} tokens; max_chunks ({config.max_chunks}, "
            f"{config.chunk_policy}) cuts {cut['documents_cut_share']:.1%} of documents and {cut['tokens_cut_share']:.1%} "
            "of tokens."
        )
    return chunked, sizes


def stream_of(
    source: str | None, train: ChunkedDocuments, labels: list[str], args: HierarchicalTrainingArguments
) -> StreamedDocuments:
    """This process's training documents as a stream, from a source or from the prepared split."""
    options = {"seed": args.seed, "buffer_size": args.shuffle_buffer}
    options |= {"process_index": args.process_index, "num_processes": args.world_size}
    return prepared_stream(train, **options) if source is None else source_stream(source, train, labels, **options)


def plan_memory(
    model: HierarchicalRobertaForSequenceClassification,
    sizes: dict[str, Documents],
    args: HierarchicalTrainingArguments,
    accelerator: Accelerator,
) -> None:
    """Bound the live chunks; the same on every process."""
    live_chunks = choose_live_chunks(model.to(args.device), sizes["train"], args, accelerator.autocast)
    [model.live_chunks] = broadcast_object_list([live_chunks])
    if args.device.type == "cpu":
        settle_freed_memory(model)
    if args.live_chunks == "auto" and not model.encoder_is_frozen:
        chosen = (
            f"{model.live_chunks} (the rest is encoded again)" if model.live_chunks else "0 (all that a batch has fit)"
        )
        logger.info(f"Live chunks, from the free memory: {chosen}.")


def add_callbacks(
    trainer: WeightedTrainer, labels: list[str], config: dict[str, Any], args: HierarchicalTrainingArguments
) -> tuple[History, HealthWatch, StopOnSignal]:
    """What watches the run. The history comes last: it takes the totals that the health watch reads."""
    early_stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_min_delta)
    health, stop = HealthWatch(trainer), StopOnSignal(args.grace_seconds, args.ddp_timeout)
    trainer.stop = stop
    history = History(trainer, early_stopping, config)
    trainer.remove_callback(ProgressCallback)
    for callback in (LogLines(), early_stopping, TensorBoard(trainer, labels, config), health, stop, history):
        trainer.add_callback(callback)
    return history, health, stop


def command() -> int:
    """The command line → `main`."""
    take_token_off_the_command_line()
    kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
    return main(*parse_with_recipe(kinds, sys.argv[1:], description=__doc__))


if __name__ == "__main__":
    sys.exit(run_main(command))
