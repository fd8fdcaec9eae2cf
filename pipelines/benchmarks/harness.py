"""Sides that take turns, and the ratios between them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from threadpoolctl import threadpool_limits

from pipelines.runtime.cli import console
from pipelines.runtime.task_worker import set_threads

OURS = "unianom"
"""Name of the side that is this project's."""


@dataclass(frozen=True)
class Timing:
    """What a side did when it was its turn.

    Attributes:
        amount: units of work.
        seconds: how long they took.
        result: what came of them.
    """

    amount: float
    seconds: float
    result: Any = None

    @property
    def rate(self) -> float:
        """Units of work per second."""
        return self.amount / self.seconds


Side = Callable[[], Timing]


def clocked(amount: float, work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Side:
    """Return a side that does so many units of work in one call."""

    def timing() -> Timing:
        start = clock()
        result = work()
        return Timing(amount, clock() - start, result)

    return timing


@dataclass(frozen=True)
class Measured:
    """What `interleave` saw.

    Attributes:
        turns: of each side by its name, one for each round.
        loads: 1-minute load average at the start of each round, what others run included.
    """

    turns: dict[str, list[Timing]]
    loads: list[float]

    def result(self, side: str) -> Any:
        """Return what came of a side's last turn."""
        return self.turns[side][-1].result

    def ratio(self, side: str, other: str, times: float = 1) -> dict[str, Any]:
        """Return the rate of `side` ÷ (`times` × rate of `other`), round by round."""
        pairs = zip(self.turns[side], self.turns[other], strict=True)
        rounds = [timing.rate / (times * against.rate) for timing, against in pairs]
        return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}

    def summary(self) -> dict[str, Any]:
        """Return seconds and rates of each side as plain data."""
        return {
            name: {
                "amount": turns[0].amount,
                "seconds": [timing.seconds for timing in turns],
                "seconds_min": min(timing.seconds for timing in turns),
                "seconds_median": statistics.median(timing.seconds for timing in turns),
                "rate_median": statistics.median(timing.rate for timing in turns),
            }
            for name, turns in self.turns.items()
        }


def interleave(sides: Mapping[str, Side], rounds: int, warm_up: bool = False) -> Measured:
    """Let each side have its turn, and all of them again, round after round.

    Args:
        sides: by name, in the order of their turns.
        rounds: how often.
        warm_up: one more round before these, which does not count.
    """
    if warm_up:
        for side in sides.values():
            side()
    measured = Measured({name: [] for name in sides}, [])
    for number in range(rounds):
        measured.loads.append(os.getloadavg()[0])
        for name, side in sides.items():
            timing = side()
            measured.turns[name].append(timing)
            console.print(f"round {number + 1}/{rounds}: {name}: {timing.seconds:.3f} s, {timing.rate:.5g}/s")
    return measured


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Let PyTorch, FAISS, OpenCV and every BLAS of this process use so many threads."""
    set_threads(threads)
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(threads)
    with threadpool_limits(threads):
        yield
