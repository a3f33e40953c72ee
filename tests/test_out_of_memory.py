"""Out of memory is known in all its forms, and an optimizer's step survives it. (What training does then: test_memory.py.)"""

import pytest
import torch

from modeling.training.out_of_memory import out_of_memory_reason, survive_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("NCCL error: unhandled cuda error, Failed to CUDA calloc 4194304 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_known_in_all_its_forms(error):
    assert out_of_memory_reason(error)
    assert out_of_memory_reason(RuntimeError("shapes do not match")) is None
    assert out_of_memory_reason(ValueError("out of memory")) is None


class FullOnce(torch.optim.AdamW):
    """Memory is full when the second parameter group first allocates its moments."""

    failures = 1

    def step(self, closure=None):
        group = self.param_groups[-1]
        if self.failures and group["name"] == "second" and len(self.param_groups) == 1 + (not self.is_fused):
            self.failures -= 1
            if not self.is_fused:
                super().step()
            self.state[group["params"][0]]["step"] = torch.tensor(0.0)  # begun, without its moments
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().step()

    @property
    def is_fused(self) -> bool:
        return bool(self.param_groups[0]["fused"])


def steps_of(optimizer_class, fused: bool) -> list[torch.Tensor]:
    weights = [torch.nn.Parameter(torch.arange(4.0) + i) for i in range(2)]
    groups = [{"params": [weight], "name": name} for weight, name in zip(weights, ("first", "second"), strict=True)]
    optimizer = optimizer_class(groups, lr=0.1, fused=fused)
    survive_out_of_memory(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert [group["name"] for group in optimizer.param_groups] == ["first", "second"]
    return weights


def test_an_optimizer_survives_out_of_memory_with_the_same_bits():
    for found, expected in zip(steps_of(FullOnce, True), steps_of(torch.optim.AdamW, True), strict=True):
        assert torch.equal(found, expected)


def test_an_optimizer_whose_step_cannot_be_repeated_says_what_to_do():
    with pytest.raises(ValueError, match=r"(?i)(out of memory|OOM)\b.*optimizer.*adamw_torch_fused"):
        steps_of(FullOnce, False)
