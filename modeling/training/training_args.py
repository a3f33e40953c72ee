"""What this task adds to `TrainingArguments`, and the defaults it changes.

| field | here | Trainer's | why |
|---|---|---|---|
| num_train_epochs | 15 | 3 | small data sets; early stopping ends it sooner |
| per_device_train_batch_size | 4 | 8 | a document is many chunks |
| per_device_eval_batch_size | 4 | 8 | likewise |
| gradient_accumulation_steps | 4 | 1 | an effective batch of 16 |
| learning_rate | 2e-5 | 5e-5 | RoBERTa's own fine-tuning rates (Liu et al. 2019) |
| weight_decay | 0.01 | 0 | as in BERT and RoBERTa |
| warmup_steps | 0.1 | 0 | linear over the first tenth of the run (below 1 it is a share) |
| lr_scheduler_type | cosine | linear | to zero at the end |
| logging_steps | 10 | 500 | steps are few and long |
| eval_strategy, save_strategy | epoch | no, steps | early stopping looks at each epoch |
| save_total_limit | 3 | none | the best and at most two more |
| load_best_model_at_end | True | False | what is exported is the best, not the last |
| metric_for_best_model | f1_macro | loss | every class counts alike |
| dataloader_num_workers | 2 on CUDA | 0 | chunks are cut while the GPU works; on a CPU workers would take its cores |
| dataloader_pin_memory | on CUDA | True | a warning elsewhere |
| accelerator_config | non_blocking on CUDA | blocking | copies from pinned memory need not be waited for |
| logging_nan_inf_filter | False | True | a NaN must be seen, not averaged away |
| restore_callback_states_from_checkpoint | True | False | the patience counter is part of the run |
| ddp_broadcast_buffers | False | None (True) | the buffers are the same in every process and do not change |
| remove_unused_columns | False | True | the collator takes what it needs |
| hub_private_repo | None: private | None: public | what was trained on may not be anybody's to see |
| bf16, fp16 | by device | False | see `choose_precision` |
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments


def choose_precision(use_cpu: bool) -> tuple[str, str]:
    """The fastest arithmetic that the device does natively, and why: `("bf16", reason)`, "fp16" or "fp32"."""
    if not use_cpu and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        if major >= 8:
            return "bf16", f"{device} has native bf16"
        if major >= 7:
            return "fp16", f"{device} has fp16 tensor cores and no native bf16"
        return "fp32", f"{device} has no fast half precision"
    if not use_cpu and torch.accelerator.is_available():
        return "fp32", f"half precision was not tried on {torch.accelerator.current_accelerator()}"
    capabilities = torch.cpu.get_capabilities()
    native = [name for name in ("avx512_bf16", "amx_bf16") if capabilities.get(name)]
    if native:
        return "bf16", f"this CPU has native bf16 ({native[0]})"
    return "fp32", "this CPU has no native bf16"


@dataclass
class HierarchicalTrainingArguments(TrainingArguments):
    """`TrainingArguments` with this task's defaults (the table above) and these fields more."""

    # What Trainer has, with other defaults
    output_dir: str = field(default="outputs/run", metadata={"help": "Where the run is written."})
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
        default=None, metadata={"help": "Processes that read documents. Default: 2 on CUDA, else none."}
    )
    dataloader_pin_memory: bool | None = field(
        default=None, metadata={"help": "Batches in memory that a GPU copies from directly. Default: on CUDA."}
    )
    logging_nan_inf_filter: bool = False
    restore_callback_states_from_checkpoint: bool = True
    remove_unused_columns: bool = False
    ddp_broadcast_buffers: bool | None = False
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast. Default: chosen for the device."})
    fp16: bool | None = field(default=None, metadata={"help": "fp16 autocast. Default: chosen for the device."})

    # Loss
    class_weights: str = field(
        default="balanced",
        metadata={"help": "balanced: total / (K × count) from the training labels; none; or General=0.7,Teen=1.5,…"},
    )
    # Optimizer
    head_lr_multiplier: float = field(
        default=2.0,
        metadata={"help": "The head starts from noise: its learning rate is this many times the encoder's."},
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "Train pooling and head only, on chunk vectors made once."}
    )
    evaluate_kept_vectors: bool = field(
        default=False,
        metadata={
            "help": "With --freeze_encoder: the final metrics from the kept vectors too, in the precision of training, and "
            "not from the tokens again in fp32."
        },
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "Freeze the embeddings and the encoder's first layers, so many of them."}
    )
    max_loss_spike: float | None = field(
        default=None,
        metadata={"help": "A step whose loss is above so many times the mean of the last 20 is not taken (5, say)."},
    )
    # Stopping
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Evaluations without improvement; 0: never stop."}
    )
    early_stopping_min_delta: float = field(
        default=0.001, metadata={"help": "An improvement counts when it exceeds the last counted best by this."}
    )
    # Memory and speed
    live_chunks: str = field(
        default="auto",
        metadata={
            "help": "Maximum number of chunks whose activations are kept; the rest are recomputed. 0: no limit; auto: "
            "what the device's free memory holds."
        },
    )
    token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in an encoder batch. Default: 4096 on a CPU and where live chunks are bounded, else 16384."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Say what a run would take, memory and time, and train nothing."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={"help": "torch.compile for the encoder's layers: a minute to build, little to gain on a CPU."},
    )
    cpu_threads: int = field(
        default=0,
        metadata={"help": "Threads on a CPU. 0: the machine's cores, shared among its processes."},
    )
    # Data
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training documents as a stream, for --max_steps: see --train_source."},
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Documents of a stream that the next is drawn from."})
    # Metrics
    severity_weights: str | None = field(
        default=None,
        metadata={"help": "Weights of the labels in severity_f1, in their order: 0.3,0.3,0.4 (the default for three)."},
    )
    # Hub
    hub_token: str | None = field(default=None, metadata={"help": "Better HF_TOKEN in the environment; moved there."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Of a new repo. Default: private."})
    hub_allow_public: bool = field(default=False, metadata={"help": "Push to a repo that is public already."})
    license: str | None = field(default=None, metadata={"help": "Of the model, on its card: apache-2.0, for example."})
    hub_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that one push, or one answer of the hub, may take."}
    )
    grace_seconds: float = field(
        default=30.0,
        metadata={
            "help": "Seconds that a run which is stopped by a signal takes for its checkpoint, and its push, at most."
        },
    )
    # Output
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir."})

    def __post_init__(self) -> None:
        if self.hub_token:
            # Nothing that is saved or logged shall have it.
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        for name, least in (
            ("head_lr_multiplier", 0),
            ("early_stopping_patience", 0),
            ("early_stopping_min_delta", 0),
            ("freeze_layers", 0),
            ("cpu_threads", 0),
            ("learning_rate", 0),
            ("num_train_epochs", 0),
            ("grace_seconds", 0),
            ("hub_timeout", 1),
            ("shuffle_buffer", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, and is {getattr(self, name)}.")
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, and is {self.token_budget}.")
        if self.max_loss_spike is not None and self.max_loss_spike <= 1:
            raise ValueError(f"max_loss_spike must be above 1, and is {self.max_loss_spike}.")
        if self.streaming and (self.max_steps <= 0 or self.freeze_encoder or self.eval_strategy == "epoch"):
            raise ValueError(
                "A stream has no end and no epochs: --streaming needs --max_steps, --eval_strategy steps with --eval_steps, "
                "--save_strategy steps with --save_steps, and cannot keep chunk vectors (--freeze_encoder)."
            )
        self.live_chunks = str(self.live_chunks)
        if self.live_chunks != "auto" and not self.live_chunks.isdecimal():
            raise ValueError(f"live_chunks must be auto or a number, 0 for no bound, and is {self.live_chunks}.")
        if self.evaluate_kept_vectors and not self.freeze_encoder:
            raise ValueError("There are no kept vectors to evaluate: evaluate_kept_vectors goes with freeze_encoder.")
        if self.freeze_encoder and self.freeze_layers:
            raise ValueError("freeze_encoder freezes all of the encoder's layers: leave freeze_layers out.")
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError("torch_compile would compile the planning of encoder batches too: use --compile_layers.")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, and is {getattr(self, name)}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor must be in [0, 1), and is {self.label_smoothing_factor}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"num_train_epochs must be above 0, and is {self.num_train_epochs}.")
        if self.save_only_model:
            raise ValueError(
                "save_only_model leaves nothing to go on from: leave it out. (save_total_limit bounds the checkpoints; the "
                "finished model stands at the top of output_dir by itself.)"
            )
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            # Trainer would take recall_loss, of a label "loss", for one that is to be low.
            self.greater_is_better: bool | None = self.metric_for_best_model.removeprefix("eval_") != "loss"
        # Without an accelerator Trainer wants to be told so before it allows bf16.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        if self.use_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # transformers 5.23 hands ddp_timeout on to GPUs' processes only: on a CPU a lost one would be waited for for
            # half an hour.
            PartialState(cpu=True, backend=self.ddp_backend, timeout=timedelta(seconds=self.ddp_timeout))
        on_cuda = not self.use_cpu and torch.cuda.is_available()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 2 if on_cuda else 0
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = on_cuda
        if self.dataloader_pin_memory:
            self.accelerator_config: Any = self.accelerator_config or {"non_blocking": True}
        self.precision_reason = "as given"
        if self.bf16 is None and self.fp16 is None:
            precision, self.precision_reason = choose_precision(self.use_cpu)
            self.bf16, self.fp16 = precision == "bf16", precision == "fp16"
        self.bf16, self.fp16 = bool(self.bf16), bool(self.fp16)
        super().__post_init__()

    @property
    def precision(self) -> str:
        """What the arithmetic runs in: bf16, fp16 or fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


def parse_class_weights(text: str, labels: list[str]) -> str | list[float]:
    """`balanced`, `none`, or the weights in label order of `General=0.7,Teen=1.5,Mature=3.8`.

    Raises:
        ValueError: neither of these, a label that is missing or unknown, a weight that is not positive.
    """
    if text in ("balanced", "none"):
        return text
    expected = f"expected balanced, none, or a weight for each label: {','.join(f'{label}=1.0' for label in labels)}"
    weights: dict[str, float] = {}
    for item in text.split(","):
        label, sign, value = item.partition("=")
        try:
            weights[label.strip()] = float(value)
        except ValueError:
            raise ValueError(f"class_weights is {text!r}; {expected}.") from None
        if not sign or not 0 < weights[label.strip()] < float("inf"):
            raise ValueError(f"class_weights is {text!r}: {item!r} is no positive weight; {expected}.")
    if set(weights) != set(labels):
        raise ValueError(
            f"class_weights names {', '.join(weights)}, and the labels are {', '.join(labels)}; {expected}."
        )
    return [weights[label] for label in labels]


def parse_severity_weights(text: str | None, num_labels: int) -> list[float]:
    """The severity weights in label order; 0.3, 0.3, 0.4 for three labels and equal ones otherwise where not given."""
    if text is None:
        return [0.3, 0.3, 0.4] if num_labels == 3 else [1 / num_labels] * num_labels
    try:
        weights = [float(item) for item in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != num_labels or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"severity_weights is {text!r}; expected {num_labels} weights such as 0.3,0.3,0.4.")
    return weights


def arguments_record(*arguments: Any) -> dict[str, Any]:
    """Every field of the dataclasses, as JSON can hold it. Tokens are left out."""
    record: dict[str, Any] = {}
    for part in arguments:
        values = part.to_dict() if isinstance(part, TrainingArguments) else vars(part)
        record |= {key: value for key, value in values.items() if not key.endswith("_token")}
    return record
