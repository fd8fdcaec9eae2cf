"""CPU time of the stages that images pass through."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class StageClock:
    """Adds up the CPU seconds that the threads of a worker spend in each stage.

    Threads that a library starts on its own, as PyTorch and Arrow do, are not counted.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what this thread does in the block."""
        start = time.thread_time()
        try:
            yield
        finally:
            self.add(name, time.thread_time() - start)

    def iterate(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yield items, and count what it takes to get each."""
        while True:
            with self.stage(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured otherwise."""
        with self._lock:
            self._seconds[name] += seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call."""
        with self._lock:
            taken = dict(self._seconds)
            self._seconds.clear()
        return taken
