"""Tasks in three stages, each on the processes that suit it: CPUs read and write, devices compute.

read + decode + resize ─▶ compute ─▶ encode + write
  any CPU                 one actor      any CPU
  of the cluster          a device       of the cluster
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.runtime.device_turn import Turn
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.task_worker import ERROR, error_from_plain


class ReadStage(Protocol):
    """First stage of a task, on any CPU of the cluster."""

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        """Return what is to be computed on, such as decoded images."""


class ComputeStage(Protocol):
    """Second stage of a task, on the device of its process; alone holds what computes, such as a model."""

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        """Return what is to be written.

        Several threads are in here at a time. What keeps the device busy belongs inside `with turn:`, where there is
        one of them; what comes before and after, such as copying a block to pinned memory, outside.
        """


class WriteStage(Protocol):
    """Third stage of a task, on any CPU of the cluster."""

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        """Write what was computed, commit it, and return what came of it as plain data."""


@dataclass(frozen=True)
class Stages:
    """The three stages of a job's tasks.

    Each field makes a stage, in each process that runs it, when its first task comes: a class, or a `partial` of it
    with the arguments of its constructor. It is pickled on its way there, so it holds plain data.

    Attributes:
        read: makes a `ReadStage`.
        compute: makes a `ComputeStage`.
        write: makes a `WriteStage`.
    """

    read: Callable[[], ReadStage]
    compute: Callable[[], ComputeStage]
    write: Callable[[], WriteStage]


def run_staged(
    stages: Stages,
    tasks: Sequence[dict[str, Any]],
    options: RuntimeOptions,
    compute_cpus: float | None = None,
    held_bytes: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Run tasks in three stages of Ray Data; give results as they come, in any order.

    A block is held from one stage to the next in Ray's object store; where a stage falls behind, those before it stop.
    A stage whose process dies is run again for the task, and what it was given is made again if it was lost. So all
    must be idempotent: output appears whole, under a name that depends on the task alone.

    Args:
        stages: what is run.
        tasks: plain data, one dict a task.
        options: workers are processes that compute; cpus_per_worker are the threads of each, gpus_per_worker its GPUs.
            Reading and writing take a CPU each at a time, as many as there are.
        compute_cpus: CPUs that a process that computes keeps from reading and writing; null is none where it has a
            GPU, else cpus_per_worker.
        held_bytes: of blocks that are held between stages in the whole cluster, about; null is half of what Ray's
            object store holds.

    Returns:
        What `write` returned of each task; with `STAGE_TIMES` (see `stage_times`), STARTED and ENDED.

    Raises:
        UnianomError: what a stage raised for the user, as it raised it.
        MachineError: no Ray can be had, or it lost what it cannot restore.
        OptionError: the cluster cannot hold a process that computes beside one that reads.
        WorkerError: what a stage raised else.
    """
    if not tasks:
        return
    from pipelines.runtime.stage_pipeline import run_on_ray

    for result in run_on_ray(stages, tasks, options, compute_cpus, held_bytes):
        if ERROR in result:
            raise error_from_plain(result[ERROR])
        yield result
