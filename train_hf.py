"""Train a hierarchical classifier of long documents.

    accelerate launch --quiet --config_file accelerate_config.yaml train_hf.py \\
        --config scripts/recipes/roberta_base.yaml --dataset_dir outputs/stories --output_dir outputs/run

setup → WeightedTrainer → train → evaluate → export. Every field of TrainingArguments is an option too; a recipe sets
defaults and the command line overrides them.
"""

import os
import sys
from pathlib import Path

from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.common.cli import run_and_exit, scrub_hub_token
from scripts.common.recipe import parse_with_recipe
from scripts.training.arguments import DataArguments, ModelArguments

# Set by torchrun, accelerate launch and MPI where there are several processes.
LAUNCHED = {"LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"}


def main(model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments) -> int:
    """Run training. Returns the exit status."""
    # Imported here, so that --help and mistakes in options are answered at once.
    from transformers import set_seed

    from modeling.training.lora import merge_adapters
    from modeling.training.memory import describe_run
    from modeling.training.trackers import check_trackers
    from scripts.training import output_dir, run, setup
    from scripts.training.export import evaluate_splits, export
    from scripts.training.run_record import run_record

    if data_args.train_source and not args.streaming:
        raise ValueError("--train_source is read as a stream: add --streaming, or prepare the source.")
    check_trackers(args.report_to)
    with run.run_context(args) as pusher:
        checkpoint = None
        if not args.dry_run:
            checkpoint = output_dir.resolve_output_dir(
                args.output_dir, args.resume_from_checkpoint, args.overwrite_output_dir
            )
        set_seed(args.seed)
        parts = setup.build_setup(model_args, data_args, args)
        if checkpoint is not None:
            fingerprint = parts.manifest["data_fingerprint"]
            setup.check_checkpoint(Path(checkpoint), parts.model.config, fingerprint, args.load_best_model_at_end)
        trainer = setup.build_trainer(parts, args)
        setup.plan_memory(parts.model, parts.lengths, args, trainer.accelerator)
        if args.dry_run:
            if args.should_save:
                print(describe_run(parts.model, parts.lengths, args, trainer.accelerator.autocast))
                output_dir.remove_if_empty(args.output_dir)
            return 0

        setup.fit_features(parts, trainer, checkpoint)
        options = (setup.resolved_arguments(model_args, parts.model), data_args, args)
        config = run_record(options, args, parts.manifest, parts.splits, parts.class_weights)
        setup.cache_embeddings(parts, data_args.dataset_dir, args, trainer.accelerator)
        trainer.train_dataset, trainer.eval_dataset = parts.documents["train"], parts.documents["validation"]
        if args.streaming:
            trainer.train_dataset = setup.stream_of(data_args.train_source, parts, args)
        watchers = run.add_callbacks(trainer, parts.kind.names, config, args, pusher)
        if args.should_save and (checkpoint is None or not output_dir.is_from_run(checkpoint, args.output_dir)):
            output_dir.clear_earlier_run(args.output_dir)
        if status := run.train(trainer, checkpoint, watchers, pusher):
            return status
        merge_adapters(parts.model)

        # On tokens even if the encoder is frozen: cached embeddings have the precision of training.
        documents = parts.documents if args.evaluate_kept_vectors else parts.chunked
        metrics = evaluate_splits(trainer, documents, parts.splits, parts.kind)
        export(trainer, watchers.history, metrics, parts.kind.names)
        return run.push_final(pusher, args.output_dir)


def command() -> int:
    """The command line → `main`."""
    scrub_hub_token()
    if os.environ.keys() & LAUNCHED:
        # Parsing creates the process group, and torch.distributed.nn holds on to the one that exists when it is imported.
        import scripts.training.setup  # noqa: F401
    kinds = (ModelArguments, DataArguments, HierarchicalTrainingArguments)
    return main(*parse_with_recipe(kinds, sys.argv[1:], description=__doc__))


if __name__ == "__main__":
    run_and_exit(command)
