"""Additional training arguments, and defaults that differ from those of `TrainingArguments`.

| field | here | Trainer's | why |
|---|---|---|---|
| num_train_epochs | 15 | 3 | small datasets; early stopping usually ends training sooner |
| per_device_train_batch_size | 4 | 8 | a document has many chunks |
| per_device_eval_batch_size | 4 | 8 | as above |
| gradient_accumulation_steps | 4 | 1 | an effective batch of 16 |
| learning_rate | 2e-5 | 5e-5 | fine-tuning range of RoBERTa (Liu et al. 2019) |
| weight_decay | 0.01 | 0 | as in BERT and RoBERTa |
| warmup_steps | 0.1 | 0 | linear over the first 10 % of the steps (values below 1 are a fraction) |
| lr_scheduler_type | cosine | linear | decays to zero |
| logging_steps | 10 | 500 | few, long steps |
| eval_strategy, save_strategy | epoch | no, steps | early stopping is checked every epoch |
| save_total_limit | 3 | none | the best and up to two more |
| load_best_model_at_end | True | False | the best model is exported, not the last |
| metric_for_best_model | f1_macro | loss | all classes count equally |
| dataloader_num_workers | 2 on CUDA | 0 | cuts chunks while the GPU computes; on a CPU workers compete for cores |
| dataloader_pin_memory | on CUDA | True | causes a warning elsewhere |
| accelerator_config | non_blocking on CUDA | blocking | asynchronous copies from pinned memory |
| logging_nan_inf_filter | False | True | no effect: non-finite steps are skipped, and enter no mean |
| report_to | tensorboard | none | curves without a further option |
| ddp_broadcast_buffers | False | None (True) | buffers are constant and equal on all processes |
| remove_unused_columns | False | True | the collator selects what it needs |
| hub_private_repo | None: private | None: public | the training data may be confidential |
| bf16, fp16 | by device | False | see `choose_precision` |
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments, get_scheduler

# Options that would have no effect here, or the wrong one: name → the values that are accepted, and why no others are.
# (Not every version of transformers has all of them.)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # Training
    "train_sampling_strategy": (
        ("random", "batch_rebalance", "sequential"),
        "encoder batches group chunks by length already, so that grouping documents gains nothing",
    ),
    "length_column_name": (("length",), "lengths are counted in tokens"),
    "average_tokens_across_devices": ((True,), "the loss is always divided by the weights of all processes"),
    "remove_unused_columns": ((False,), "the collator selects what it needs"),
    "optim_target_modules": ((None,), "it is an option of GaLore and APOLLO, which cannot be used"),
    # Speed and memory
    "auto_find_batch_size": (
        (False,),
        "out of memory halves the live chunks and keeps the batch size, so that the result is the same",
    ),
    "use_liger_kernel": ((False,), "it has no kernels for encoders; use --compile_layers"),
    "liger_kernel_config": ((None,), "there are no Liger kernels for encoders; use --compile_layers"),
    "torch_compile": ((False,), "it would also compile the planning of encoder batches; use --compile_layers"),
    "torch_compile_backend": ((None,), "it would also compile the planning of encoder batches; use --compile_layers"),
    "torch_compile_mode": ((None,), "it would also compile the planning of encoder batches; use --compile_layers"),
    "use_cache": ((False,), "an encoder has no cache of keys and values"),
    "dataloader_persistent_workers": (
        (False,),
        "workers ignore signals while an interrupted run is saved, so that persistent ones would keep it from ending",
    ),
    "dataloader_in_order": ((True,), "a resumed run must read the same batches"),
    "debug": (
        ("", [], None),
        "its overflow detection reports attention masks; non-finite steps are skipped, and their documents are named",
    ),
    # Evaluation
    "prediction_loss_only": ((False,), "metrics, early stopping and the best model need the logits"),
    "batch_eval_metrics": (
        (False,),
        "macro-F1 is not a mean over batches; use --eval_accumulation_steps to save memory",
    ),
    "eval_do_concat_batches": ((True,), "metrics are computed over all documents"),
    "include_for_metrics": (([], None), "metrics are computed from logits and labels"),
    "label_names": ((None, ["labels"]), "the labels are in `labels`"),
    "bf16_full_eval": ((False,), "evaluation uses the precision of training, and the final one fp32; use --bf16"),
    "fp16_full_eval": ((False,), "evaluation uses the precision of training, and the final one fp32; use --fp16"),
    # Checkpoints
    "save_only_model": (
        (False,),
        "a run without optimizer state cannot be resumed; use --save_total_limit to save space (the final model is in "
        "output_dir in any case)",
    ),
    "restore_callback_states_from_checkpoint": (
        (False,),
        "callbacks restore their state in any case, and this would replace them by the checkpoint's",
    ),
    "save_on_each_node": ((False,), "output_dir must be on a shared file system, and the first machine writes"),
    "enable_jit_checkpoint": ((False,), "a signal saves a checkpoint already; see --grace_seconds"),
    "hub_always_push": ((False,), "the newest save is always pushed, after the push before it"),
    # Several processes
    "ddp_bucket_cap_mb": ((None,), "gradients are averaged once a step, and not by DDP"),
    "ddp_static_graph": ((None, False), "gradients are averaged once a step, and not by DDP"),
    "fsdp": ((None, "", [], False), "use accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml"),
    "fsdp_config": ((None, {}), "use accelerate launch --config_file scripts/recipes/accelerate/fsdp.yaml"),
    "parallelism_config": ((None,), "documents are shared among processes; use scripts/recipes/accelerate/"),
}
# Likewise the settings of `accelerator_config`.
REFUSED_OF_ACCELERATOR: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_batches": ((False,), "it would separate documents from their chunks"),
    "dispatch_batches": ((None, False), "it would separate documents from their chunks"),
    "even_batches": ((True,), "every process must evaluate the same number of batches"),
    "gradient_accumulation_kwargs": ((None,), "use --gradient_accumulation_steps"),
}
# Settings of activation checkpointing that leave the gradients as they are; the last two from transformers 5.23 on.
CHECKPOINTING_SETTINGS = ("use_reentrant", "determinism_check", "debug", "early_stop", "every_n_layers", "offload")


def choose_precision(use_cpu: bool) -> tuple[str, str]:
    """The fastest precision with native support on the device ("bf16", "fp16" or "fp32"), and the reason."""
    if not use_cpu and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        if major >= 8:
            return "bf16", f"{device} has native bf16"
        if major >= 7:
            return "fp16", f"{device} has fp16 tensor cores and no native bf16"
        return "fp32", f"{device} has no fast half precision"
    if not use_cpu and torch.accelerator.is_available():
        return "fp32", f"half precision is untested on {torch.accelerator.current_accelerator()}"
    capabilities = torch.cpu.get_capabilities()
    native = [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]
    if native:
        return "bf16", f"this CPU has native bf16 ({native[0]})"
    return "fp32", "this CPU has no native bf16"


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """`TrainingArguments` with different defaults (see the table above) and additional fields."""

    # Defaults that differ from TrainingArguments
    output_dir: str = field(default="outputs/run", metadata={"help": "Output directory of the run."})
    num_train_epochs: float = 15.0
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 10
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 3
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "f1_macro"
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "Number of data loading processes. Default: 2 on CUDA, else 0."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Pin batches in memory for faster copies to the GPU. Default: on CUDA only."}
    )
    logging_nan_inf_filter: bool = False
    report_to: str | list[str] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={"help": "Trackers, e.g. tensorboard,mlflow,wandb,trackio; all (that are installed), or none."},
    )
    remove_unused_columns: bool = False
    ddp_broadcast_buffers: bool | None = False
    bf16: bool | None = field(default=None, metadata={"help": "Use bf16 autocast. Default: chosen by device."})
    fp16: bool | None = field(default=None, metadata={"help": "Use fp16 autocast. Default: chosen by device."})

    # Loss
    class_weights: str = field(
        default="balanced",
        metadata={
            "help": "balanced (total / (K × count) of the training labels), none, or General=0.7,Teen=1.5,… With several "
            "labels a document, weights of the documents that have a label; balanced: those without it ÷ those with it."
        },
    )
    # Optimizer
    head_lr_multiplier: float = field(
        default=2.0,
        metadata={"help": "Learning rate of the head, as a multiple of the encoder's."},
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "Train pooling and head only, on cached embeddings."})
    evaluate_kept_vectors: bool = field(
        default=False,
        metadata={
            "help": "With --freeze_encoder: compute the final metrics from the cached embeddings, in training "
            "precision, instead of encoding the tokens again in fp32."
        },
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "Freeze the embeddings and this many of the encoder's first layers."}
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters that are trained in place of the encoder's weights, and merged at the end. Takes "
            "a higher learning rate, such as 3e-4. 0: none."
        },
    )
    max_loss_spike: float | None = field(
        default=None,
        metadata={"help": "Skip steps whose loss exceeds this multiple of the mean of the last 20, e.g. 5."},
    )
    # Stopping
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Evaluations without improvement before training stops. 0: never stop early."}
    )
    early_stopping_min_delta: float = field(
        default=0.001, metadata={"help": "Minimum improvement over the last best value that counts."}
    )
    # Memory and speed
    live_chunks: str = field(
        default="auto",
        metadata={
            "help": "Maximum number of chunks whose activations are kept; the rest are recomputed. 0: no limit; auto: "
            "chosen from the device's free memory."
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in an encoder batch. Default: 4096 on a CPU or with a limit on live chunks, else 16384."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Estimate memory and time of the run without training."})
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Apply torch.compile to the encoder's layers: takes a minute to build, gains little on a CPU."
        },
    )
    cpu_threads: int = field(
        default=0,
        metadata={"help": "CPU threads. 0: the machine's cores divided by its processes."},
    )
    # Data
    streaming: bool = field(
        default=False,
        metadata={"help": "Stream the training documents for --max_steps; see --train_source."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Size of the shuffle buffer of a stream, in documents."}
    )
    # Metrics
    severity_weights: str | None = field(
        default=None,
        metadata={
            "help": "Label weights in severity_f1, in label order, e.g. 0.3,0.3,0.4 (the default for three labels)."
        },
    )
    # Decisions
    decision_metric: str | None = field(
        default=None,
        metadata={
            "help": "f1_macro, severity_f1, or a recall to reach, e.g. recall_Mature=0.95: class biases added to the log "
            "scores are chosen for it on validation. Default: the label with the highest score. With several labels a "
            "document: f1_macro (the default), f1_micro, recall=0.9 or recall_LABEL=0.9, for which thresholds are chosen."
        },
    )
    # Hub
    hub_token: str | None = field(
        default=None, metadata={"help": "Hub token; prefer HF_TOKEN in the environment, where it is moved to."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Visibility of a new repo. Default: private."}
    )
    hub_allow_public: bool = field(default=False, metadata={"help": "Allow pushing to an existing public repo."})
    license: str | None = field(default=None, metadata={"help": "License of the model for its card, e.g. apache-2.0."})
    hub_timeout: float = field(default=600.0, metadata={"help": "Timeout of a push or a hub request, in seconds."})
    grace_seconds: float = field(
        default=30.0,
        metadata={"help": "Maximum seconds to finish the step, save a checkpoint and push it after a signal."},
    )
    # Output
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an existing run in output_dir."})

    # transformers before 5.18 loads an optimizer's state to this device, and torch can load none to cpu:0.
    @property
    def device(self) -> torch.device:
        """Like TrainingArguments', but a CPU without an index."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __post_init__(self) -> None:
        if self.hub_token:
            # Keep the token out of everything that is saved or logged.
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        refuse(REFUSED, vars(self))
        for name, minimum in (
            ("head_lr_multiplier", 0),
            ("early_stopping_patience", 0),
            ("early_stopping_min_delta", 0),
            ("freeze_layers", 0),
            ("lora_rank", 0),
            ("cpu_threads", 0),
            ("learning_rate", 0),
            ("num_train_epochs", 0),
            ("grace_seconds", 0),
            ("hub_timeout", 1),
            ("shuffle_buffer", 1),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {getattr(self, name)}.")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"`token_budget` must be at least 1, got {self.token_budget}.")
        if self.max_loss_spike is not None and self.max_loss_spike <= 1:
            raise ValueError(f"`max_loss_spike` must be above 1, got {self.max_loss_spike}.")
        if self.streaming and (self.max_steps <= 0 or self.freeze_encoder or self.eval_strategy == "epoch"):
            raise ValueError(
                "--streaming needs --max_steps, --eval_strategy steps with --eval_steps, and --save_strategy steps with "
                "--save_steps, since a stream has no epochs. It cannot be combined with --freeze_encoder."
            )
        self.live_chunks = str(self.live_chunks)
        if self.live_chunks != "auto" and not self.live_chunks.isdecimal():
            raise ValueError(f"`live_chunks` must be 'auto' or an integer ≥ 0, got {self.live_chunks!r}.")
        if self.evaluate_kept_vectors and not self.freeze_encoder:
            raise ValueError(
                "`evaluate_kept_vectors` requires `freeze_encoder`: without it there are no cached embeddings."
            )
        if self.freeze_encoder and self.freeze_layers:
            raise ValueError(
                "`freeze_encoder` already freezes all of the encoder's layers: remove `freeze_layers`, or set it to 0 if a "
                "recipe has it."
            )
        if self.freeze_encoder and self.lora_rank:
            raise ValueError("`freeze_encoder` leaves nothing of the encoder to adapt: remove it, or `lora_rank`.")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"`label_smoothing_factor` must be in [0, 1), got {self.label_smoothing_factor}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"`num_train_epochs` must be above 0, got {self.num_train_epochs}.")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Trainer would minimize recall_loss, the recall of a label named "loss".
            self.greater_is_better: bool | None = self.metric_for_best_model.removeprefix("eval_") not in (
                "loss",
                "hamming_loss",
            )
        # Without an accelerator Trainer allows bf16 only with use_cpu.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # transformers 5.23 passes ddp_timeout on for GPUs only; CPU ranks would wait half an hour for a lost rank.
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        on_cuda = not self.use_cpu and torch.cuda.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_cuda else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = on_cuda
        if self.dataloader_pin_memory:
            self.accelerator_config: Any = self.accelerator_config or {"non_blocking": True}
        self.precision_reason = "as configured"
        if self.bf16 is None and self.fp16 is None:
            precision, self.precision_reason = choose_precision(self.use_cpu)
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        self.report_to = [name.strip() for part in names for name in part.split(",") if name.strip()]
        super().__post_init__()
        refuse(REFUSED_OF_ACCELERATOR, vars(self.accelerator_config), " from `accelerator_config`")
        self._check_activation_checkpointing()
        self._check_scheduler()
        if self.freeze_encoder and self.include_num_input_tokens_seen != "no":
            raise ValueError("`include_num_input_tokens_seen` cannot count tokens in cached embeddings: remove it.")
        if self.neftune_noise_alpha is not None and (self.freeze_encoder or self.freeze_layers):
            raise ValueError("`neftune_noise_alpha` adds noise to trained embeddings: leave it, or the freezing, out.")

    def _check_activation_checkpointing(self) -> None:
        """Raise ValueError for settings that would change gradients or fail in the first step.

        transformers 5.23 renames `gradient_checkpointing*`, and sets both names to the same value.
        """
        names = [name for name in vars(self) if name.endswith("_checkpointing_kwargs")]
        settings, option = self.gradient_checkpointing_kwargs, f"`{names[0]}`"
        known = CHECKPOINTING_SETTINGS[: None if "activation_checkpointing_kwargs" in names else -2]
        if settings is None:
            return
        if not isinstance(settings, dict) or not set(settings) <= set(known):
            raise ValueError(f"{option}: expected a mapping with some of {', '.join(known)}, got {settings!r}.")
        if settings.get("use_reentrant"):
            raise ValueError(f"{option}: `use_reentrant` would lose gradients above frozen layers; remove it.")
        if settings.get("offload") and self.device.type == "cpu":
            raise ValueError(f"{option}: `offload` moves activations from a GPU, and there is none; remove it.")
        every_n_layers = settings.get("every_n_layers", 1)
        if not isinstance(every_n_layers, int) or every_n_layers < 1:
            raise ValueError(f"{option}: `every_n_layers` must be an integer of at least 1, got {every_n_layers!r}.")
        for name in names:  # torch's default is reentrant
            setattr(self, name, {"use_reentrant": False} | settings)

    def _check_scheduler(self) -> None:
        """Raise ValueError for `lr_scheduler_kwargs` that the scheduler does not take, or for those that it lacks."""
        kind, kwargs = self.lr_scheduler_type.value, self.lr_scheduler_kwargs  # type: ignore[attr-defined]
        if kwargs is not None and not isinstance(kwargs, dict):
            raise ValueError(f"`lr_scheduler_kwargs` must be a mapping (JSON on the command line), got {kwargs!r}.")
        if kwargs and kind in ("constant", "constant_with_warmup"):
            raise ValueError(f"`lr_scheduler_kwargs` {kwargs} has no effect on `lr_scheduler_type` {kind}: remove it.")
        try:
            get_scheduler(kind, torch.optim.SGD(nn.Linear(1, 1).parameters(), self.learning_rate), 0, 1, kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`lr_scheduler_type` {kind} cannot be used with `lr_scheduler_kwargs` {kwargs}: {error}."
            ) from error

    @property
    def precision(self) -> str:
        """Training precision: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


def refuse(table: Mapping[str, tuple[tuple[Any, ...], str]], values: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for a value that the table does not accept."""
    for name, (accepted, reason) in table.items():
        if name in values and values[name] not in accepted:
            raise ValueError(f"Remove `{name}` ({values[name]}){where}: {reason}.")


def parse_class_weights(text: str, labels: list[str]) -> str | list[float]:
    """Parse `balanced`, `none`, or weights such as `General=0.7,Teen=1.5,Mature=3.8`, returned in label order; an item with a
    comma is in double quotes, as in CSV.

    Raises:
        ValueError: invalid syntax, a missing or unknown label, or a weight that is not positive.
    """
    if text in ("balanced", "none"):
        return text
    quoted = [
        '"{}"'.format(label.replace('"', '""')) if "," in label or label.startswith('"') else label for label in labels
    ]
    expected = f"expected balanced, none, or a weight for each label: {','.join(f'{label}=1.0' for label in quoted)}"
    weights: dict[str, float] = {}
    for item in next(csv.reader([text], skipinitialspace=True), []):
        label, separator, value = item.rpartition("=")
        try:
            weights[label.strip()] = float(value)
        except ValueError:
            raise ValueError(f"Invalid `class_weights` {text!r}: {expected}.") from None
        if not separator or not 0 < weights[label.strip()] < float("inf"):
            raise ValueError(f"Invalid `class_weights` {text!r}: {item!r} has no positive weight; {expected}.")
    if set(weights) != set(labels):
        raise ValueError(
            f"`class_weights` has weights for {', '.join(weights)}, but the labels are {', '.join(labels)}; {expected}."
        )
    return [weights[label] for label in labels]


def parse_severity_weights(text: str | None, num_labels: int) -> list[float]:
    """Parse severity weights in label order. Default: 0.3, 0.3, 0.4 for three labels, else equal weights."""
    if text is None:
        return [0.3, 0.3, 0.4] if num_labels == 3 else [1 / num_labels] * num_labels
    try:
        weights = [float(item) for item in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != num_labels or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"Invalid `severity_weights` {text!r}: expected {num_labels} weights, such as 0.3,0.3,0.4 for three labels."
        )
    return weights


def arguments_record(*arguments: Any) -> dict[str, Any]:
    """All fields of the dataclasses in JSON-serializable form, without tokens."""
    record: dict[str, Any] = {}
    for part in arguments:
        values = part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
        record |= {key: value for key, value in values.items() if not key.endswith("_token")}
    return record
