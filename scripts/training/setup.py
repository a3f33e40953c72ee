"""From a run's options to what is trained: labels and their weights, the model, the documents in chunks, the memory that
they may take. Used by train_hf.py and scripts/search.py.
"""

import json
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from data.chunk_dataset import ChunkedDocuments
from data.prepared_dataset import num_tokens_of
from data.streaming import StreamedDocuments, prepared_stream, source_stream
from modeling.hierarchical_roberta.chunking import chunk_sizes, coverage, special_token_frame
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.losses import balanced_class_weights
from modeling.training.memory import SplitLengths, choose_live_chunks
from modeling.training.monitor import extreme_weights_message, frozen_model_message
from modeling.training.runtime import configure_malloc, use_flash_attention_on_cuda
from modeling.training.sharding import refuse_to_shard, shards_weights
from modeling.training.training_args import HierarchicalTrainingArguments, parse_class_weights

logger = logging.getLogger("train_hf")

# What makes the shapes of an encoder's weights, and what a model is made of beside it.
ENCODER_SHAPES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
MODEL_OPTIONS = ("pooling", "pooling_size", "chunk_transformer_layers", "lexical_features")


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
        default=0,
        metadata={"help": "Tokens whose counts in the chunks that are read weigh in beside the encoder. 0: none."},
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
    try:
        model = HierarchicalRobertaForSequenceClassification.from_encoder(
            model_args.encoder,
            dropout=model_args.dropout,
            attention_dropout=model_args.attention_dropout,
            attn_implementation=model_args.attn_implementation,
            revision=model_args.encoder_revision,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **{name: getattr(model_args, name) for name in (*geometry, *MODEL_OPTIONS)},
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


def check_checkpoint(folder: Path, config: HierarchicalRobertaConfig, data_fingerprint: str, needs_best: bool) -> None:
    """Warns where a checkpoint's data were others.

    Raises:
        ValueError: its model is another one than this; the best one of its run is wanted, and is not there.
    """
    theirs = HierarchicalRobertaConfig.from_json_file(folder / "config.json")
    for mine, its, names in (
        (config, theirs, ("id2label", *MODEL_OPTIONS)),
        (config.encoder_config, theirs.encoder_config, ENCODER_SHAPES),
    ):
        values = {name: (getattr(its, name, None), getattr(mine, name, None)) for name in names}
        if changed := {name: both for name, both in values.items() if both[0] != both[1]}:
            told = "; ".join(f"{name} {there} there, {here} here" for name, (there, here) in changed.items())
            raise ValueError(
                f"{folder} cannot be gone on from with another model ({told}): give the options and data that it was made "
                "with, or begin anew in another output_dir."
            )
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    best = folder.parent / f"checkpoint-{state.best_global_step}"
    is_there = best.is_dir() or Path(state.best_model_checkpoint or best).is_dir()
    if needs_best and state.best_global_step and not is_there:
        raise ValueError(
            f"The best checkpoint so far of the run that {folder} is of, {best.name}, is not beside it: copy it there too, "
            "or go on with --load_best_model_at_end False, which keeps the last model."
        )
    history = folder.parent / "training_history.json"
    if history.is_file():
        before = json.loads(history.read_text(encoding="utf-8"))["config"].get("data_fingerprint")
        if before != data_fingerprint:
            logger.warning(f"The data are not those that {folder} was trained on: the run goes on with the new ones.")


def chunk_splits(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model: HierarchicalRobertaForSequenceClassification,
    args: HierarchicalTrainingArguments,
) -> tuple[dict[str, ChunkedDocuments], dict[str, SplitLengths]]:
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
        sizes[name] = SplitLengths(*chunk_sizes(num_tokens, *geometry))
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
    sizes: dict[str, SplitLengths],
    args: HierarchicalTrainingArguments,
    accelerator: Accelerator,
) -> None:
    """Bound the live chunks; the same on every process, as the one with least memory can hold.

    Raises:
        ValueError: an option needs the whole model on each device, and its weights are to be sharded.
    """
    use_flash_attention_on_cuda()
    is_auto = args.live_chunks == "auto"
    if shards_weights(accelerator):
        refuse_to_shard(args)
        live_chunks = 0 if is_auto else int(args.live_chunks)
        if is_auto:
            logger.info("Live chunks: 0 (no limit). With sharded weights auto cannot measure them: give --live_chunks.")
    else:
        accelerator.wait_for_everyone()  # nccl takes memory when the ranks first meet
        live_chunks = choose_live_chunks(model.to(args.device), sizes["train"], args, accelerator.autocast)
        live_chunks = min((bound for bound in gather_object([live_chunks]) if bound), default=0)
        if is_auto and not model.encoder_is_frozen:
            chosen = f"{live_chunks} (the rest is recomputed)" if live_chunks else "0 (all that a batch has fit)"
            logger.info(f"Live chunks, from the free memory: {chosen}.")
    model.live_chunks = live_chunks
    configure_malloc(model, args.device)
