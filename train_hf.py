"""Train a hierarchical classifier of long documents.

    accelerate launch --config_file accelerate_config.yaml train_hf.py --config scripts/recipes/roberta_base.yaml \\
        --dataset_dir outputs/stories --output_dir outputs/run

parse → data → model → WeightedTrainer → train → evaluate → export. Every field of TrainingArguments is an option too;
a recipe gives defaults and the command line overrides them.
"""

import logging
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase, ProgressCallback, set_seed

from data.chunked import ChunkedDocuments
from data.chunking import chunk_sizes, coverage, special_token_frame
from data.collator import DocumentCollator
from data.prepared import load_prepared, num_tokens_of
from modeling.calibration import fit_temperature
from modeling.callbacks import EarlyStopping, History, LogLines, StopOnSignal, write_json
from modeling.checkpoints import find_checkpoint
from modeling.health import HealthWatch, extreme_weights_message, frozen_model_message
from modeling.losses import balanced_class_weights
from modeling.metrics import check_metric_name, compute_metrics_fn
from modeling.model_card import latex_paragraph, model_card
from modeling.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.resources import settle_freed_memory, use_all_cores
from modeling.tensorboard import TensorBoard
from modeling.trainer import WeightedTrainer
from modeling.training_args import (
    HierarchicalTrainingArguments,
    parse_class_weights,
    parse_severity_weights,
)
from scripts.chunk_vectors import cache_key, cached_chunk_vectors, document_means
from scripts.command_line import run_main
from scripts.hub import claim_repo, fetch_last_checkpoint, set_timeout, take_token_off_the_command_line
from scripts.hub_pusher import HubPusher
from scripts.output_dir import claim_output_dir, clear_earlier_run, remove_if_empty
from scripts.predictions import write_predictions
from scripts.prepare_dataset import load_tokenizer
from scripts.recipe import parse_with_recipe
from scripts.run_plan import Documents, choose_live_chunks, describe_run
from scripts.run_record import run_record

logger = logging.getLogger("train_hf")


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
    dropout: float | None = field(default=None, metadata={"help": "Every dropout but attention's, encoder and head."})
    attention_dropout: float | None = field(default=None, metadata={"help": "The encoder's attention dropout."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "The encoder's attention: sdpa (the default), flash_attention_2, eager."}
    )


@dataclass
class DataArguments:
    """The documents."""

    dataset_dir: str = field(metadata={"help": "A folder made by scripts.prepare_dataset."})


def main(model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments) -> int:
    """One run, stage by stage. Returns the exit status."""
    set_up_logging(args)
    if args.device.type == "cpu":
        logger.info(f"{use_all_cores(args.cpu_threads)} threads on the CPU.")
    pusher = start_pushing(args)
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
    collator = DocumentCollator(tokenizer.pad_token_id)
    trainer = WeightedTrainer(
        model=model,
        args=args,
        class_weights=class_weights,
        head_lr_multiplier=args.head_lr_multiplier,
        document_costs=sizes["train"].costs(model.config.hidden_size).tolist(),
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
    config = run_record((model_args, data_args, args), args, manifest, splits, class_weights)
    documents: dict[str, Any] = dict(chunked)
    if args.freeze_encoder:
        key = cache_key(model, manifest["data_fingerprint"], args.precision)
        folder = Path(data_args.dataset_dir) / ".chunk_vectors" / key
        vectors = cached_chunk_vectors(model, chunked, collator, folder, trainer.accelerator)
        model.standardize(document_means(vectors["train"]))
        documents = dict(vectors)
    trainer.train_dataset, trainer.eval_dataset = documents["train"], documents["validation"]
    history, health, stop = add_callbacks(trainer, labels, config, args)
    if pusher is not None:
        trainer.add_callback(pusher)
    if checkpoint is None and args.should_save:
        clear_earlier_run(args.output_dir)
    with stop.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
        stop.agree(args)
    if pusher is not None and (health.failure or stop.exit_status):
        pusher.finish(None, seconds=args.grace_seconds, final=False)
    if health.failure:
        raise ValueError(health.failure)
    if stop.exit_status:
        logger.warning(
            f"Stopped by a signal after step {trainer.state.global_step}; its checkpoint is saved. Go on with "
            "--resume_from_checkpoint auto."
        )
        return stop.exit_status
    # On the tokens, also where the encoder was frozen: kept vectors have the precision of training.
    metrics = evaluate_splits(trainer, chunked, splits, labels)
    export(trainer, history, metrics, labels)
    if pusher is None:
        return 0
    last = find_checkpoint(args.output_dir, "auto")
    return 0 if pusher.finish(Path(last) if last else None) else 1


# ---- the stages ------------------------------------------------------------------------------------------------------


def set_up_logging(args: HierarchicalTrainingArguments) -> None:
    """Everything logged, warnings included, to the terminal and, on the first process, to training.log."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(args.get_process_log_level() if args.log_level != "passive" else logging.INFO)
    if args.should_save and not args.dry_run:
        folder = Path(args.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output_dir {folder} is a file; expected a folder or a new name.")
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "training.log", encoding="utf-8"))
    if args.process_index > 0:
        handlers[0].setLevel(logging.WARNING)
    layout = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    for handler in handlers:
        handler.setFormatter(layout)
    for name in ("datasets", "httpx", "httpx2", "fsspec", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers.trainer").setLevel(logging.INFO)
    logger.info(f"Precision: {args.precision} ({args.precision_reason}).")


def start_pushing(args: HierarchicalTrainingArguments) -> HubPusher | None:
    """What pushes the run to the hub, on the first process, once it is sure that it may; and with
    `--resume_from_checkpoint hub` the checkpoint from there. Trainer itself is told to push nothing.

    Raises:
        ValueError: on every process, where the hub cannot be pushed to.
    """
    wants_push, args.push_to_hub = args.push_to_hub, False
    if args.dry_run or (not wants_push and args.resume_from_checkpoint != "hub"):
        return None
    repo_id, error = args.hub_model_id or Path(args.output_dir).resolve().name, None
    if args.process_index == 0:
        try:
            set_timeout(args.hub_timeout)
            if wants_push:
                repo_id = claim_repo(repo_id, args.hub_private_repo, args.hub_allow_public, args.hub_revision)
            if args.resume_from_checkpoint == "hub":
                args.resume_from_checkpoint = str(
                    fetch_last_checkpoint(repo_id, args.hub_revision, Path(args.output_dir))
                )
        except ValueError as reason:
            error = reason
    # The very checkpoint that was fetched: one that did not arrive whole is an error, and not a new beginning.
    [repo_id, error, args.resume_from_checkpoint] = broadcast_object_list([repo_id, error, args.resume_from_checkpoint])
    if error is not None:
        raise error
    if not wants_push or args.process_index:
        return None
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    logger.info(f"Pushing to {repo_id} on the hub, {strategy}.")
    return HubPusher(Path(args.output_dir), repo_id, strategy, args.hub_revision, args.hub_timeout)


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
    geometry = ("chunk_length", "chunk_overlap", "max_chunks", "chunk_policy", "pooling", "pooling_size")
    try:
        model = HierarchicalRobertaForSequenceClassification.from_encoder(
            model_args.encoder,
            dropout=model_args.dropout,
            attention_dropout=model_args.attention_dropout,
            attn_implementation=model_args.attn_implementation,
            revision=model_args.encoder_revision,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            chunk_transformer_layers=model_args.chunk_transformer_layers,
            **{name: getattr(model_args, name) for name in geometry},
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
    health, stop = HealthWatch(trainer), StopOnSignal()
    history = History(trainer, early_stopping, config)
    trainer.remove_callback(ProgressCallback)
    for callback in (LogLines(), early_stopping, TensorBoard(trainer, labels, config), health, stop, history):
        trainer.add_callback(callback)
    return history, health, stop


def evaluate_splits(
    trainer: WeightedTrainer, documents: dict[str, Any], splits: datasets.DatasetDict, labels: list[str]
) -> dict[str, dict[str, float]]:
    """Metrics of the best model on validation and test, and predictions_SPLIT.csv of each.

    The temperature of the scores is fitted on validation, and saved with the model."""
    metrics: dict[str, dict[str, float]] = {}
    config = trainer.accelerator.unwrap_model(trainer.model).config
    for split in ("validation", "test"):
        if split not in documents:
            continue
        output = trainer.predict(documents[split], metric_key_prefix=split)
        timing = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
        named = {name.removeprefix(f"{split}_"): value for name, value in (output.metrics or {}).items()}
        metrics[split] = {name: value for name, value in named.items() if name not in timing}
        logits = np.asarray(output.predictions, dtype=np.float64)
        if split == "validation":
            config.temperature = fit_temperature(logits, np.asarray(output.label_ids))
            logger.info(f"Scores are softmax(logits / {config.temperature:.3f}), fitted on validation.")
        if trainer.is_world_process_zero():
            scores = softmax(logits / config.temperature, axis=1)
            write_predictions(Path(trainer.args.output_dir) / f"predictions_{split}.csv", splits[split], labels, scores)
        logger.info(f"{split}: macro-F1 {metrics[split]['f1_macro']:.4f}, loss {metrics[split]['loss']:.4f}.")
    return metrics


def export(trainer: WeightedTrainer, history: History, metrics: dict[str, dict[str, float]], labels: list[str]) -> None:
    """The best model, complete, at the top of output_dir, with its metrics and its card."""
    args = trainer.args
    folder = Path(args.output_dir)
    partial = folder / ".export"
    trainer.save_model(str(partial))
    if not trainer.is_world_process_zero():
        return
    # The weights last: where they are, everything that they need is.
    for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(folder / path.name)
    partial.rmdir()
    write_json(folder / "metrics.json", metrics)
    record = history.record(args, trainer.state)
    (folder / "README.md").write_text(model_card(record, metrics, labels), encoding="utf-8")
    (folder / "training.tex").write_text(latex_paragraph(record, metrics, labels), encoding="utf-8")
    best = (record["best"] or {}).get("epoch")
    chosen = f"Best epoch {best}" if args.load_best_model_at_end else "Last epoch"
    logger.info(
        f"{chosen}: the model, its metrics and its card are in {folder}. "
        f"Watch the curves with: tensorboard --logdir {folder}/runs"
    )


def command() -> int:
    """The command line → `main`."""
    take_token_off_the_command_line()
    kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
    return main(*parse_with_recipe(kinds, sys.argv[1:], description=__doc__))


if __name__ == "__main__":
    sys.exit(run_main(command))
