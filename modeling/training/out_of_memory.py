"""Out of memory: its many signs, and an optimizer whose step survives it."""

import types
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

# How libraries say it, beside torch.OutOfMemoryError: torch's allocators, and CUDA, cuBLAS, cuDNN and NCCL, which take
# memory past torch's pool where a small card is full.
SIGNS = (
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
    """The first line of an error that says that memory is full; None for any other."""
    is_disk_full = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not is_disk_full and not (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)):
        return None
    return (str(error) or type(error).__name__).partition("\n")[0]


def survive_out_of_memory(optimizer: torch.optim.Optimizer) -> None:
    """Make `optimizer.step` free what is cached and begin again, once, where memory is full.

    That must not step a weight twice. torch's fused kernels take no memory, so that in a parameter group either
    everything has changed or nothing has: the groups are stepped one by one, and one that failed is repeated, without
    the moments it had begun to allocate. Other optimizers end with a ValueError that says what to do.
    """
    step = optimizer.step
    is_fused = all(group.get("fused") for group in optimizer.param_groups)

    def surviving(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        parts = [[group] for group in self.param_groups] if is_fused else [self.param_groups]
        whole = self.param_groups
        try:
            for part in parts:
                self.param_groups = part
                had_state = set(self.state)
                try:
                    step(closure)
                    continue
                except (RuntimeError, MemoryError) as error:
                    if (reason := out_of_memory_reason(error)) is None:
                        raise
                if not is_fused:
                    raise ValueError(
                        f"Out of memory in the optimizer's step ({reason}): use --optim adamw_torch_fused, which needs "
                        "least, freeze layers (--freeze_layers), or take a smaller encoder."
                    )
                for parameter in set(self.state) - had_state:
                    del self.state[parameter]
                clear_device_cache(garbage_collection=True)
                step(closure)
        finally:
            self.param_groups = whole
        return None

    optimizer.step = types.MethodType(surviving, optimizer)  # type: ignore[method-assign]


def split_documents(batch: dict[str, Any], num_parts: int) -> list[dict[str, Any]]:
    """A batch as up to `num_parts` smaller ones, each with its own documents' chunks."""
    num_chunks_B = batch["num_chunks"]
    if num_parts == 1:
        return [batch]
    counts = [int(part.sum()) for part in num_chunks_B.chunk(num_parts)]
    size = -(-len(num_chunks_B) // num_parts)
    starts = range(0, len(num_chunks_B), size)
    of_documents = {
        name: [value[start : start + size] for start in starts]
        for name, value in batch.items()
        if len(value) == len(num_chunks_B)
    }
    of_chunks = {name: value.split(counts) for name, value in batch.items() if name not in of_documents}
    return [{name: parts[i] for name, parts in (of_documents | of_chunks).items()} for i in range(len(counts))]
