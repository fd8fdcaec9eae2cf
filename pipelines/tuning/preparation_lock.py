"""A lock for what trials share: one of them prepares it, and the others wait and find it there."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

PATIENCE = 20.0
"""Seconds after which the lock passes on from a trial that does not ask again: its process died."""


class PreparationLock:
    """Says who may prepare what trials share, so that no two write it at a time. A Ray actor."""

    def __init__(self) -> None:
        self._holder: str | None = None
        self._asked_at = 0.0

    def take(self, name: str) -> bool:
        """Return whether this one holds the lock, who is to ask again every few seconds, or it passes on."""
        now = time.monotonic()
        if self._holder not in (None, name) and now - self._asked_at < PATIENCE:
            return False
        self._holder, self._asked_at = name, now
        return True

    def leave(self, name: str) -> None:
        """Release the lock if this one holds it."""
        if self._holder == name:
            self._holder = None


@contextmanager
def hold_lock(lock: Any) -> Iterator[None]:
    """Wait for the lock, a handle to the actor `PreparationLock`, and keep it for the length of the block."""
    name = f"{os.getpid()}-{uuid.uuid4().hex}"
    while not ray.get(lock.take.remote(name)):
        time.sleep(0.5)
    ended = threading.Event()

    def ask_again() -> None:
        while not ended.wait(PATIENCE / 5):
            ray.get(lock.take.remote(name))

    asking = threading.Thread(target=ask_again, daemon=True)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()
        ray.get(lock.leave.remote(name))
