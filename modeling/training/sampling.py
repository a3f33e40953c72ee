"""Order of the training documents, and their distribution over processes."""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

PADDING_INDEX = -1  # index of a document of weight 0 that pads the last batch of an epoch


class EpochSampler(Sampler[int]):
    """Shuffle documents each epoch, depending on seed and epoch only, so that a resumed run reads the same documents.

    With several processes the order is padded with `PADDING_INDEX` to complete rounds of batches; accelerate would
    repeat documents from the beginning, which would then count twice. With `costs`, the documents of each optimizer
    step are balanced across processes; the set of documents in a step, and hence its gradient, is unchanged.

    Args:
        num_processes, batch_size, accumulation_steps: together, the documents of an optimizer step.
        costs: relative cost of encoding each document.
        shuffle: False for the documents' own order in every epoch.

    Attributes:
        seen: (epoch, documents): the first documents of that epoch's order were seen already, and are replaced by padding.
    """

    def __init__(
        self,
        num_documents: int,
        seed: int,
        num_processes: int = 1,
        batch_size: int = 1,
        accumulation_steps: int = 1,
        costs: Sequence[float] | np.ndarray | None = None,
        shuffle: bool = True,
    ):
        self.num_documents, self.seed, self.epoch, self.shuffle = num_documents, seed, 0, shuffle
        self.num_processes, self.batch_size, self.accumulation_steps = num_processes, batch_size, accumulation_steps
        self.costs = costs
        self.seen: tuple[int, int] | None = None
        self.num_padding = -num_documents % (num_processes * batch_size) if num_processes > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_documents + self.num_padding

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.arange(self.num_documents)
        if self.shuffle:
            order = torch.randperm(self.num_documents, generator=generator)
        if self.seen is not None and self.seen[0] == self.epoch:
            order[: self.seen[1]] = PADDING_INDEX
        order = torch.cat([order, torch.full((self.num_padding,), PADDING_INDEX)])
        for part in order.split(self.num_processes * self.batch_size * self.accumulation_steps):
            indices = part.tolist()
            if self.num_processes > 1 and self.costs is not None:
                costs = [0.0 if index == PADDING_INDEX else float(self.costs[index]) for index in indices]
                indices = [indices[i] for i in balance_across_ranks(costs, self.num_processes, self.batch_size)]
            yield from indices


def balance_across_ranks(costs: Sequence[float], num_processes: int, batch_size: int) -> list[int]:
    """Order the documents of a step so that the processes' total costs are balanced.

    Greedy longest-processing-time-first scheduling (Graham 1969): the most expensive document goes to the process with
    the lowest total that still has room. The result is in the order in which accelerate distributes documents (a batch
    to each process in turn).

    >>> balance_across_ranks([9, 1, 8, 2, 7, 3, 1, 1], num_processes=2, batch_size=2)
    [0, 5, 2, 4, 3, 1, 6, 7]
    """
    capacity = len(costs) // num_processes
    assigned: list[list[int]] = [[] for _ in range(num_processes)]
    totals = [(0.0, process) for process in range(num_processes)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, process = heapq.heappop(totals)
        assigned[process].append(index)
        if len(assigned[process]) < capacity:
            heapq.heappush(totals, (total + costs[index], process))
    return [
        index
        for start in range(0, capacity, batch_size)
        for share in assigned
        for index in share[start : start + batch_size]
    ]


class PaddedDataset(Dataset):
    """Wrap a dataset to return a document with label -100 (weight 0) for `PADDING_INDEX`."""

    def __init__(self, documents: Dataset):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != PADDING_INDEX:
            return self.documents[index]
        document = self.documents[0]
        return {**document, "labels": np.full_like(document["labels"], -100), "id": ""}
