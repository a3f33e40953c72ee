"""Out-of-memory handling: detection, steps and evaluations repeated with less memory, a retrying optimizer step."""

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from ..hierarchical_roberta.recomputation import random_state, set_random_state

logger = logging.getLogger(__name__)

# Messages of out-of-memory errors other than torch.OutOfMemoryError: torch's other allocators, and CUDA, cuBLAS, cuDNN
# and NCCL, which allocate outside torch's pool.
ERROR_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "HIPBLAS_STATUS_ALLOC_FAILED",
    "Failed to CUDA calloc",
    "Failed to CUDA host alloc",
)


def out_of_memory_reason(error: Exception) -> str | None:
    """First line of an out-of-memory error; None for any other error."""
    is_memory_error = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not is_memory_error and not (
        isinstance(error, RuntimeError) and any(message in str(error) for message in ERROR_MESSAGES)
    ):
        return None
    return (str(error) or type(error).__name__).partition("\n")[0]


class OutOfMemoryRecovery:
    """Repeat an optimizer step, or a batch of an evaluation, with less memory when out of memory.

    A retry halves the live chunks or, at one live chunk, the documents at a time. Loss, effective batch and schedule are
    unchanged.

    Args:
        model: gives the unwrapped model, whose `live_chunks` is lowered.
        can_retry: whether this rank may retry alone, in training (True) or evaluation (False). With sharded weights it may
            not, as all ranks take part in every layer.

    Attributes:
        batches, losses: micro-batches of the current optimizer step so far, and their losses.
        step_rng_state: RNG state at the step's first micro-batch.
        num_parts: parts into which a batch is split by documents, in training (True) and evaluation (False).
    """

    def __init__(self, model: Callable[[], Any], device: torch.device, can_retry: Callable[[bool], bool]):
        self.model, self.device, self.can_retry = model, device, can_retry
        self.num_parts = {True: 1, False: 1}
        self.eval_live_chunks = 0  # no activations are kept in evaluation: it has its own limit
        self.step_rng_state: list[torch.Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Forget the current step."""
        self.batches: list[dict[str, Any]] = []
        self.losses: list[torch.Tensor] = []

    def train(self, run: Callable[[dict[str, Any]], torch.Tensor], batch: dict[str, Any], step: int) -> torch.Tensor:
        """Run the next micro-batch of a step; after out of memory, all of the step's micro-batches so far.

        Args:
            run: forward and backward pass of a batch; returns its loss.
            step: the step's number, for messages.
        """
        if not self.batches:
            self.step_rng_state = random_state(self.device)
        self.batches.append(batch)
        pending = [batch]
        while True:
            try:
                losses = [self._run_in_parts(run, one) for one in pending]
                break
            except (RuntimeError, MemoryError) as error:
                if (reason := out_of_memory_reason(error)) is None:
                    raise
            # Outside the except block, where the traceback would keep the failed pass's tensors alive.
            self._shrink(batch, reason, step)
            self.model().zero_grad()
            set_random_state(self.device, self.step_rng_state)
            pending = self.batches
        self.losses[len(self.batches) - len(losses) :] = losses
        return losses[-1]

    def _run_in_parts(self, run: Callable[[dict[str, Any]], torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        return torch.stack([run(part).detach() for part in split_documents(batch, self.num_parts[True])]).sum()

    def evaluate(self, run: Callable[[dict[str, Any]], torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        """Logits of a batch.

        Args:
            run: forward pass of a batch; returns its logits.
        """
        model = self.model()
        training_limit, model.live_chunks = model.live_chunks, self.eval_live_chunks
        try:
            while True:
                try:
                    return torch.cat([run(part) for part in split_documents(batch, self.num_parts[False])])
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                self._shrink(batch, reason, None)
        finally:
            self.eval_live_chunks, model.live_chunks = model.live_chunks, training_limit

    def _shrink(self, batch: dict[str, Any], reason: str, step: int | None) -> None:
        """Halve the live chunks, or the documents at a time, and log it. `step` is None in evaluation.

        Raises:
            ValueError: a single chunk does not fit, or this rank cannot retry alone.
        """
        training = step is not None
        if not self.can_retry(training):
            lower = "--live_chunks or --per_device_train" if training else "--token_budget or --per_device_eval"
            raise ValueError(f"Out of memory ({reason}): lower {lower}_batch_size.")
        clear_device_cache(garbage_collection=True)
        model, num_parts = self.model(), self.num_parts[training]
        largest = max(int(part["num_chunks"].sum()) for part in split_documents(batch, num_parts))
        live = 1 if "chunk_vectors" in batch else min(model.live_chunks or largest, largest)
        documents = -(-len(batch["num_chunks"]) // num_parts)
        if live > 1:
            model.live_chunks = live // 2
            change = f"live_chunks={live // 2} (was {live})"
        elif documents > 1:
            self.num_parts[training] *= 2
            change = f"{-(-documents // 2)} documents at a time (was {documents})"
        else:
            raise ValueError(
                f"Out of memory with one chunk of one document at a time ({reason}). Lower --chunk_length, freeze "
                "layers (--freeze_layers, --freeze_encoder), use bf16 or fp16, or use a smaller encoder."
            )
        where = f"in step {step}" if training else "in evaluation"
        logger.warning(f"Out of memory {where} ({reason}): retrying with {change}; the result is unchanged.")


def survive_out_of_memory(optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer.step` clear the device cache and retry once when out of memory.

    A retry must not update a weight twice. torch's fused kernels allocate nothing, so a parameter group is updated
    entirely or not at all: groups are stepped one by one, and one that failed is retried after dropping the state it
    had started to allocate. Other optimizers raise a ValueError.
    """
    step = optimizer.step
    is_fused = all(group.get("fused") for group in optimizer.param_groups)

    def retrying_step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        subsets = [[group] for group in self.param_groups] if is_fused else [self.param_groups]
        all_groups = self.param_groups
        try:
            for subset in subsets:
                self.param_groups = subset
                had_state = set(self.state)
                try:
                    step(closure)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                if not is_fused:
                    raise ValueError(
                        f"Out of memory in the optimizer step ({reason}): use --optim adamw_torch_fused, which needs "
                        "the least memory, train less (--lora_rank, --freeze_layers) or use a smaller encoder."
                    )
                for parameter in set(self.state) - had_state:
                    del self.state[parameter]
                clear_device_cache(garbage_collection=True)
                step(closure)
        finally:
            self.param_groups = all_groups
        return None

    optimizer.step = types.MethodType(retrying_step, optimizer)  # type: ignore[method-assign]


def split_documents(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """Split a batch into up to `num_parts` batches by document."""
    num_chunks_B = batch["num_chunks"]
    if num_parts == 1:
        return [batch]
    counts = [int(part.sum()) for part in num_chunks_B.chunk(num_parts)]
    size = -(-len(num_chunks_B) // num_parts)
    starts = range(0, len(num_chunks_B), size)
    per_document = {
        name: [value[start : start + size] for start in starts]
        for name, value in batch.items()
        if len(value) == len(num_chunks_B)
    }
    per_chunk = {name: value.split(counts) for name, value in batch.items() if name not in per_document}
    return [{name: parts[i] for name, parts in (per_document | per_chunk).items()} for i in range(len(counts))]
