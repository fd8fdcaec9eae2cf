"""Work done by threads, ahead of its use or behind its caller, in order and bounded in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

from pipelines.data.timed_pool import TimedPool
from unianom.errors import ImageError

T = TypeVar("T")
R = TypeVar("R")

_END: Any = object()


def map_ahead(
    pool: ThreadPoolExecutor | TimedPool,
    function: Callable[[T], R],
    items: Iterator[T],
    ahead: int,
    timed_out: Callable[[T, ImageError], R] | None = None,
    size: Callable[[T], int] = lambda _: 0,
    most: int = 0,
) -> Iterator[R]:
    """Yield `function` of items in order, at most `ahead` of them being worked on or waiting, so memory is bounded.

    Args:
        pool: threads that work on the items.
        function: called by them.
        items: taken one by one.
        ahead: how many.
        timed_out: returns what is yielded for an item that took longer than the pool allows; None raises the error.
        size: of an item.
        most: beyond this sum of the sizes of such items no other is taken.
    """

    def result(item: T, future: Future[R]) -> R:
        try:
            return future.result()
        except ImageError as error:
            if timed_out is None or error.status != "timeout":
                raise
            return timed_out(item, error)

    waiting: deque[tuple[T, Future[R]]] = deque()
    held = 0
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        held += size(item)
        while len(waiting) >= ahead or held > most:
            first, future = waiting.popleft()
            held -= size(first)
            yield result(first, future)
    while waiting:
        yield result(*waiting.popleft())


def read_ahead(pool: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    """Yield items, of which a thread gets the next one meanwhile."""
    coming = pool.submit(next, items, _END)
    try:
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield item
    finally:
        wait([coming])  # before whoever gave the items closes what they are read from


class Behind:
    """Calls that another thread makes in their order; at most `most` of them wait, so memory is bounded.

    A context manager: at its end all calls are made, or have failed.

    Args:
        pool: of one thread.
        most: calls that wait; one more is taken when the first of them is done.
    """

    def __init__(self, pool: ThreadPoolExecutor, most: int) -> None:
        self._pool, self._most = pool, most
        self._waiting: deque[Future[Any]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a call made; raise what an earlier one raised."""
        if len(self._waiting) >= self._most:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(function, *arguments))

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait(self._waiting)
        if kind is None:
            for future in self._waiting:
                future.result()
