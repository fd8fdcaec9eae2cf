"""Sides that take turns, and the ratios between them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from pipelines.runtime.actors import set_threads
from pipelines.runtime.cli import console, print_table
from unianom import files
from unianom.options import to_plain

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
    """A side that does so many units of work in one call."""

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
        """What came of a side's last turn."""
        return self.turns[side][-1].result

    def ratio(self, side: str, other: str, times: float = 1) -> dict[str, Any]:
        """Rate of `side` ÷ (`times` × rate of `other`), round by round."""
        pairs = zip(self.turns[side], self.turns[other], strict=True)
        rounds = [timing.rate / (times * against.rate) for timing, against in pairs]
        return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}

    def summary(self) -> dict[str, Any]:
        """Seconds and rates of each side as plain data."""
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
    """So many threads in PyTorch, FAISS, OpenCV and every BLAS of this process."""
    set_threads(threads)
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(threads)
    with threadpool_limits(threads):
        yield


def machine_facts() -> dict[str, Any]:
    """What the figures depend on: processor, cores, versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = ("unianom", "torch", "timm", "ray", "faiss-cpu", "faiss-gpu", "numpy", "pillow", "pyarrow")
    found = {name: found for name in (*packages, *PEERS) if (found := _version(name)) is not None}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PEERS = ("anomalib", "adeval")
"""Packages that some benchmarks compare with where they are installed."""


def _absent(peers: Sequence[str]) -> list[str]:
    """A note for each peer that cannot be compared with."""
    return [f"{name}: not installed; pip install {name}" for name in peers if find_spec(name) is None]


def _report(options: Any, unit: str, measured: Measured, ratios: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write everything as JSON to the benchmark's output and return it."""
    content = {
        "benchmark": type(options).__name__.removesuffix("Benchmark").lower(),
        "options": to_plain(options),
        "machine": machine_facts(),
        "unit": unit,
        "loads": measured.loads,
        "sides": measured.summary(),
        "ratios": ratios,
        "notes": [],
        **more,
    }
    files.write_json(options.output, content)
    return content


def print_report(content: dict[str, Any]) -> None:
    """Sides, ratios and what else a benchmark found, as tables."""
    unit = content["unit"]
    rows = [
        [name, f"{s['seconds_min']:.3f}", f"{s['seconds_median']:.3f}", f"{s['rate_median']:.5g}"]
        for name, s in content["sides"].items()
    ]
    print_table(f"{content['benchmark']}: turns", ["side", "min s", "median s", f"{unit}/s (median)"], rows)
    rows = [[name, *(f"{r[key]:.3f}" for key in ("median", "min", "max"))] for name, r in content["ratios"].items()]
    print_table("ratios, round by round", ["ratio", "median", "min", "max"], rows)
    for title, table in content.get("tables", {}).items():
        columns = list(dict.fromkeys(key for row in table.values() for key in row))
        rows = [[name, *(_cell(row.get(key)) for key in columns)] for name, row in table.items()]
        print_table(title, ["", *columns], rows)
    for note in content["notes"]:
        console.print(note)
    machine = content["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; load average {min(content['loads']):.2f} to "
        f"{max(content['loads']):.2f}; Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    )


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
