"""Workers beside each other, each a process with one thread: how a machine's cores share the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from pipelines.benchmarks.harness import Timing
from pipelines.inference.range_scorer import RangeScorer
from pipelines.inference.staged_scorer import scoring_stages
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.task_worker import set_threads
from unianom import files
from unianom.data.row_ranges import RowRange
from unianom.options import to_plain


class Workers:
    """Processes that score the same images, each all of them; where a GPU computes, they read, decode and resize them.

    Args:
        arguments: of `RangeScorer`, without "output".
        models: contents of `model.json`, in the order of the model set's folders.
        ranges: rows that each works on.
        folder: for scores; local.
        most: processes at the same time.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        models: Sequence[Mapping[str, Any]],
        ranges: Sequence[RowRange],
        folder: str,
        most: int,
    ) -> None:
        tasks = [to_plain(within) for within in ranges]
        prepare = partial(_prepare, dict(arguments), list(models), tasks, folder)
        self._pool = ProcessPoolExecutor(most, mp_context=get_context("spawn"), initializer=prepare)
        self._most = most

    def __enter__(self) -> Workers:
        self.run(self._most)  # every process loads its model
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, count: int) -> Timing:
        """Let so many of them work at the same time.

        Returns:
            Images, the seconds from the first start to the last end, and as the result CPU seconds an image.
        """
        passes = [future.result() for future in [self._pool.submit(_work) for _ in range(count)]]
        images = sum(passed[2] for passed in passes)
        seconds = max(passed[1] for passed in passes) - min(passed[0] for passed in passes)
        return Timing(images, seconds, sum(passed[3] for passed in passes) / images)


_pass: Callable[[], int]
"""Works on all images once and returns their number, in a process of `Workers`."""


def _prepare(
    arguments: dict[str, Any], models: list[Mapping[str, Any]], tasks: list[dict[str, Any]], folder: str
) -> None:
    global _pass
    set_threads(1)
    output = files.join(folder, f"worker-{os.getpid()}")
    on_cpu = arguments["execution"].device == "cpu"
    worker: Any = RangeScorer(**arguments, output=output) if on_cpu else None
    reader = None if on_cpu else scoring_stages({**arguments, "output": output}, models).read()

    def work() -> int:
        if reader is None:
            return sum(worker.run(task)["rows"] for task in tasks)
        return sum(run["rows"] for task in tasks for run in reader.read(task, StageClock()).plain["runs"])

    _pass = work
    _pass()


def _work() -> tuple[float, float, int, float]:
    """Return when a pass began and ended, its images, and its CPU seconds."""
    start, cpu = time.time(), time.process_time()
    images = _pass()
    return start, time.time(), images, time.process_time() - cpu
