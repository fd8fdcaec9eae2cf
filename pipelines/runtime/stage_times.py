"""What the stages of a job took, and which of them it waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

STAGE_TIMES = "_times"
"""Key of a task's result, in seconds: `CPU` of each stage (read, compute, write) and part of it, as its StageClock has
them; `WALL` of each stage; how long the device was `BUSY` with the task, and `WAITED` before it."""

CPU, WALL, BUSY, WAITED = "cpu", "wall", "busy", "waited"

SATURATED = 0.9
"""Share of the time from which on a device that is busy is what a job waits for."""

COMPUTING = 0.5
"""CPU time ÷ time below which a stage waits for something else than CPUs."""

WORDS = {"read": ("reading", "where the images lie"), "write": ("writing", "where results are written to")}


class StageTimes:
    """Adds up what the stages of tasks took.

    Attributes:
        cpu: CPU seconds by stage and part of its work, in the order in which they first came.
        wall: seconds that processes spent in each stage; more than passed, where several ran side by side.
        busy: seconds that devices were busy.
        waited: seconds that devices waited between two tasks.
    """

    def __init__(self) -> None:
        self.cpu: Counter[tuple[str, str]] = Counter()
        self.wall: Counter[str] = Counter()
        self.busy = self.waited = 0.0

    def add(self, result: dict[str, Any]) -> None:
        """Add the times of a task's result."""
        times = result[STAGE_TIMES]
        self.cpu.update(
            {(stage, part): seconds for stage, parts in times[CPU].items() for part, seconds in parts.items()}
        )
        self.wall.update(times[WALL])
        self.busy += times[BUSY]
        self.waited += times[WAITED]

    @property
    def busy_share(self) -> float:
        """Share of the time that devices were busy."""
        return self.busy / (self.busy + self.waited) if self.busy else 0.0

    def sentence(self, images: int) -> str:
        """Return what the parts of the work took for each of so many images, and what the job waited for."""
        parts: Counter[str] = Counter()
        for (_, part), seconds in self.cpu.items():
            parts[part] += seconds
        return f"{_each(parts, images)}; the device was busy {self.busy_share:.0%} of the time: {self._bottleneck()}"

    def _bottleneck(self) -> str:
        if self.busy_share >= SATURATED:
            return "it is the bottleneck"
        slowest = max(WORDS, key=lambda stage: self.wall[stage])
        name, store = WORDS[slowest]
        own = {part: seconds for (stage, part), seconds in self.cpu.items() if stage == slowest}
        if not own or sum(own.values()) < COMPUTING * self.wall[slowest]:
            return f"it waited for {name}, and that for {store}"
        return f"it waited for {name}, of which {max(own, key=own.__getitem__)} takes most; more CPUs help"


def fused_sentence(seconds: Mapping[str, float], images: int) -> str:
    """Return what each part of the work of fused stages took for each of so many images, and which took most.

    Args:
        seconds: CPU seconds by part, in the order in which images pass through.
        images: how many.
    """
    if not seconds:
        return ""
    most = max(seconds, key=seconds.__getitem__)
    return f"{_each(seconds, images)}; {most} takes {seconds[most] / (sum(seconds.values()) or 1):.0%} of that"


def _each(seconds: Mapping[str, float], images: int) -> str:
    told = ", ".join(f"{part} {1000 * spent / max(images, 1):.2g}" for part, spent in seconds.items())
    return f"{told} CPU ms an image"
