"""Ray: connecting, and tasks spread over actors."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.runtime.errors import reason, user_error, wrapped
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.signals import own_signals
from pipelines.runtime.task_worker import TaskWorker
from unianom.errors import MachineError, OptionError


def pool_size(options: RuntimeOptions, tasks: int, least: int = 1) -> int:
    """Return how many actors to start for so many tasks; needs a connected Ray.

    Args:
        options: of the job.
        tasks: no more actors than these.
        least: actors at least, where the cluster grows for them.

    Raises:
        OptionError: the cluster cannot hold a single one.
    """
    have = ray.cluster_resources()
    fit = int(have.get("CPU", 0)) // options.cpus_per_worker
    if options.gpus_per_worker:
        fit = min(fit, math.floor(have.get("GPU", 0) / options.gpus_per_worker))
    if grows():
        fit = max(fit, options.workers or least)
    if fit < 1:
        raise OptionError(
            f"a worker needs {options.cpus_per_worker} CPUs and {options.gpus_per_worker} GPUs; this Ray has "
            f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        )
    return max(1, min(options.workers or fit, fit, tasks))


def grows() -> bool:
    """Return whether an autoscaler adds nodes when more is asked for than is there; needs a connected Ray.

    How far it may grow, only the autoscaler knows.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    stats = get_cluster_status(ray.get_runtime_context().gcs_address).stats
    # without a provider of nodes it looks on, and has no state of its own
    return int(stats.autoscaler_version or 0) > 0


def beside_driver(actor: type) -> Any:
    """Return a handle to an actor of this class that needs no CPU, on this process's own node.

    It would else be on any node, and lost with a node that the job can do without.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(actor)
    return remote.options(num_cpus=0, scheduling_strategy=here).remote()


def connect(options: RuntimeOptions, dashboard: bool = False) -> None:
    """Join the Ray that this process belongs to (a submitted job, RAY_ADDRESS), else start one here.

    Args:
        options: CPUs of one that is started.
        dashboard: whether one that is started answers questions about its state. Ray Train asks whether a run was
            killed, to give back what its workers held; without an answer it holds their CPUs for good.

    Raises:
        MachineError: the Ray named by RAY_ADDRESS does not answer or refuses the token, or none can be started here.
        OptionError: the job may not use Ray.
    """
    if ray.is_initialized():
        return
    if options.local:
        raise OptionError("this job needs Ray; leave out --runtime.local, and a Ray is started on this machine")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    # Ray's C++ part warns on stderr of every pool of restartable actors; what fails reaches Python as an exception
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    said: list[str] = []
    try:
        with own_signals(), _stderr_kept_back(said):
            if address:
                _knock(address)
                ray.init(**quiet)
            else:
                # a plain init() would join any Ray that happens to run on this machine
                cpus = options.local_cpus or os.cpu_count()
                ray.init(address="local", num_cpus=cpus, include_dashboard=dashboard, **quiet)
    except Exception as error:
        if (known := user_error(error)) is not None:
            raise known from error
        raise MachineError(_unconnected(error, address, "".join(said))) from error


def _knock(address: str) -> None:
    """Raise an OSError if nobody listens where an address of the form host:port says, for which Ray waits minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    end = time.monotonic() + KNOCKING
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCKING).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


KNOCKING = 10.0
"""Seconds that a Ray at RAY_ADDRESS has to begin to listen."""


def _unconnected(error: Exception, address: str | None, said: str) -> str:
    """Say why no Ray could be joined or started, and what to do; `said` is what its native code wrote to stderr, where
    alone a token that was refused shows."""
    refused = "Unauthenticated" in said or "AuthToken" in said
    if refused or any(isinstance(cause, ray.exceptions.AuthenticationError) for cause in wrapped(error)):
        return (
            f"the Ray at {address or 'this machine'} refuses this process's token; give the cluster's own by "
            f"RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
        )
    if address:
        return (
            f"no Ray can be joined at RAY_ADDRESS={address} ({reason(error)}); check that the cluster runs and is "
            f"reached from here, or unset RAY_ADDRESS to start one on this machine"
        )
    return f"no Ray can be started on this machine ({reason(error)}); free memory, space and processes, and try again"


@contextmanager
def _stderr_kept_back(said: list[str]) -> Iterator[None]:
    """Hold back what native code writes to stderr (Ray announces its own log level there); add it to `said` on
    failure."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            said.append(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


DEATHS = 3
"""Workers in a row that may be killed while they start, in whose place others are started; Ray Data allows none."""


class _Actor:
    """What Ray Data runs: a batch of one task, as JSON, to a batch of one result, as JSON."""

    def __init__(self, worker: type, arguments: dict[str, Any], threads: int) -> None:
        # the worker is not made here: what fails in an actor's constructor reaches the driver as the actor's death
        self._worker = TaskWorker(partial(worker, **arguments), threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return {"result": [json.dumps(self._worker.run(task)) for task in batch["item"]]}


class _Items(list[dict[str, Any]]):
    """What `ray.data.from_items` takes, a list of which it asks for one item after the other; each is made then.

    Args:
        tasks: see `pipelines.runtime.tasks.run_tasks`.
    """

    def __init__(self, tasks: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: Any) -> Any:
        return {"item": self._tasks[index]}


def run_on_ray(
    worker: type, arguments: dict[str, Any], tasks: Sequence[dict[str, Any]], options: RuntimeOptions
) -> Iterator[dict[str, Any]]:
    """Run tasks as `pipelines.runtime.tasks.run_tasks` does, on a pool of actors; arguments are the same."""
    connect(options)
    from ray.data import ActorPoolStrategy, DataContext  # a second that jobs with nothing to do are spared

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = DEATHS
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised, and told in one sentence
    size = pool_size(options, len(tasks))
    dataset = ray.data.from_items(_Items(tasks), override_num_blocks=len(tasks)).map_batches(
        _Actor,
        fn_constructor_kwargs={"worker": worker, "arguments": arguments, "threads": options.cpus_per_worker},
        batch_size=1,
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=options.cpus_per_worker,
        num_gpus=options.gpus_per_worker or None,
    )
    yield from iter_results(dataset)


def iter_results(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yield results, which a data set holds as JSON, as they come.

    Raises:
        MachineError: Ray lost what it cannot restore.
    """
    rows = iter(dataset.iter_rows())
    while True:
        try:
            row = next(rows, None)
        except ray.exceptions.RayError as error:
            raise lost_error(error) from error
        if row is None:
            return
        yield json.loads(row["result"])


def lost_error(error: BaseException) -> Exception:
    """Return what to raise for an error of Ray itself: a MachineError if it is about a machine, else the error."""
    for cause in wrapped(error):
        if isinstance(cause, ray.exceptions.OutOfDiskError):
            return MachineError(
                f"the disk is full where Ray keeps what does not fit in memory ({tempfile.gettempdir()}/ray unless it "
                f"was started with --temp-dir); free space there and run the same command again, it continues"
            )
        if isinstance(cause, ray.exceptions.OutOfMemoryError):
            return MachineError(
                "a machine ran out of memory and Ray ended a worker; lower --runtime.workers or the size of batches, "
                "and run the same command again, it continues"
            )
        if isinstance(cause, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
            return MachineError(f"a worker was lost ({reason(cause)}); the same command continues")
    return error if isinstance(error, Exception) else RuntimeError(str(error))
