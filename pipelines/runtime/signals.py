"""Signals that end a job in good order."""

from __future__ import annotations

import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from pipelines.runtime.exit_codes import FAILED

STOPS = {
    number: words
    for name, words in (
        ("SIGINT", "interrupted"),
        ("SIGTERM", "terminated"),
        ("SIGHUP", "hung up (its terminal was closed)"),
    )
    if (number := getattr(signal, name, None)) is not None  # Windows has no SIGHUP
}
"""Signals that end a job in good order, and what it then says."""


TASK_THREADS = "unianom-task"
"""Beginning of the names of threads that do tasks."""


class StopSignals:
    """Makes every signal of `STOPS` end the job as Ctrl-C does: by a KeyboardInterrupt in the main thread.

    One that is ignored from the start, as under nohup, stays so.

    Attributes:
        received: the first that came; None if none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._leaving = False
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._stop)
            if WAKE:
                _signal_watch()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        _handled.set()
        if self._leaving:
            os._exit(FAILED)  # asked twice: what Ray started on this machine ends by itself
        self.received = self.received or number
        raise KeyboardInterrupt

    def leave(self) -> NoReturn:
        """Say so, end what was started, and exit."""
        self._leaving = True
        words = STOPS[signal.SIGINT if self.received is None else self.received]
        print(f"error: {words}; the same command continues", file=sys.stderr, flush=True)
        if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
            # a thread that asks Ray for something would else start another one
            os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
            threading.excepthook = lambda _: None
            ray.shutdown()
        if any(thread.name.startswith(TASK_THREADS) for thread in threading.enumerate()):
            # an exit would wait for tasks in the middle of their work, which are whole or not at all anyway
            sys.stdout.flush()
            os._exit(FAILED)
        sys.exit(FAILED)


_handled = threading.Event()
"""Set when a handler of `StopSignals` ran."""


WAKE: int = getattr(signal, "SIGURG", 0)
"""Signal that only wakes the main thread, and that nothing else sends; 0 on Windows, which has none."""

WAKES = 10


@functools.cache
def _signal_watch() -> socket.socket:
    """Start a thread that wakes the main thread, once a second, where the handler of a signal in `STOPS` does not run.

    Python runs handlers in the main thread, between two of its instructions. A signal that another thread received, or
    that came just before the main thread began to wait for a lock, does not end that wait.

    Returns:
        What Python writes the numbers of signals to; it stays open as long as this process.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(WAKE, lambda number, frame: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not this process's

    def watch() -> None:
        while True:
            number = reader.recv(1)[0]
            if not isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignals):
                continue
            for _ in range(WAKES):
                if _handled.wait(1):
                    break
                signal.pthread_kill(threading.main_thread().ident or 0, WAKE)
            _handled.clear()

    threading.Thread(target=watch, daemon=True, name="unianom-signals").start()
    return writer


@contextmanager
def own_signals() -> Iterator[None]:
    """Keep this process's handlers of the signals in `STOPS` while a library runs that would put its own in their
    place: Ray's, as it starts, ends the process by an abort; Ray Train's lets it end as if all were done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = {number: signal.getsignal(number) for number in STOPS}
    setting = signal.signal

    def set_others(number: int, handler: Any) -> Any:
        return held[number] if number in held else setting(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = setting
        for number, handler in held.items():
            if handler is not None:  # None is a handler that was not set from Python
                signal.signal(number, handler)  # native code replaces it unseen
