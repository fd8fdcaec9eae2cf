"""Rate and time left of a job."""

from __future__ import annotations

import sys
import time


class Progress:
    """Rate and time left: a live line on a terminal, a line every ten seconds in logs.

    Args:
        label: what is going on.
        total: how many there are.
        unit: of what, in the plural.
    """

    def __init__(self, label: str, total: int, unit: str = "images") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._start, self._last = 0, time.monotonic(), 0.0
        self._words = ""
        self._first: tuple[float, int] | None = None
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if self._first is None:
            # what came before the first result was starting, and says nothing of the rate
            self._first, self._last = (now, self._done), now
        elif now - self._last >= (0.2 if self._terminal else 10):
            self._last = now
            self._print(end="\r" if self._terminal else "\n")

    def set(self, done: int, words: str = "") -> None:
        """So many are done in all; `words` follow the rate."""
        self._words = words and f"; {words}"
        self.advance(done - self._done)

    def note(self, words: str) -> None:
        """A line of its own."""
        print(f"{self._label}: {words}", file=sys.stderr, flush=True)

    def close(self) -> float:
        """Print the last line; returns units per second, start-up included."""
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-9)
        self._show(f"{rate:.1f}/s, {seconds:.0f} s", "\n")
        return rate

    def _print(self, end: str) -> None:
        assert self._first is not None
        rate = (self._done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        self._show(f"{rate:.1f}/s{left}", end)

    def _show(self, tail: str, end: str) -> None:
        line = f"{self._label}: {self._done}/{self._total} {self._unit}, {tail}{self._words}"
        print(f"{line:<78}" if self._terminal else line, end=end, file=sys.stderr, flush=True)
