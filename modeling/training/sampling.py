"""In which order documents are read, and by which process."""

import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

PADDING_INDEX = -1  # index of a document that only fills up the last batch of an epoch, and counts for nothing


class EpochSampler(Sampler[int]):
    """A fresh order each epoch that depends on seed and epoch alone, so that a resumed run reads what it would have.

    With several processes the order is filled up with `PADDING_INDEX` to whole rounds of batches: accelerate would fill it up
    with documents from the beginning, and these would count twice. Where costs are given the documents of each optimizer
    step are dealt out so that the processes finish together; which documents make up a step does not change, and so
    neither does its gradient.

    Args:
        num_processes, batch_size, accumulation_steps: what makes up an optimizer step.
        costs: what it takes to encode each document, in any unit.
    """

    def __init__(
        self,
        num_documents: int,
        seed: int,
        num_processes: int = 1,
        batch_size: int = 1,
        accumulation_steps: int = 1,
        costs: Sequence[float] | np.ndarray | None = None,
    ):
        self.num_documents, self.seed, self.epoch = num_documents, seed, 0
        self.num_processes, self.batch_size, self.accumulation_steps = num_processes, batch_size, accumulation_steps
        self.costs = costs
        self.num_blanks = -num_documents % (num_processes * batch_size) if num_processes > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_documents + self.num_blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_documents, generator=generator)
        order = torch.cat([order, torch.full((self.num_blanks,), PADDING_INDEX)])
        for part in order.split(self.num_processes * self.batch_size * self.accumulation_steps):
            indices = part.tolist()
            if self.num_processes > 1 and self.costs is not None:
                costs = [0.0 if index == PADDING_INDEX else float(self.costs[index]) for index in indices]
                indices = [indices[place] for place in balance_across_ranks(costs, self.num_processes, self.batch_size)]
            yield from indices


def balance_across_ranks(costs: Sequence[float], num_processes: int, batch_size: int) -> list[int]:
    """The documents of a step in the order in which accelerate deals them out (a batch to each process in turn), so that
    the processes' total costs are as even as a greedy choice makes them: the dearest first, each to the process that
    has least and still has room (Graham 1969, longest processing time first).

    >>> balance_across_ranks([9, 1, 8, 2, 7, 3, 1, 1], num_processes=2, batch_size=2)
    [0, 5, 2, 4, 3, 1, 6, 7]
    """
    room = len(costs) // num_processes
    hands: list[list[int]] = [[] for _ in range(num_processes)]
    totals = [(0.0, process) for process in range(num_processes)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, process = heapq.heappop(totals)
        hands[process].append(index)
        if len(hands[process]) < room:
            heapq.heappush(totals, (total + costs[index], process))
    return [
        index for start in range(0, room, batch_size) for hand in hands for index in hand[start : start + batch_size]
    ]


class PaddedDataset(Dataset):
    """A data set that gives a document with the label -100 (weight 0) for the index `PADDING_INDEX`."""

    def __init__(self, documents: Dataset):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.documents[0], "labels": -100, "id": ""} if index == PADDING_INDEX else self.documents[index]
