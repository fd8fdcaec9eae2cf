"""What each part of a scoring takes: the stages of jobs/score.py, one after the other on one core, with clocks.

read, decode, resize ─▶ copy, forward, search, map, other ─▶ encode maps, write
    CPU time              CPU time, or time of the GPU            CPU time

Of reading and writing "read" and "write" are what is left of the stage's CPU time, so that the parts add up to the
whole. Of computing, each part is its own time without that of parts inside it, and "other" what is left: calls,
calibration, decisions. On a GPU the host waits at both ends of a part, so that its time is that of the GPU; a second
pass without clocks tells the rate.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch

from pipelines.benchmarks.harness import Timing
from pipelines.inference.range_predictor import RangePredictor
from pipelines.inference.range_writer import readable
from pipelines.inference.staged_scorer import scoring_stages
from pipelines.runtime.device_turn import Device, Turn
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from unianom.data.device_feed import DeviceFeed, Fetched
from unianom.data.maps import MapsKept
from unianom.data.row_ranges import RowRange
from unianom.errors import DataError
from unianom.model import Model
from unianom.options import to_plain
from unianom.thresholds import FAIL, PASS

T = TypeVar("T")

FUNCTIONS = {
    "forward": ("forward", "embed"),
    "search": ("search_bank", "score_patches"),
    "map": ("anomaly_maps", "image_scores"),
}
"""Functions of a method that are clocked as each part; a method has those that it needs."""


class PartClock:
    """Adds up what each part of the work takes, without what parts inside it take.

    Args:
        now: gives seconds; on a GPU it waits for it first.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._inside: list[float] = []  # of each part that has begun, what parts inside it took
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @classmethod
    def of(cls, device: torch.device) -> PartClock:
        """Return a clock of the time of a GPU, or of the CPU time of all threads."""
        if device.type == "cpu":
            return cls(time.process_time)

        def waited() -> float:
            torch.accelerator.synchronize(device)
            return time.perf_counter()

        return cls(waited)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count a block."""
        start = self._now()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = self._now() - start
            self.seconds[name] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took

    def iterate(self, name: str, items: Iterator[T]) -> Iterator[T]:
        """Yield items, and count what it takes to get each."""
        while True:
            with self.part(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are counted."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call


class MeasuredFeed(DeviceFeed):
    """A `DeviceFeed` whose copies are counted as "copy"."""

    def __init__(self, clock: PartClock, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._clock = clock

    def batches(self, images: np.ndarray, sizes: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        with self._clock.part("copy"):
            batches = super().batches(images, sizes)
        return self._clock.iterate("copy", batches)

    def fetch(self, values: torch.Tensor) -> Fetched:
        with self._clock.part("copy"):
            return super().fetch(values)


class SharePredictor(RangePredictor):
    """A `RangePredictor` that flags a given share of the images, whatever their scores.

    Args:
        flagged: share of the images.
        arguments: of `RangePredictor`.
    """

    def __init__(self, flagged: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._flagged, self._decided = flagged, 0

    def _of(self, folder: str) -> tuple[Model, DeviceFeed]:
        new = folder not in self._models
        model, feed = super()._of(folder)
        if new:
            model.decide_each = self._decide  # type: ignore[method-assign, assignment]
        return model, feed

    def _decide(self, scores: np.ndarray, *_: Any) -> np.ndarray:
        """Flag an image each time that another one is due; (n,) objects."""
        numbers = self._decided + np.arange(len(scores) + 1)
        self._decided += len(scores)
        return np.where(np.diff(np.floor(numbers * self._flagged + 0.5)) > 0, FAIL, PASS).astype(object)


class MeasuredPredictor(SharePredictor):
    """A `SharePredictor` whose parts are counted."""

    def __init__(self, clock: PartClock, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._clock = clock

    def _of(self, folder: str) -> tuple[Model, DeviceFeed]:
        new = folder not in self._models
        model, feed = super()._of(folder)
        if new:
            method: Any = model.method
            for part, names in FUNCTIONS.items():
                for name in names:
                    if hasattr(method, name):
                        setattr(method, name, self._clock.clocked(part, getattr(method, name)))
            feed = MeasuredFeed(self._clock, method.device, method.input, self._batch_size)
            self._models[folder] = model, feed
        return model, feed

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        with self._clock.part("other"):
            return super().compute(block, clock, turn)


@dataclass(frozen=True)
class Pass:
    """What some images took.

    Attributes:
        seconds: by part of the work, see `sizing_figures.PARTS`.
        busy: seconds that the device computed, without clocks; None where that was not measured.
        written: bytes of scores and maps.
    """

    seconds: Mapping[str, float]
    busy: float | None = None
    written: int = 0


class MeasuredStages:
    """The stages of a scoring, ready to be measured.

    Args:
        arguments: of `RangeScorer`, without "output" and "maps".
        models: contents of `model.json`, in the order of the model set's folders.
        whole: ranges of rows that are read.
        ranges: those that are computed on; the same, or cut to fewer rows.
        flagged: share of the images that are flagged.

    Raises:
        DataError: none of the images can be read.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        models: Sequence[Mapping[str, Any]],
        whole: Sequence[RowRange],
        ranges: Sequence[RowRange],
        flagged: float,
    ) -> None:
        self._arguments, self._models, self._flagged = arguments, models, flagged
        self._device = torch.device(arguments["execution"].device)
        self._reader = scoring_stages({**arguments, "output": "", "maps": "none"}, models).read()
        self._predictors: dict[MapsKept, list[RangePredictor]] = {}
        self._clock = PartClock.of(self._device)
        self._read_tasks = [to_plain(within) for within in whole]
        self._tasks = [to_plain(within) for within in ranges]
        self._blocks = [self._reader.read(task, StageClock()) for task in self._tasks]
        runs = [run for block in self._blocks for run in block.plain["runs"]]
        self.images = sum(run["rows"] for run in runs)
        self.unread = [error for run in runs for error in run["errors"]]
        if not sum(len(readable(run)) for run in runs):
            raise DataError(f"none of {self.images} images can be read; the first one: {self.unread[0][2]}")

    def read(self) -> Timing:
        """Read, decode and resize all images; the result is a `Pass`."""
        seconds: defaultdict[str, float] = defaultdict(float)
        start = time.perf_counter()
        images = 0
        for task in self._read_tasks:
            clock, began = StageClock(), time.process_time()
            block = self._reader.read(task, clock)
            _count(seconds, "read", time.process_time() - began, clock, ("decode", "resize"))
            images += sum(run["rows"] for run in block.plain["runs"])
        return Timing(images, time.perf_counter() - start, Pass(seconds))

    def compute_and_write(self, maps: MapsKept, folder: str) -> Timing:
        """Compute on all images and write their scores, in a folder of their own; the result is a `Pass`."""
        if maps not in self._predictors:
            self._predictors[maps] = self._make(maps)
        measured, *plain = self._predictors[maps]
        busy = Device()
        turns = [Turn(busy) for _ in self._tasks]
        with TemporaryDirectory(dir=folder) as output:
            writer = scoring_stages({**self._arguments, "output": output, "maps": maps}, self._models).write()
            seconds: defaultdict[str, float] = defaultdict(float)
            self._clock.seconds.clear()
            start = time.perf_counter()
            for task, block, turn in zip(self._tasks, self._blocks, turns, strict=True):
                scored = measured.compute(block, StageClock(), Turn(Device()))
                for predictor in plain:
                    predictor.compute(block, StageClock(), turn)
                clock, began = StageClock(), time.process_time()
                writer.write(task, scored, clock)
                _count(seconds, "write", time.process_time() - began, clock, ("encode maps",))
            took = time.perf_counter() - start
            written = sum(file.stat().st_size for file in Path(output).iterdir())
        seconds |= self._clock.seconds
        return Timing(self.images, took, Pass(seconds, sum(turn.busy for turn in turns) if plain else None, written))

    def _make(self, maps: MapsKept) -> list[RangePredictor]:
        """Return the predictor that is clocked and, on a GPU, one that is not."""
        given: dict[str, Any] = {name: self._arguments[name] for name in ("execution", "batch_size", "fold")}
        given |= {"maps": maps, "flagged": self._flagged}
        made: list[RangePredictor] = [MeasuredPredictor(self._clock, **given)]
        return made if self._device.type == "cpu" else [*made, SharePredictor(**given)]


def _count(seconds: defaultdict[str, float], rest: str, whole: float, clock: StageClock, parts: Sequence[str]) -> None:
    """Add what a stage took, by part; what is left is of the part `rest`."""
    taken = clock.take()
    for part in parts:
        if part in taken:
            seconds[part] += taken[part]
    seconds[rest] += whole - sum(taken.get(part, 0.0) for part in parts)
