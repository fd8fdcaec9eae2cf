"""Tasks in three stages as a pipeline of Ray Data."""

from __future__ import annotations

import json
import logging
import math
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle

from pipelines.runtime.actors import DEATHS, connect, grows, iter_results
from pipelines.runtime.device_turn import Device
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_steps import StageMaker, compute_step, read_step, write_step
from pipelines.runtime.stages import Stages
from unianom.errors import OptionError

CALLS = 2
"""Tasks that a process that computes has in hand: one has its turn, the other is fetched or handed on."""

AHEAD = 2
"""Tasks more that are on their way to such a process."""


class _Compute:
    """What Ray Data runs in an actor: blocks that were read to blocks that are to be written."""

    def __init__(self, pickled: bytes, threads: int) -> None:
        # the stage is not made here: what fails in an actor's constructor reaches the driver as the actor's death
        self._stage, self._device = StageMaker(pickled, threads), Device()
        threading.Thread(target=self._stage.begin, daemon=True).start()  # while the first images are read

    def __call__(self, table: pa.Table) -> pa.Table:
        return compute_step(self._stage, self._device, table)


class _Step:
    """What Ray Data runs in tasks that any free process takes: stages are kept there for the next task.

    Args:
        pickled: what makes the stage.
        name: of this stage in this run, by which it is kept.
    """

    def __init__(self, pickled: bytes, name: tuple[str, str]) -> None:
        self._pickled, self._name = pickled, name

    def stage(self) -> StageMaker:
        """Return this process's maker of the stage."""
        if self._name not in _KEPT:
            run = self._name[0]
            for other in [name for name in _KEPT if name[0] != run]:
                del _KEPT[other]
            _KEPT[self._name] = StageMaker(self._pickled, threads=1)
        return _KEPT[self._name]


_KEPT: dict[tuple[str, str], StageMaker] = {}
"""Stages of the present run in a process that does tasks of Ray Data."""


class _Read(_Step):
    def run(self, table: pa.Table) -> pa.Table:
        return read_step(self.stage(), json.loads(table["item"][0].as_py()))


class _Write(_Step):
    def run(self, table: pa.Table) -> pa.Table:
        return pa.table({"result": [json.dumps(write_step(self.stage(), table))]})


def pool_size(options: RuntimeOptions, tasks: int, compute_cpus: float) -> int:
    """Return how many actors compute; needs a connected Ray.

    Raises:
        OptionError: the cluster cannot hold a single one beside a process that reads.
    """
    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    fit = []
    if compute_cpus:
        fit.append(math.floor((cpus - 1) / compute_cpus))
    if options.gpus_per_worker:
        fit.append(math.floor(gpus / options.gpus_per_worker))
    if grows():
        return min(options.workers or max([1, *fit]), tasks)
    if cpus < 1 or min(fit, default=1) < 1:
        raise OptionError(
            f"stages need a CPU that reads and writes and, for a worker that computes, {compute_cpus:g} more and "
            f"{options.gpus_per_worker:g} GPUs; this Ray has {cpus:g} CPUs and {gpus:g} GPUs"
        )
    most = min(fit, default=options.workers or 1)  # what takes neither CPU nor GPU is one, unless told otherwise
    return min(most, options.workers or most, tasks)


def run_on_ray(
    stages: Stages,
    tasks: Sequence[dict[str, Any]],
    options: RuntimeOptions,
    compute_cpus: float | None,
    held_bytes: int | None,
) -> Iterator[dict[str, Any]]:
    """Run tasks as `pipelines.runtime.stages.run_staged` does; arguments are the same."""
    connect(options)
    if compute_cpus is None:
        compute_cpus = 0 if options.gpus_per_worker else options.cpus_per_worker
    size = pool_size(options, len(tasks), compute_cpus)
    yield from iter_results(pipeline(stages, tasks, options, compute_cpus, size, held_bytes))


def pipeline(
    stages: Stages,
    tasks: Sequence[dict[str, Any]],
    options: RuntimeOptions,
    compute_cpus: float,
    size: int,
    held_bytes: int | None,
) -> ray.data.Dataset:
    """Return results of tasks, as JSON, computed when they are asked for.

    Args:
        stages, tasks, options, compute_cpus, held_bytes: see `pipelines.runtime.stages.run_staged`.
        size: actors that compute.
    """
    import ray.data  # a second that jobs with nothing to do are spared

    run = uuid.uuid4().hex
    read, compute, write = (cloudpickle.dumps(make) for make in (stages.read, stages.compute, stages.write))
    # the one row of each block, as it is; where there are GPUs, Ray Data wants a number
    rows: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
    with ray.data.DataContext.current(_context(held_bytes)):
        return (
            ray.data.from_items([json.dumps(task) for task in tasks], override_num_blocks=len(tasks))
            # max_calls is the default; said here and not below, it keeps Ray Data from reading inside the actors
            .map_batches(_Read(read, (run, "read")).run, num_cpus=1, max_calls=0, **rows)
            .map_batches(
                _Compute,
                fn_constructor_kwargs={"pickled": compute, "threads": options.cpus_per_worker},
                compute=ray.data.ActorPoolStrategy(
                    size=size,
                    max_concurrent_calls_per_actor=CALLS,
                    max_tasks_in_flight_per_actor=CALLS + AHEAD,
                    enable_true_multi_threading=True,
                ),
                num_cpus=compute_cpus,
                num_gpus=options.gpus_per_worker or None,
                **rows,
            )
            .map_batches(_Write(write, (run, "write")).run, num_cpus=1, **rows)
        )


def _context(held_bytes: int | None) -> ray.data.DataContext:
    """Return how Ray Data is to run the stages, which concerns no other data set of this process."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = DEATHS
    context.memory_usage_poll_interval_s = None  # else every task's memory is looked at each second, which takes CPU
    context.target_max_block_size = None  # one block a task, whatever its size
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, and told in one sentence
    if held_bytes is not None:
        limits = ray.data.ExecutionResources.for_limits(object_store_memory=held_bytes)
        context.execution_options.resource_limits = limits
    return context
