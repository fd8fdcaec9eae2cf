"""Whose turn a device is, and how long it was busy and waited."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType


class Device:
    """A device that the threads of a process take turns on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.left: float | None = None  # when the last turn ended; read and written in a turn only


class Turn:
    """The turns of one task on a device: a context manager, inside which no other thread has one.

    Everything that keeps the device busy belongs inside, all else outside, so that another task can take its turn.

    Attributes:
        busy: seconds inside.
        waited: seconds that nobody was inside before these turns; before the first turn of all, none are counted.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._since = 0.0
        self.busy = self.waited = 0.0

    def __enter__(self) -> None:
        self._device.lock.acquire()
        self._since = time.monotonic()
        if self._device.left is not None:
            self.waited += self._since - self._device.left

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._device.left = time.monotonic()
        self.busy += self._device.left - self._since
        self._device.lock.release()


def for_task_and_batch(turn: Turn, device: str) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what a task enters for all of its batches, and what it enters for the forward pass of each.

    A GPU computes while its thread goes on: the task that has it hands it the next batch before it looks at the last
    one. Elsewhere a forward pass is done when it returns. So that another begins at once, tasks take turns, and each
    prepares its next batch and looks at the last one while another has the device.

    Args:
        turn: of the task.
        device: type of the device, as PyTorch names it.
    """
    return (turn, nullcontext()) if device == "cuda" else (nullcontext(), turn)
