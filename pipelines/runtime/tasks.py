"""Tasks of a job, spread over workers: threads of this process where the work is small, else actors on Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.stage_times import StageTimes
from pipelines.runtime.stages import Stages, run_staged
from pipelines.runtime.task_worker import ERROR, error_from_plain

SMALL = 1000
"""Images up to which a job runs in its own process where no cluster is given: the start of a Ray and of its workers
costs more than such a job."""


def runs_here(options: RuntimeOptions, images: int) -> bool:
    """Return whether work on so many images runs in this process rather than on Ray."""
    if options.local is not None:
        return options.local
    ray = sys.modules.get("ray")  # never imported to answer this
    joined = bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())
    return not joined and images <= SMALL


def has_separate_stages(options: RuntimeOptions, images: int) -> bool:
    """Return whether a network that runs over so many images has others read and write for it; see `run_staged`."""
    if options.stages == "auto":
        return bool(options.gpus_per_worker) and not runs_here(options, images)
    return options.stages == "separate"


def run_tasks(
    worker: type, arguments: dict[str, Any], tasks: Sequence[dict[str, Any]], options: RuntimeOptions, images: int
) -> Iterator[dict[str, Any]]:
    """Spread tasks over workers; give results as they come, in any order.

    A task whose worker dies is run again, so `worker.run` must be idempotent: its output appears whole, under a name
    that depends on the task alone.

    Args:
        worker: a `PartTask` class.
        arguments: of its constructor.
        tasks: plain data, one dict a task. A sequence may make each when it is asked for it, also by several threads at
            once: in this process only those are held that are being run. Ray holds all of them in its object store.
        options: number of workers, and where they run.
        images: how many the tasks are about, by which it is chosen where they run.

    Raises:
        UnianomError: what a worker raised for the user, as it raised it.
        MachineError: no Ray can be had, or it lost what it cannot restore.
        WorkerError: what a worker raised else.
    """
    if not tasks:
        return
    if runs_here(options, images):
        from pipelines.runtime.threads import run_on_threads

        results = run_on_threads(worker, arguments, tasks, options, images)
    else:
        from pipelines.runtime.actors import run_on_ray

        results = run_on_ray(worker, arguments, tasks, options)
    for result in results:
        if ERROR in result:
            raise error_from_plain(result[ERROR])
        yield result


def run_unfinished(
    worker: type,
    arguments: dict[str, Any],
    tasks: Mapping[str, dict[str, Any]],
    output: str,
    options: RuntimeOptions,
    progress: Progress,
    images: int,
    count: str | None = None,
    stages: Callable[[], Stages] | None = None,
) -> tuple[dict[str, dict[str, Any]], float]:
    """Run those tasks whose record is not in an output folder yet.

    Args:
        worker, arguments, options, images: see `run_tasks`.
        tasks: by the name under which each is committed with `outputs.commit_part`.
        output: that folder.
        progress: shown; closed at the end.
        count: entry of a record that it advances by; null counts tasks.
        stages: makes what does the tasks in place of `worker` where stages are separate; what they took is told then.

    Returns:
        The records of all tasks by name, in the order of `tasks`, and the rate of this run.

    Raises:
        UnianomError: see `run_tasks`.
    """
    records = outputs.part_records(output, tasks)
    progress.advance(sum(record[count] for record in records.values()) if count else len(records))
    left = {name: task for name, task in tasks.items() if name not in records}
    separate = stages is not None and has_separate_stages(options, images)
    results = (
        run_staged(stages(), list(left.values()), options)
        if stages is not None and separate
        else run_tasks(worker, arguments, list(left.values()), options, images)
    )
    taken, computed = StageTimes(), 0
    for result in results:
        size = result[count] if count else 1
        progress.advance(size)
        if separate:
            taken.add(result)
            computed += size
    rate = progress.close()
    if computed:
        progress.note(taken.sentence(computed))
    records |= outputs.part_records(output, left)
    return {name: records.get(name, {}) for name in tasks}, rate
