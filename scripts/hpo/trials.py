"""The trials of a hyperparameter search: Optuna, by way of `Trainer.hyperparameter_search`. Used by scripts/search.py."""

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
import yaml
from accelerate import Accelerator
from filelock import FileLock
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from modeling.file_utils import write_text
from modeling.hierarchical_roberta.lexical_features import LexicalFeatures
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.callbacks import EarlyStopping
from modeling.training.monitor import TrainingMonitor
from modeling.training.runtime import configure_malloc, set_num_threads
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.common.cli import Terminated, interruption
from scripts.common.log_setup import set_up_logging
from scripts.common.markdown import markdown_table
from scripts.hpo.space import TRAINING_OPTIONS, NumberedSampler, read_space
from scripts.training.arguments import MODEL_OPTIONS, DataArguments, ModelArguments, SearchArguments
from scripts.training.fit_lexical_features import lexical_logits
from scripts.training.setup import (
    build_model,
    build_setup,
    cache_embeddings,
    fit_features,
    fitted_features,
    plan_memory,
    resolved_arguments,
)

logger = logging.getLogger("search")

# What else must be the same for two trials to be compared.
SAME_IN_ALL_TRIALS: tuple[str, ...] = (
    "seed",
    "class_weights",
    "severity_weights",
    "freeze_encoder",
    "freeze_layers",
    "lora_rank",
    "precision",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "early_stopping_patience",
    "early_stopping_min_delta",
    "max_loss_spike",
    "optim",
)

# Seconds without a heartbeat after which a trial counts as killed.
GRACE_PERIOD = 60
# Held while the study is created and while results are written.
LOCK = ".search.lock"


class InterruptionCallback(TrainerCallback):
    """Raise for SIGTERM or Ctrl-C at the end of a step: in the middle of a write to the study, the error may leave the
    database locked. A second signal raises at once.

    Attributes:
        received: the error to raise.
    """

    def __init__(self) -> None:
        self.received: BaseException | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within this context, at the latest at its end."""
        errors: dict[int, type[BaseException]] = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}

        def receive(number: int, frame: FrameType | None) -> None:
            if self.received is not None:
                raise self.received
            self.received = errors[number]()

        handlers = {number: signal.signal(number, receive) for number in errors}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.raise_received()

    def raise_received(self, *_: Any, **__: Any) -> None:
        if self.received is not None:
            raise self.received

    on_step_end = on_prediction_step = raise_received


class Search:
    """Prepares the documents once, and runs one trial after another on them, each with a Trainer of its own."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: HierarchicalTrainingArguments):
        self.setup = build_setup(model_args, data_args, args, with_test=False)
        self.model_args, self.args = resolved_arguments(model_args, self.setup.model), args
        mixed_precision = "no" if args.precision == "fp32" else args.precision
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=args.use_cpu)
        plan_memory(self.setup.model, self.setup.lengths, args, accelerator)
        if model_args.chunk_policy == "lexical":
            fit_features(self.setup)  # they select the chunks that are cached
        cache_embeddings(self.setup, data_args.dataset_dir, args, accelerator)
        # Every trial builds a model of its own: keep what they need of this one, and free it.
        model = self.setup.model
        self.live_chunks, self.scaler = model.live_chunks, (model.vector_mean.cpu(), model.vector_scale.cpu())
        del self.setup.model, model
        # What must be the same for two trials to be compared.
        self.fixed = {
            "data": self.setup.manifest["data_fingerprint"],
            "metric": args.metric_for_best_model,
            "model": vars(self.model_args),
        }
        self.fixed["training"] = {name: str(getattr(args, name)) for name in (*TRAINING_OPTIONS, *SAME_IN_ALL_TRIALS)}
        self.lexical: dict[int, LexicalFeatures] = {}  # by number of features
        self.number: int | None = None  # of the running trial

    def new_model(self, params: dict[str, Any]) -> HierarchicalRobertaForSequenceClassification:
        """A model with these options, its head from the same seed each time."""
        set_seed(self.args.seed)
        setup = self.setup
        options = {name: value for name, value in params.items() if name in MODEL_OPTIONS}
        model_args = replace(self.model_args, **options)
        model = build_model(model_args, setup.kind.names, self.args, setup.tokenizer, setup.kind.problem_type)
        model.live_chunks = self.live_chunks
        configure_malloc(model, self.args.device)
        if self.args.freeze_encoder:
            model.vector_mean.copy_(self.scaler[0])
            model.vector_scale.copy_(self.scaler[1])
            for name, documents in setup.documents.items():
                documents.with_tokens = model.lexical is not None and name != "train"
        if model.lexical is not None:
            num_features = model.config.lexical_features
            if num_features not in self.lexical:
                self.lexical[num_features] = fitted_features(setup, model.config)
            model.use_lexical_features(self.lexical[num_features])
        return model

    def run_trial(self, space: dict[str, Callable[[optuna.Trial], Any]], **study: Any) -> int:
        """Run one more trial and return its number. Its value is the best validation metric of its epochs so far."""
        args = copy(self.args)
        args.push_to_hub = False
        self.number = None

        # Trainer builds the model before it samples the trial's options: the model's own are sampled here, with the same
        # result when they are sampled again.
        def model_of(trial: optuna.Trial | None) -> HierarchicalRobertaForSequenceClassification:
            if trial is None:
                return self.new_model({})
            self.number = trial.number
            model = self.new_model({name: space[name](trial) for name in MODEL_OPTIONS if name in space})
            lexical = model.lexical_features_on_host()
            validation = self.setup.chunked["validation"]
            trainer.lexical_logits = None if lexical is None else lexical_logits(validation, lexical)
            return model

        trainer = WeightedTrainer(model_init=model_of, **self.setup.trainer_arguments(args))
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_min_delta))
        trainer.add_callback(TrainingMonitor(trainer))
        interruption_callback = InterruptionCallback()
        trainer.add_callback(interruption_callback)
        name = f"eval_{(args.metric_for_best_model or 'f1_macro').removeprefix('eval_')}"
        pick = max if args.greater_is_better else min
        seen: list[float] = []

        def draw(trial: optuna.Trial) -> dict[str, Any]:
            drawn = {option: drawer(trial) for option, drawer in space.items()}
            trainer.head_lr_multiplier = drawn.get("head_lr_multiplier", args.head_lr_multiplier)
            return {option: value for option, value in drawn.items() if option not in MODEL_OPTIONS}

        def value_of(metrics: dict[str, float]) -> float:
            seen.append(metrics[name])
            return pick(seen)

        with interruption_callback.listening():
            trainer.hyperparameter_search(
                hp_space=draw, compute_objective=value_of, n_trials=1, backend="optuna", load_if_exists=True, **study
            )
        assert self.number is not None
        return self.number


def search(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: HierarchicalTrainingArguments,
    search_args: SearchArguments,
    recipe_values: dict[str, Any],
) -> int:
    """The search. Returns the exit status."""
    if args.world_size > 1 or args.streaming or args.dry_run:
        raise ValueError(
            "A search runs in one process, without --streaming or --dry_run: start it a second time to share the study."
        )
    if search_args.num_trials < 1:
        raise ValueError(f"`num_trials` must be at least 1, got {search_args.num_trials}.")
    space = read_space(search_args.space)
    if model_args.chunk_policy == "lexical" and "lexical_features" in space:
        raise ValueError(
            "With `chunk_policy` lexical the features select the chunks, which are the same in all trials: leave "
            "lexical_features out of the space."
        )
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "study.log").exists():
        raise ValueError(f"{folder / 'study.log'} is a search by an earlier version: choose another output_dir.")
    set_up_logging(None, logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.device.type == "cpu":
        set_num_threads(args.cpu_threads)
    trials = Search(model_args, data_args, args)
    for name in ("train_hf", "modeling.training.trainer"):  # repeated for every trial
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        study = run_trials(trials, space, folder, search_args.num_trials)
        with FileLock(folder / LOCK, fallback_to_soft=False):
            return write_results(study, folder, args, recipe_values)
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause = getattr(error.__cause__, "orig", None) or getattr(error, "orig", None) or error
        raise ValueError(
            f"{folder / 'study.db'} cannot be read or written: {cause}. It needs room on the disk and a file system with locks: "
            "run the command again when it has both, or choose another output_dir."
        ) from error


def run_trials(
    trials: Search, space: dict[str, Callable[[optuna.Trial], Any]], folder: Path, num_trials: int
) -> optuna.Study:
    """Run trials until `num_trials` of the study in `folder` are finished.

    Optuna's heartbeat fails and requeues the trial of a process that was killed, three times at most: the trial may be what
    ends the process. A signal that Python sees ends a trial after its step: the same callback requeues it.
    """
    # The heartbeat is marked as experimental.
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    requeue = RetryHeartbeatStaleTrialCallback()
    direction: Any = "maximize" if trials.args.greater_is_better else "minimize"
    options: dict[str, Any] = {"study_name": "search", "direction": direction}
    with FileLock(folder / LOCK, fallback_to_soft=False):  # two processes that create the tables at once both fail
        options["storage"] = RDBStorage(
            f"sqlite:///{folder / 'study.db'}",
            engine_kwargs={"connect_args": {"timeout": GRACE_PERIOD}},  # for another process's write
            heartbeat_interval=GRACE_PERIOD // 6,
            grace_period=GRACE_PERIOD,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
        )
        study = optuna.create_study(load_if_exists=True, **options)
        if study.user_attrs.get("fixed", trials.fixed) != trials.fixed:
            raise ValueError(
                f"{folder / 'study.db'} belongs to a search with other data, recipe, metric or seed: choose another "
                "output_dir."
            )
        study.set_user_attr("fixed", trials.fixed)
    while needs_trial(study, num_trials):
        sampler, pruner = NumberedSampler(trials.args.seed), optuna.pruners.MedianPruner()
        try:
            number = trials.run_trial(space, sampler=sampler, pruner=pruner, **options)
        except BaseException as error:
            if interruption(error) is not None and trials.number is not None:
                if not study.trials[trials.number].state.is_finished():
                    study.tell(trials.number, state=TrialState.FAIL)
                if study.trials[trials.number].state == TrialState.FAIL:
                    requeue(study, study.trials[trials.number])
            raise
        last = study.trials[number]
        options_shown = ", ".join(f"{name} {shown(value)}" for name, value in last.params.items())
        logger.info(f"trial {len(finished(study))} of {num_trials}: {value_shown(last)}; {options_shown}")
    return study


def needs_trial(study: optuna.Study, num_trials: int) -> bool:
    """Whether another trial has to be started. If the running ones are enough, it waits until they finish or turn out to have
    been killed, but no longer than it takes to tell."""
    end = time.monotonic() + GRACE_PERIOD + 1
    while True:
        optuna.storages.fail_stale_trials(study)
        missing, num_running = num_trials - len(finished(study)), len(study.get_trials(states=(TrialState.RUNNING,)))
        if missing <= 0 or missing > num_running:
            return missing > 0
        if time.monotonic() > end:
            logger.info(f"{num_running} trials are left to other processes.")
            return False
        time.sleep(0.5)


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Finished trials, whatever their state, except requeued ones."""
    trials = study.trials
    again = {number for trial in trials for number in RetryHeartbeatStaleTrialCallback.retry_history(trial)}
    return [trial for trial in trials if trial.state.is_finished() and trial.number not in again]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def value_shown(trial: FrozenTrial) -> str:
    value = (
        trial.value
        if trial.value is not None
        else trial.intermediate_values and list(trial.intermediate_values.values())[-1]
    )
    return f"{trial.state.name.lower()}" + (f" at {value:.4f}" if isinstance(value, float) else "")


def write_results(
    study: optuna.Study, folder: Path, args: HierarchicalTrainingArguments, recipe_values: dict[str, Any]
) -> int:
    """best.yaml and search.md. Returns the exit status."""
    trials = finished(study)
    states = [trial.state.name.lower() for trial in trials]
    if "complete" not in states:
        raise ValueError(f"None of {len(trials)} trials completed: narrow the space or raise --num_trials.")
    metric = (args.metric_for_best_model or "f1_macro").removeprefix("eval_")
    counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    chosen = f"{len(trials)} trials ({counts}); selected by validation {metric} {study.best_value:.4f}, "
    chosen += "an optimistic estimate (the best of many): train with this recipe to measure it on the test split."
    recipe = yaml.safe_dump(recipe_values | study.best_params, sort_keys=False, allow_unicode=True)
    write_text(folder / "best.yaml", f"# {chosen}\n{recipe}")
    scored = sorted(
        (t for t in trials if t.value is not None), key=lambda t: t.value or 0.0, reverse=bool(args.greater_is_better)
    )
    rows = [*scored, *(trial for trial in trials if trial.value is None)]
    head = ["trial", metric, *study.best_params]
    cells = [[t.number, value_shown(t), *(shown(t.params.get(name, "")) for name in study.best_params)] for t in rows]
    write_text(folder / "search.md", f"# Search\n\n{chosen}\n\n{markdown_table(head, cells)}\n")
    logger.info(f"{chosen} {folder / 'best.yaml'} is the recipe, {folder / 'search.md'} has every trial.")
    return 0
