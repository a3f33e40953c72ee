"""What comes next is prepared while what is there is worked on.

This file travels to the hub with the model and imports nothing else of the project.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from torch.utils.data import IterableDataset

T = TypeVar("T")
END = object()


def prefetched(items: Iterable[T], number: int = 1) -> Iterator[T]:
    """The items in their order, so many of them made ahead by a thread. (Tokenizers and tensors leave it free to run.) An
    error is raised where its item would have come.

    >>> list(prefetched(iter("abc"), 2))
    ['a', 'b', 'c']
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, source, END) for _ in range(number))
        try:
            while (item := ahead.popleft().result()) is not END:
                ahead.append(thread.submit(next, source, END))
                yield item  # type: ignore[misc]
        finally:
            for waiting in ahead:
                waiting.cancel()


class Prefetched(IterableDataset):
    """An endless or finite dataset whose next items are made ahead by a thread."""

    def __init__(self, documents: IterableDataset, number: int):
        self.documents, self.number = documents, number

    def __iter__(self) -> Iterator[Any]:
        return prefetched(self.documents, self.number)
