"""Rate and time left of a job."""

from __future__ import annotations

import sys
import time
import weakref
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

SECONDS_BETWEEN_LINES = 10

_bars = Bars(
    TextColumn("{task.description}: {task.completed}/{task.total} {task.fields[unit]}", markup=False),
    BarColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[words]}", markup=False),
    console=Console(stderr=True, highlight=False, markup=False, emoji=False),
    transient=True,
)
"""The bars of all that is going on in this process, shown together."""


class Progress:
    """Rate and time left: a live bar on a terminal, a line every ten seconds in logs, and a last line in both.

    Args:
        label: what is going on.
        total: how many there are.
        unit: of what, in the plural.
    """

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._words = 0, ""
        self._start = time.monotonic()
        self._first: tuple[float, int] = (0.0, 0)
        self._last = 0.0
        self._terminal = sys.stderr.isatty()
        self._task = _bars.add_task(label, total=total, unit=unit, words="")
        self._remove = weakref.finalize(self, _remove, self._task)  # also where an error ends the job
        if self._terminal:
            _bars.start()

    def advance(self, count: int) -> None:
        """Count so many more as done."""
        self._done += count
        _bars.update(self._task, completed=self._done, words=self._words)
        now = time.monotonic()
        if not self._last:
            # what came before the first result was starting, and says nothing of the rate
            self._first, self._last = (now, self._done), now
        elif not self._terminal and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            rate = (self._done - self._first[1]) / max(now - self._first[0], 1e-9)
            left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
            self._print(f"{rate:.1f}/s{left}")

    def set(self, done: int, words: str = "") -> None:
        """Count so many as done in all; `words` follow the rate."""
        self._words = words
        self.advance(done - self._done)

    def note(self, words: str) -> None:
        """Print a line of its own."""
        print(f"{self._label}: {words}", file=sys.stderr, flush=True)

    def close(self) -> float:
        """Print the last line; return units per second, start-up included."""
        self._remove()
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-9)
        self._print(f"{rate:.1f}/s, {seconds:.0f} s")
        return rate

    def _print(self, tail: str) -> None:
        line = f"{self._label}: {self._done}/{self._total} {self._unit}, {tail}{self._words and f'; {self._words}'}"
        print(line, file=sys.stderr, flush=True)


def _remove(task: TaskID) -> None:
    """Take a bar away, and with the last one the display."""
    with suppress(KeyError):
        _bars.remove_task(task)
    if not _bars.tasks and _bars.live.is_started:
        _bars.stop()
