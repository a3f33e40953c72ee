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
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from transformers import ProgressCallback, set_seed

from data.collator import DocumentCollator
from data.prepared_dataset import load_prepared
from data.tokenization import load_tokenizer
from modeling.training.callbacks import (
    EarlyStopping,
    EvaluationLogCallback,
    HistoryCallback,
    ProgressLogCallback,
    SignalCallback,
)
from modeling.training.checkpointing import find_checkpoint
from modeling.training.memory import describe_run
from modeling.training.metrics import check_metric_name, compute_metrics_fn
from modeling.training.monitor import TrainingMonitor
from modeling.training.resumable_trainer import TrainingInterrupted
from modeling.training.runtime import set_num_threads
from modeling.training.tensorboard import TensorBoard
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import (
    HierarchicalTrainingArguments,
    parse_severity_weights,
)
from scripts.common.cli import run_and_exit
from scripts.common.log_setup import set_up_logging
from scripts.common.recipe import parse_with_recipe
from scripts.hub.pusher import HubPusher, start_pushing
from scripts.hub.upload import scrub_hub_token
from scripts.training.embedding_cache import cache_key, cached_chunk_vectors, document_means
from scripts.training.export import evaluate_splits, export
from scripts.training.fit_lexical_features import fit_lexical_features
from scripts.training.output_dir import (
    clear_earlier_run,
    is_from_run,
    lock_output_dir,
    remove_if_empty,
    resolve_output_dir,
)
from scripts.training.run_record import run_record
from scripts.training.setup import (
    DataArguments,
    ModelArguments,
    build_model,
    check_checkpoint,
    choose_class_weights,
    chunk_splits,
    plan_memory,
    stream_of,
)

logger = logging.getLogger("train_hf")
# How gloo's errors, which have no type of their own, tell that another process is gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo")


def main(model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments) -> int:
    """One run. Returns the exit status."""
    writes = args.process_index == 0 and not args.dry_run
    with lock_output_dir(Path(args.output_dir)) if writes else nullcontext():
        asks_for_details = args.log_level in ("debug", "info")
        set_up_logging(Path(args.output_dir) if writes else None, terminal_level(args), asks_for_details)
        logger.info(f"Precision: {args.precision} ({args.precision_reason}).")
        if args.device.type == "cpu":
            logger.info(f"{set_num_threads(args.cpu_threads)} threads on the CPU.")
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
    checkpoint = None if args.dry_run else resolve_output_dir(args.output_dir, resume, overwrite)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.encoder, model_args.encoder_revision)
    splits, manifest = load_prepared(data_args.dataset_dir, tokenizer)
    labels = splits["train"].features["label"].names
    class_weights = choose_class_weights(splits["train"], labels, args.class_weights)
    severity_weights = parse_severity_weights(args.severity_weights, len(labels))
    check_metric_name(args.metric_for_best_model, labels)
    model = build_model(model_args, labels, args)
    if checkpoint is not None:
        fingerprint, needs_best = manifest["data_fingerprint"], args.load_best_model_at_end
        check_checkpoint(Path(checkpoint), model.config, fingerprint, needs_best)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # as Trainer would, which warns about it
        if getattr(tokenizer, name) is not None:
            setattr(model.config, name, getattr(tokenizer, name))
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
        fit_lexical_features(model.lexical, chunked["train"], class_weights, args.process_index)
    config = run_record((model_args, data_args, args), args, manifest, splits, class_weights)
    documents: dict[str, Any] = dict(chunked)
    if args.freeze_encoder:
        kept = Path(data_args.dataset_dir) / ".chunk_vectors" / cache_key(model, manifest, args.precision)
        documents = dict(
            cached_chunk_vectors(model, chunked, collator, kept, trainer.accelerator, args.dataloader_num_workers or 0)
        )
        model.fit_feature_scaler(document_means(documents["train"]))
    no_workers = {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None}
    no_workers["dataloader_persistent_workers"] = False
    loading = {name: getattr(args, name) for name in no_workers}
    for name, value in no_workers.items() if args.freeze_encoder else ():
        setattr(args, name, value)  # a step on cached embeddings is over before a worker has sent them
    if args.streaming:
        documents["train"] = stream_of(data_args.train_source, chunked["train"], labels, args)
    trainer.train_dataset, trainer.eval_dataset = documents["train"], documents["validation"]
    history, health, stop = add_callbacks(trainer, labels, config, args)
    if pusher is not None:
        trainer.add_callback(pusher)
    if args.should_save and (checkpoint is None or not is_from_run(checkpoint, args.output_dir)):
        clear_earlier_run(args.output_dir)
    with stop.listening():
        with suppress(TrainingInterrupted):  # in an evaluation before the first step
            trainer.train(resume_from_checkpoint=checkpoint)
        stop.sync()
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
    for name, value in loading.items():
        setattr(args, name, value)
    # On the tokens, also where the encoder was frozen: cached embeddings have the precision of training.
    metrics = evaluate_splits(trainer, documents if args.evaluate_kept_vectors else chunked, splits, labels)
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


def add_callbacks(
    trainer: WeightedTrainer, labels: list[str], config: dict[str, Any], args: HierarchicalTrainingArguments
) -> tuple[HistoryCallback, TrainingMonitor, SignalCallback]:
    """What watches the run. The history comes late: it takes the totals that the health watch reads."""
    early_stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_min_delta)
    health, stop = TrainingMonitor(trainer), SignalCallback(args.grace_seconds, args.ddp_timeout)
    trainer.stop = stop
    history = HistoryCallback(trainer, early_stopping, config)
    trainer.remove_callback(ProgressCallback)
    lines, board = (ProgressLogCallback(), EvaluationLogCallback(history, labels)), TensorBoard(trainer, labels, config)
    for callback in (lines[0], early_stopping, board, health, stop, history, lines[1]):
        trainer.add_callback(callback)
    return history, health, stop


def command() -> int:
    """The command line → `main`."""
    scrub_hub_token()
    kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
    return main(*parse_with_recipe(kinds, sys.argv[1:], description=__doc__))


if __name__ == "__main__":
    run_and_exit(command)
