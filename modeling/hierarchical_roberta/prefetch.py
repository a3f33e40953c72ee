"""Prefetching in a background thread.

Pushed to the hub with the model; imports nothing else from the project.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetched(function: Callable[[S], T], items: Iterable[S], number: int) -> Iterator[T]:
    """Map `function` over items in order, computing up to `number` results ahead in a thread.

    Tokenizers release the GIL. Items are read in the caller's thread. An exception in `function` is raised
    in place of its result.

    >>> list(prefetched(str.upper, iter("abc"), 2))
    ['A', 'B', 'C']
    """
    ahead: deque[Future[T]] = deque()
    thread = ThreadPoolExecutor(1)
    try:
        for item in items:
            ahead.append(thread.submit(function, item))
            if len(ahead) > number:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
