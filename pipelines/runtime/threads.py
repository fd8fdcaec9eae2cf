"""Small jobs: tasks on threads of this process, with the bytes that actors on Ray would write."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.signals import TASK_THREADS
from pipelines.runtime.task_worker import ERROR, TaskWorker, torch_threads

IMAGES_PER_THREAD = 32
"""Fewer do not repay another thread, which makes a worker and loads a model of its own."""


def run_on_threads(
    worker: type, arguments: dict[str, Any], tasks: Sequence[dict[str, Any]], options: RuntimeOptions, images: int
) -> Iterator[dict[str, Any]]:
    """Run tasks as `pipelines.runtime.tasks.run_tasks` does, in this process; arguments are the same.

    Each thread has a worker of its own. Decoding, networks and searches run beside each other, since they let go of
    Python's lock. After a task that failed no other one is begun.
    """
    packed = pickle.dumps(arguments)  # workers share nothing, as in processes of their own
    own = threading.local()

    def run(number: int) -> dict[str, Any]:
        if not hasattr(own, "worker"):
            own.worker = TaskWorker(partial(worker, **pickle.loads(packed)), options.cpus_per_worker)
        result: dict[str, Any] = json.loads(json.dumps(own.worker.run(tasks[number])))
        return result

    pool = ThreadPoolExecutor(thread_count(options, len(tasks), images), thread_name_prefix=TASK_THREADS)
    with torch_threads():
        try:
            for future in as_completed([pool.submit(run, number) for number in range(len(tasks))]):
                result = future.result()
                if ERROR in result:  # the caller gives up its claim of the output, where nobody may write then
                    pool.shutdown(wait=True, cancel_futures=True)
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def thread_count(options: RuntimeOptions, tasks: int, images: int) -> int:
    """Return how many threads to run so many tasks about so many images on."""
    if options.gpus_per_worker:
        return 1  # keeps the GPU busy; and what is computed in full float32 is a setting of the process
    if options.workers is not None:
        return min(options.workers, tasks)
    cpus = (options.local_cpus or os.cpu_count() or 1) // options.cpus_per_worker
    return max(1, min(cpus, tasks, images // IMAGES_PER_THREAD))
