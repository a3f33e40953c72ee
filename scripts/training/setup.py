"""From a run's options to what is trained: tokenizer → documents → class weights → model → cached embeddings.

Used by train_hf.py and scripts/search.py.
"""

import json
import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from data.chunk_dataset import ChunkedDocuments
from data.collator import DocumentCollator
from data.documents import Columns, shorten
from data.labels import SINGLE, label_array, label_counts
from data.prepared_dataset import load_prepared, num_tokens_of
from data.readers import ReadOptions
from data.streaming import StreamedDocuments, prepared_stream, source_stream
from data.tokenization import load_tokenizer
from modeling.hierarchical_roberta.chunking import Chunker, chunk_sizes, coverage
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import (
    LEXICAL_WEIGHTINGS,
    HierarchicalRobertaConfig,
)
from modeling.hierarchical_roberta.encoders import trained_config
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.lora import add_adapters
from modeling.training.memory import SplitLengths, choose_live_chunks
from modeling.training.monitor import frozen_model_message
from modeling.training.optimizer import optimizer_class_and_kwargs
from modeling.training.runtime import configure_malloc, use_flash_attention_on_cuda
from modeling.training.sharding import refuse_to_shard, shards_weights
from modeling.training.step_conversion import is_being_converted
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import (
    HierarchicalTrainingArguments,
    parse_class_weights,
)
from scripts.training.arguments import CHUNK_OPTIONS, MODEL_OPTIONS, DataArguments, ModelArguments
from scripts.training.embedding_cache import cache_key, cached_chunk_vectors, document_means
from scripts.training.fit_lexical_features import fit_lexical_features, lexical_logits
from scripts.training.kinds import MultiLabel, SingleLabel, kind_of

logger = logging.getLogger("train_hf")

# What determines the shapes of an encoder's weights.
ENCODER_SHAPES = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass
class TrainingSetup:
    """Everything a `WeightedTrainer` is built from.

    Attributes:
        splits, manifest: the prepared dataset and its manifest.
        kind: one label a document or several, with their names in order.
        class_weights: (K,), None for equal ones.
        chunked: each split as chunks of tokens.
        lengths: each split's document lengths in chunks and tokens.
        document_costs: (B,), relative cost of encoding each training document.
        documents: what the trainer receives for each split: `chunked`, or cached embeddings of a frozen encoder.
        lexical_weighting: log, tfidf, or auto (see `fit_lexical_features`).
    """

    tokenizer: PreTrainedTokenizerBase
    splits: datasets.DatasetDict
    manifest: dict[str, Any]
    kind: SingleLabel | MultiLabel
    class_weights: torch.Tensor | None
    model: HierarchicalRobertaForSequenceClassification
    chunked: dict[str, ChunkedDocuments]
    lengths: dict[str, SplitLengths]
    document_costs: np.ndarray
    collator: DocumentCollator
    documents: dict[str, Any]
    lexical_weighting: str = "auto"

    def trainer_arguments(self, args: HierarchicalTrainingArguments) -> dict[str, Any]:
        """The keyword arguments of `WeightedTrainer`, except for the model."""
        return {
            "args": args,
            "class_weights": self.class_weights,
            "head_lr_multiplier": args.head_lr_multiplier,
            "document_costs": self.document_costs,
            "max_loss_spike": args.max_loss_spike,
            "data_collator": self.collator,
            "train_dataset": self.documents["train"],
            "eval_dataset": self.documents["validation"],
            "compute_metrics": self.kind.compute_metrics(),
        }


def build_setup(
    model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments, with_test: bool = True
) -> TrainingSetup:
    """Tokenizer, documents (without the test split if `with_test` is False), class weights and model.

    Raises:
        ValueError: an encoder, dataset, label or option that cannot be used.
    """
    optimizer_class_and_kwargs(args)  # refused before the data are read
    if model_args.lexical_weighting not in ("auto", *LEXICAL_WEIGHTINGS):
        raise ValueError(
            f"`lexical_weighting` must be auto or one of {', '.join(LEXICAL_WEIGHTINGS)}, got "
            f"{model_args.lexical_weighting!r}."
        )
    tokenizer = load_tokenizer(model_args.encoder, model_args.encoder_revision)
    splits, manifest = load_prepared(data_args.dataset_dir, tokenizer)
    if not with_test:
        splits.pop("test", None)
    kind = kind_of(splits["train"], args.severity_weights)
    class_weights = choose_class_weights(splits["train"], kind, args.class_weights)
    kind.check(args, label_array(splits["validation"]))
    model = build_model(model_args, kind.names, args, tokenizer, kind.problem_type)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # Trainer would set these with a warning
        if getattr(tokenizer, name) is not None:
            setattr(model.config, name, getattr(tokenizer, name))
    chunked, lengths = chunk_splits(splits, tokenizer, model, args)
    collator = DocumentCollator(tokenizer.pad_token_id, with_ids=True)
    return TrainingSetup(
        tokenizer,
        splits,
        manifest,
        kind,
        class_weights,
        model,
        chunked,
        lengths,
        lengths["train"].costs(model.config.hidden_size),
        collator,
        documents=dict(chunked),
        lexical_weighting=model_args.lexical_weighting,
    )


def build_trainer(setup: TrainingSetup, args: HierarchicalTrainingArguments) -> WeightedTrainer:
    return WeightedTrainer(model=setup.model, processing_class=setup.tokenizer, **setup.trainer_arguments(args))


def fit_features(setup: TrainingSetup, trainer: WeightedTrainer | None = None, checkpoint: str | None = None) -> None:
    """Fit the lexical features, where the model is to have any, to the training documents, or take those of the checkpoint
    to resume from. They select chunks from then on, and are weighed in the trainer's evaluations.

    Raises:
        ValueError: the checkpoint has features of another weighting.
    """
    if setup.model.lexical is None:
        return
    process_index = 0 if trainer is None else trainer.args.process_index
    lexical = saved_features(checkpoint) if checkpoint else None
    if lexical is None:
        lexical = fitted_features(setup, setup.model.config, process_index)
    if setup.lexical_weighting not in ("auto", lexical.weighting):
        raise ValueError(
            f"Cannot resume from {checkpoint}: lexical_weighting is {lexical.weighting} there, {setup.lexical_weighting} now."
        )
    setup.model.use_lexical_features(lexical)
    for chunked in setup.chunked.values():
        chunked.lexical = lexical
    if trainer is not None:
        trainer.lexical_logits = lexical_logits(setup.chunked["validation"], lexical)


def saved_features(checkpoint: str) -> LexicalFeatures | None:
    """The lexical features of a checkpoint; None if its weights are sharded (they are fitted again)."""
    path, config = Path(checkpoint) / SAFE_WEIGHTS_NAME, HierarchicalRobertaConfig.from_pretrained(checkpoint)
    if not path.is_file():
        return None
    size = (config.encoder_config.vocab_size, config.lexical_features, config.num_labels)
    lexical = LexicalFeatures(*size, config.lexical_weighting)
    with safe_open(path, framework="pt") as weights:
        lexical.load_state_dict({name: weights.get_tensor(f"lexical.{name}") for name in lexical.state_dict()})
    return lexical


def fitted_features(setup: TrainingSetup, config: HierarchicalRobertaConfig, process_index: int = 0) -> LexicalFeatures:
    """The lexical features that a model's config asks for, fitted to the training documents."""
    return fit_lexical_features(
        setup.chunked["train"],
        config.num_labels,
        config.lexical_features,
        config.encoder_config.vocab_size,
        setup.class_weights,
        setup.lexical_weighting,
        process_index,
    )


def cache_embeddings(
    setup: TrainingSetup, dataset_dir: str, args: HierarchicalTrainingArguments, accelerator: Accelerator
) -> None:
    """With a frozen encoder, encode every chunk once (or read the cache), and fit the feature scaler."""
    if not args.freeze_encoder:
        return
    cache_dir = Path(dataset_dir) / ".chunk_vectors" / cache_key(setup.model, setup.manifest, args.precision)
    num_workers = args.dataloader_num_workers or 0
    setup.documents = dict(
        cached_chunk_vectors(setup.model, setup.chunked, setup.collator, cache_dir, accelerator, num_workers)
    )
    setup.model.fit_feature_scaler(document_means(setup.documents["train"]))


def choose_class_weights(train: datasets.Dataset, kind: SingleLabel | MultiLabel, choice: str) -> torch.Tensor | None:
    """Class weights (K,), with several labels a document those of the documents that have a label: balanced over the training
    labels, as given, or None."""
    labels = kind.names
    weights = parse_class_weights(choice, labels)
    counts = label_counts(label_array(train), len(labels)).tolist()
    if missing := [label for label, count in zip(labels, counts, strict=True) if count == 0]:
        raise ValueError(
            f"No training document is labelled {', '.join(missing)}, so the class cannot be learned. Add documents, or "
            "prepare the data without that label."
        )
    if weights == "none":
        return None
    count_of = dict(zip(labels, counts, strict=True))
    tensor = kind.balanced_weights(count_of, len(train)) if weights == "balanced" else torch.tensor(weights)
    weight_of = dict(zip(labels, tensor.tolist(), strict=True))
    listed = [f"{label} {weight:.2f} ({count_of[label]} documents)" for label, weight in weight_of.items()]
    logger.info(f"Class weights: {shorten(listed, 20)}.", extra={"detail": True})
    if message := kind.weights_message(weight_of, count_of):
        logger.warning(message)
    return tensor


def build_model(
    model_args: ModelArguments,
    labels: list[str],
    args: HierarchicalTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    problem_type: str = SINGLE,
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
            problem_type=problem_type,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            **{name: getattr(model_args, name) for name in (*geometry, *CHUNK_OPTIONS, *MODEL_OPTIONS)},
        )
    except (OSError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"The encoder {model_args.encoder!r} cannot be loaded: {error}") from error
    config = model.config
    chunker = Chunker(tokenizer, config.chunk_length, config.chunk_overlap, config.chunk_prefix)
    config.num_prefix_tokens = len(chunker.prefix)
    if origin := trained_config(model_args.encoder, model_args.encoder_revision):
        here, there = (", ".join(f"{name} {getattr(each, name)!r}" for name in geometry) for each in (config, origin))
        logger.info(
            f"Starting from the encoder of {model_args.encoder}, trained for {', '.join(origin.id2label.values())}, with new "
            f"pooling and head. The chunk geometry is not inherited: {here} (there {there})."
        )
    model.token_budget = args.token_budget
    if args.freeze_encoder:
        model.freeze_encoder()
    model.freeze_layers(args.freeze_layers)
    if args.lora_rank:
        add_adapters(model, args.lora_rank, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision))
    if args.compile_layers:
        model.compile_layers()
    if args.gradient_checkpointing:
        checkpoint_activations(model, args.gradient_checkpointing_kwargs or {})
    if message := frozen_model_message(model):
        raise ValueError(message)
    trained, total = model.count_trainable_parameters(), model.num_parameters()
    logger.info(f"{trained:,} of {total:,} parameters are trained.", extra={"detail": True})
    return model


def resolved_arguments(
    model_args: ModelArguments, model: HierarchicalRobertaForSequenceClassification
) -> ModelArguments:
    """The arguments with what the encoder decided, for the record of the run."""
    return replace(model_args, **{name: getattr(model.config, name) for name in CHUNK_OPTIONS})


def checkpoint_activations(model: HierarchicalRobertaForSequenceClassification, kwargs: dict[str, Any]) -> None:
    """Enable activation checkpointing as Trainer will, so that memory is planned with it.

    Raises:
        ValueError: transformers' code of the encoder has none.
    """
    if not model.encoder.supports_gradient_checkpointing:
        raise ValueError(
            f"The encoder ({model.config.encoder_config.model_type}) does not support gradient checkpointing in "
            "transformers: leave --gradient_checkpointing out. --live_chunks bounds memory too."
        )
    layers = {name: kwargs[name] for name in ("every_n_layers", "offload") if name in kwargs}
    # transformers 5.23 renames the method, and deprecates the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({name: value for name, value in kwargs.items() if name not in layers} or None, **layers)


def check_checkpoint(folder: Path, config: HierarchicalRobertaConfig, data_fingerprint: str, needs_best: bool) -> None:
    """Warn where a checkpoint was trained on other data.

    Raises:
        ValueError: its model differs from this one, or the best checkpoint of its run is needed and missing.
    """
    saved = HierarchicalRobertaConfig.from_json_file(folder / "config.json")
    for current, stored, names in (
        (config, saved, ("id2label", "is_multi_label", "lora_rank", *CHUNK_OPTIONS, *MODEL_OPTIONS)),
        (config.encoder_config, saved.encoder_config, ENCODER_SHAPES),
    ):
        values = {name: (getattr(stored, name, None), getattr(current, name, None)) for name in names}
        changed = [f"{name}: {old} in checkpoint, {new} now" for name, (old, new) in values.items() if old != new]
        if changed:
            raise ValueError(
                f"Cannot resume from {folder}: the model differs ({'; '.join(changed)}). Use the options and data that it "
                "was trained with, or start a new run in another output_dir."
            )
    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    best = folder.parent / f"checkpoint-{state.best_global_step}"
    exists = best.is_dir() or Path(state.best_model_checkpoint or best).is_dir()
    if needs_best and state.best_global_step and not exists and not is_being_converted(folder):
        raise ValueError(
            f"{best.name}, the best checkpoint of the run, is missing beside {folder}: copy it there too, or resume with "
            "--load_best_model_at_end False, which keeps the last model."
        )
    history = folder.parent / "training_history.json"
    if history.is_file():
        trained_on = json.loads(history.read_text(encoding="utf-8"))["config"].get("data_fingerprint")
        if trained_on != data_fingerprint:
            logger.warning(
                f"The data differ from those that {folder} was trained on: training continues on the new ones."
            )


def chunk_splits(
    splits: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    model: HierarchicalRobertaForSequenceClassification,
    args: HierarchicalTrainingArguments,
) -> tuple[dict[str, ChunkedDocuments], dict[str, SplitLengths]]:
    """Each split as chunks, and its documents' lengths. Logs the share that max_chunks cuts."""
    config = model.config
    chunked, lengths = {}, {}
    for name, part in splits.items():
        chunked[name] = ChunkedDocuments(
            part,
            tokenizer,
            chunk_length=config.chunk_length,
            chunk_overlap=config.chunk_overlap,
            max_chunks=config.max_chunks,
            chunk_policy=config.chunk_policy,
            chunk_prefix=config.chunk_prefix,
            training=name == "train",
            seed=args.seed,
        )
        num_tokens = num_tokens_of(part)
        num_special = config.chunk_length - chunked[name].chunker.body_length  # the prefix too
        geometry = (config.chunk_length, config.chunk_overlap, config.max_chunks, num_special)
        lengths[name] = SplitLengths(*chunk_sizes(num_tokens, *geometry))
        cut = coverage(num_tokens, chunked[name].chunker.body_length, config.chunk_overlap, config.max_chunks)
        does = "leaves to the lexical features" if config.chunk_policy == "lexical" else "cuts"
        logger.info(
            f"{name}: {cut['documents']} documents, {cut['tokens']:,} tokens; max_chunks ({config.max_chunks}, "
            f"{config.chunk_policy}) {does} {cut['tokens_cut_share']:.1%} of tokens, in {cut['documents_cut_share']:.1%} of "
            "documents.",
            extra={"detail": not cut["tokens_cut_share"]},
        )
    return chunked, lengths


def stream_of(source: str | None, parts: TrainingSetup, args: HierarchicalTrainingArguments) -> StreamedDocuments:
    """This process's training documents as a stream, from a source with the columns of the prepared one, or from the
    prepared split."""
    options: dict[str, Any] = {"seed": args.seed, "buffer_size": args.shuffle_buffer}
    options |= {"process_index": args.process_index, "num_processes": args.world_size}
    if source is None:
        return prepared_stream(parts.chunked["train"], **options)
    prepared = parts.manifest.get("options", {})
    if columns := prepared.get("columns"):
        read_options = ReadOptions(**prepared.get("read_options", {}))
        # Those were of the prepared dataset on the hub.
        read_options = replace(read_options, config_name=None, revision=None)
        options |= {"columns": Columns(**columns), "read_options": read_options}
        options["merge_labels"] = prepared.get("merge_labels", False)
    return source_stream(source, parts.chunked["train"], parts.kind.names, **options)


def plan_memory(
    model: HierarchicalRobertaForSequenceClassification,
    lengths: dict[str, SplitLengths],
    args: HierarchicalTrainingArguments,
    accelerator: Accelerator,
) -> None:
    """Set the maximum number of live chunks: the same on every rank, set by the one with the least memory.

    Raises:
        ValueError: the weights are sharded, and an option needs the whole model on each device.
    """
    use_flash_attention_on_cuda()
    is_auto = args.live_chunks == "auto"
    if shards_weights(accelerator):
        refuse_to_shard(args)
        live_chunks = 0 if is_auto else int(args.live_chunks)
        if is_auto:
            logger.info("Live chunks: 0 (no limit). With sharded weights auto cannot measure them: set --live_chunks.")
    else:
        accelerator.wait_for_everyone()  # nccl allocates memory when the ranks first meet
        live_chunks = choose_live_chunks(model.to(args.device), lengths["train"], args, accelerator.autocast)
        live_chunks = min((bound for bound in gather_object([live_chunks]) if bound), default=0)
        if is_auto and not model.encoder_is_frozen:
            chosen = f"{live_chunks} (the rest is recomputed)" if live_chunks else "0 (no limit: a batch fits)"
            logger.info(f"Live chunks, from the free memory: {chosen}.", extra={"detail": True})
    model.live_chunks = live_chunks
    configure_malloc(model, args.device)
