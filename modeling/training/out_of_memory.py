"""Out-of-memory handling: detection, a retrying optimizer step, and splitting of batches."""

import types
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

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
                        "the least memory, freeze layers (--freeze_layers) or use a smaller encoder."
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
