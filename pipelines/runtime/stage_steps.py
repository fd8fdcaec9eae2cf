"""What each process of a staged job does with a block: the stage's own work, its times, and errors as plain data."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.runtime.device_turn import Device, Turn
from pipelines.runtime.stage_blocks import Block, block_from_arrow, block_to_arrow
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_times import BUSY, CPU, STAGE_TIMES, WAITED, WALL
from pipelines.runtime.stages import Stages
from pipelines.runtime.task_worker import ENDED, ERROR, STARTED, error_to_plain, set_threads

T = TypeVar("T")


class StageMaker:
    """Makes a stage when its first task comes, in the process that runs it; what fails is the error of that task.

    Args:
        pickled: what makes the stage; see `Stages`.
        threads: of PyTorch and FAISS, in each thread that runs the stage.
    """

    def __init__(self, pickled: bytes, threads: int) -> None:
        self._pickled, self._threads = pickled, threads
        self._lock, self._own = threading.Lock(), threading.local()
        self._stage: Any = None

    def begin(self) -> None:
        """Make the stage before its first task comes; what fails then is left to that task, which tries again."""
        with suppress(Exception):
            self()

    def __call__(self) -> Any:
        with self._lock:  # two tasks may come at once, and a model is loaded once
            make = None if self._stage is not None else pickle.loads(self._pickled)  # which imports what it needs
            if not hasattr(self._own, "ready"):
                set_threads(self._threads)  # FAISS has a number of its own in each thread
                self._own.ready = True
            if make is not None:
                self._stage = make()
        return self._stage


def read_step(stage: Callable[[], Any], task: dict[str, Any]) -> pa.Table:
    """Read a task; return its block for the next step."""
    about = {"task": task, STARTED: time.time(), STAGE_TIMES: {CPU: {}, WALL: {}, BUSY: 0.0, WAITED: 0.0}}
    return _next_block(about, lambda: _timed(about, "read", lambda clock: stage().read(task, clock)))


def compute_step(stage: Callable[[], Any], device: Device, table: pa.Table) -> pa.Table:
    """Compute on what `read_step` returned; return a block for the next step."""
    block, about = _received(table)
    if ERROR in about:
        return table
    turn = Turn(device)

    def compute() -> Block:
        found: Block = _timed(about, "compute", lambda clock: stage().compute(block, clock, turn))
        about[STAGE_TIMES] |= {BUSY: turn.busy, WAITED: turn.waited}
        return found

    return _next_block(about, compute)


def write_step(stage: Callable[[], Any], table: pa.Table) -> dict[str, Any]:
    """Write what `compute_step` returned; return the task's result."""
    block, about = _received(table)
    if ERROR in about:
        return {ERROR: about[ERROR]}
    try:
        task = about["task"]
        result = _timed(about, "write", lambda clock: stage().write(task, block, clock))
        return {**result, STAGE_TIMES: about[STAGE_TIMES], STARTED: about[STARTED], ENDED: time.time()}
    except Exception as error:
        return {ERROR: error_to_plain(error)}


class InOneProcess:
    """The three stages of a task one after the other. A `PartTask`.

    Args:
        stages: what is run.
    """

    def __init__(self, stages: Stages) -> None:
        self._read, self._compute, self._write = stages.read(), stages.compute(), stages.write()
        self._device = Device()

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do a task, and return what the last stage returns of it, with `STAGE_TIMES`."""
        about: dict[str, Any] = {STAGE_TIMES: {CPU: {}, WALL: {}}}
        turn = Turn(self._device)
        block = _timed(about, "read", lambda clock: self._read.read(task, clock))
        block = _timed(about, "compute", lambda clock: self._compute.compute(block, clock, turn))
        result = _timed(about, "write", lambda clock: self._write.write(task, block, clock))
        return {**result, STAGE_TIMES: {**about[STAGE_TIMES], BUSY: turn.busy, WAITED: turn.waited}}


def _timed(about: dict[str, Any], stage: str, work: Callable[[StageClock], T]) -> T:
    """Return what the work of a stage returns; add what it took to the times of its task."""
    clock, start = StageClock(), time.monotonic()
    result = work(clock)
    times = about[STAGE_TIMES]
    times[CPU][stage], times[WALL][stage] = clock.take(), time.monotonic() - start
    return result


def _next_block(about: dict[str, Any], work: Callable[[], Block]) -> pa.Table:
    """Return what a stage hands on: its block with what is known about the task, or the error of the task."""
    try:
        block = work()
        return block_to_arrow(Block(block.arrays, block.rows, {**about, "plain": block.plain}))
    except Exception as error:
        return block_to_arrow(Block(plain={ERROR: error_to_plain(error)}))


def _received(table: pa.Table) -> tuple[Block, dict[str, Any]]:
    """Return a stage's block, and what is known about its task."""
    block = block_from_arrow(table)
    about = block.plain
    return Block(block.arrays, block.rows, about.pop("plain", {})), about
