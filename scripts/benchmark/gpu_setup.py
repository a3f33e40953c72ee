"""Shared by the GPU checks: randomly initialized models, random documents, training, timing and memory.

B documents, N chunks in the batch, L tokens of a chunk.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from torch.utils.data import Dataset
from transformers import RobertaConfig, TrainerCallback

from data.collator import DocumentCollator
from modeling.hierarchical_roberta.configuration_hierarchical_roberta import HierarchicalRobertaConfig
from modeling.hierarchical_roberta.modeling_hierarchical_roberta import HierarchicalRobertaForSequenceClassification
from modeling.training.memory import SplitLengths
from modeling.training.runtime import use_flash_attention_on_cuda
from modeling.training.trainer import WeightedTrainer
from modeling.training.training_args import HierarchicalTrainingArguments
from scripts.benchmark.gpu_runner import Settings
from scripts.benchmark.synthetic_documents import MIX

GIB = 2**30
PAD = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASS_WEIGHTS = (0.54, 1.21, 2.97)


def set_up(settings: Settings) -> torch.device:
    """Set seeds, logging and the attention implementation; returns the device. Every check calls this first."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(0)
    use_flash_attention_on_cuda()
    if settings.tiny:
        torch.set_num_threads(1)
    return torch.device(settings.device, 0) if settings.is_cuda else torch.device("cpu")


def precisions(settings: Settings) -> tuple[str, ...]:
    """Precisions supported on the device; accelerate does not support fp16 on CPU."""
    return ("fp32", "bf16", "fp16") if settings.is_cuda else ("fp32", "bf16")


# ---- models ----------------------------------------------------------------------------------------------------------


def chunk_length(settings: Settings) -> int:
    return 32 if settings.tiny else 512


def encoder_config(settings: Settings, layers: int = 12, vocab_size: int = 50265, **fields: Any) -> RobertaConfig:
    """Config of RoBERTa-base, or a tiny one. Fewer layers and tokens keep checkpoints small."""
    if settings.tiny:
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37}
        return RobertaConfig(vocab_size=99, num_hidden_layers=2, max_position_embeddings=66, **sizes, **fields)
    return RobertaConfig(
        vocab_size=vocab_size, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1, **fields
    )


def build_model(
    settings: Settings,
    kind: type[HierarchicalRobertaForSequenceClassification] = HierarchicalRobertaForSequenceClassification,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    length: int | None = None,
    max_chunks: int = 20,
    **fields: Any,
) -> HierarchicalRobertaForSequenceClassification:
    """A classifier on the CPU with the same random weights in every call. Cached, as initialization takes seconds."""
    key = repr((kind, dropout, attention_dropout, length, max_chunks, fields))
    if key not in _models:
        torch.manual_seed(0)
        encoder = encoder_config(
            settings, hidden_dropout_prob=dropout, attention_probs_dropout_prob=attention_dropout, **fields
        )
        config = HierarchicalRobertaConfig(
            encoder_config=encoder,
            num_labels=3,
            chunk_length=length or chunk_length(settings),
            max_chunks=max_chunks,
            classifier_dropout=dropout,
        )
        _models[key] = kind(config)
        _models[key].token_budget = 64 if settings.tiny else None
    return copy.deepcopy(_models[key])


_models: dict[str, HierarchicalRobertaForSequenceClassification] = {}


# ---- documents -------------------------------------------------------------------------------------------------------


class RandomDocuments(Dataset):
    """Documents of random tokens. `sizes` are their lengths in chunks; a document of size 3.4 has four chunks of
    similar length, as made by the chunker, and one of size 20 has 20 full chunks."""

    def __init__(self, sizes: Sequence[float], length: int, vocab_size: int = 50265, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.items: list[dict[str, Any]] = []
        for number, size in enumerate(sizes):
            count = max(1, int(np.ceil(size)))
            mean = length * size / count
            low = mean if size == count else 0.85 * mean
            lengths = np.clip(np.round(rng.uniform(low, mean, count)), 3, length).astype(int)
            chunks = [rng.integers(5, vocab_size, tokens, dtype=np.int64) for tokens in lengths]
            self.items.append({"input_ids": chunks, "labels": number % 3, "id": f"d{number}"})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def lengths(self) -> list[int]:
        """Number of tokens of every chunk."""
        return [len(chunk) for item in self.items for chunk in item["input_ids"]]

    def sizes(self) -> SplitLengths:
        """Number of chunks and mean chunk length of each document, for `choose_live_chunks`."""
        chunks = [item["input_ids"] for item in self.items]
        return SplitLengths(
            np.array([len(each) for each in chunks]),
            np.array([sum(map(len, each)) / len(each) for each in chunks]),
        )


def documents_of(settings: Settings, sizes: Sequence[float], length: int | None = None) -> RandomDocuments:
    vocab_size = 99 if settings.tiny else 5000  # below the vocabulary size of every check's encoder
    return RandomDocuments(sizes, length or chunk_length(settings), vocab_size)


def mix(settings: Settings, count: int) -> RandomDocuments:
    """Documents of 1 to 20 chunks, 6 on average, of varying chunk length."""
    if settings.tiny:
        return documents_of(settings, [1 + size % 3 for size in (MIX * 4)[: min(count, 8)]])
    return documents_of(settings, [MIX[i % len(MIX)] for i in range(count)])


def films(settings: Settings, count: int) -> RandomDocuments:
    """Documents of 20 full-length chunks."""
    return documents_of(settings, [4.0] * min(count, 4) if settings.tiny else [20.0] * count)


def batch_of(documents: RandomDocuments, device: torch.device, count: int | None = None) -> dict[str, Any]:
    """The first `count` documents as one batch on the device."""
    batch = DocumentCollator(PAD)([documents[i] for i in range(count or len(documents))])
    return send_to_device(batch, device)


# ---- training --------------------------------------------------------------------------------------------------------


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def training_arguments(settings: Settings, precision: str = "bf16", **overrides: Any) -> HierarchicalTrainingArguments:
    """Training arguments without saving and evaluation by default."""
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not settings.is_cuda,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_num_workers": 0,
        "warmup_steps": 0,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    return HierarchicalTrainingArguments(**(defaults | overrides))


class Clock(TrainerCallback):
    """Times steps and epochs, synchronizing the device at the start and end of each.

    Attributes:
        steps: seconds of each optimizer step.
        epochs: seconds of each epoch.
        losses: logged losses.
        peaks: peak (allocated, reserved) bytes of each epoch.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[float] = []
        self.epochs: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[tuple[int, int]] = []
        self._step = self._epoch = 0.0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        reset_peak(self.device)
        self._epoch = now(self.device)

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.epochs.append(now(self.device) - self._epoch)
        self.peaks.append(peak(self.device))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step = now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(now(self.device) - self._step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_for(
    settings: Settings,
    model: HierarchicalRobertaForSequenceClassification,
    documents: RandomDocuments,
    precision: str = "bf16",
    collator: Callable[..., Any] | None = None,
    **overrides: Any,
) -> tuple[WeightedTrainer, Clock]:
    """A WeightedTrainer with class weights, and its clock. The default batch size is 4 × 2 accumulation steps."""
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2} | overrides
    args = training_arguments(settings, precision, **arguments)
    clock = Clock(args.device)
    trainer = WeightedTrainer(
        model=model.to(args.device),
        args=args,
        class_weights=torch.tensor(CLASS_WEIGHTS),
        data_collator=collator or DocumentCollator(PAD, with_ids=True),
        train_dataset=documents,
        eval_dataset=documents,
        callbacks=[clock],
    )
    return trainer, clock


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients in fp64. Zeroes them in the model."""
    gradients = {name: p.grad.detach().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def largest_difference(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """Maximum over the tensors of the largest absolute difference ÷ the largest absolute value in the tensor, which is
    at least 1e-3 of the largest value of all tensors: some, like the gradient of the key bias, are zero up to
    rounding."""
    largest = {name: float(tensor.abs().max()) for name, tensor in ours.items()}
    floor = 1e-3 * max(largest.values())
    return max(
        float((theirs[name] - tensor.to(theirs[name].device)).abs().max()) / max(largest[name], floor)
        for name, tensor in ours.items()
    )


def relative_error(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """Norm of the difference ÷ norm, over all tensors."""
    difference = sum(float((theirs[name] - tensor).pow(2).sum()) for name, tensor in ours.items())
    return (difference / sum(float(tensor.pow(2).sum()) for tensor in ours.values())) ** 0.5


# ---- clocks and memory -----------------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Current time after synchronizing the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(device: torch.device, function: Callable[[], Any], times: int = 1) -> float:
    """Mean duration of a call in seconds."""
    started = now(device)
    for _ in range(times):
        function()
    return (now(device) - started) / times


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> tuple[int, int]:
    """Peak bytes (allocated, reserved) since `reset_peak`; (0, 0) on CPU."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


@contextmanager
def card_of(device: torch.device, gib: float) -> Iterator[int]:
    """Simulate a card with `gib` of memory by allocating the rest as ballast. Yields the bytes of the ballast, 0 on
    CPU.

    The CUDA context counts towards `gib`, as on a real card. set_per_process_memory_fraction does not work here:
    mem_get_info, from which live chunks are chosen, ignores it.
    """
    if device.type != "cuda":
        yield 0
        return
    torch.ones(256, 256, device=device).mm(torch.ones(256, 256, device=device))  # allocate the cuBLAS workspace first
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    num_bytes = int(torch.cuda.mem_get_info(device)[1] - gib * GIB)
    if num_bytes <= 0:
        raise ValueError(f"this card has less than {gib:g} GiB of memory")
    ballast = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    try:
        yield ballast.numel()
    finally:
        del ballast
        torch.cuda.empty_cache()


def context_bytes(device: torch.device) -> int:
    """Bytes used outside torch's allocator: CUDA context, libraries, other processes."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def matmul_peak(settings: Settings, device: torch.device, dtype: torch.dtype, times: int = 5) -> float:
    """TFLOP/s of multiplying large square matrices, best of `times`."""
    size = 256 if settings.tiny else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    best = min(seconds_of(device, lambda: left @ right, 3) for _ in range(times))
    return 2 * size**3 / best / 1e12


def encoder_flops(model: HierarchicalRobertaForSequenceClassification, lengths: Sequence[int]) -> float:
    """Floating-point operations of a forward and backward pass over chunks of these lengths:
    6 × matrix weights of the layers × tokens, and 12 · layers · L · D per token for attention."""
    layers = model.encoder_layers()
    matrices = sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() == 2)
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    return 6.0 * matrices * tokens + 12.0 * len(layers) * model.config.hidden_size * squares
