"""What comes next is prepared while what is there is worked on.

This file travels to the hub with the model and imports nothing else of the project.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetched(function: Callable[[S], T], items: Iterable[S], number: int) -> Iterator[T]:
    """`function` of each item, in their order, so many of them computed ahead by a thread. (Tokenizers release the GIL.)

    The items themselves are read by the caller's thread, at most `number` ahead. An error of `function` is raised where
    its result would have come.

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
