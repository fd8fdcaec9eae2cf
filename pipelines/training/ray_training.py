"""Ray Train: a run started, followed and ended, with what its workers report shown and recorded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.runtime.actors import beside_driver, pool_size
from pipelines.runtime.errors import reason
from pipelines.runtime.run_record import Run
from pipelines.runtime.signals import own_signals
from pipelines.runtime.task_worker import error_from_plain
from pipelines.training.job import Job
from pipelines.training.options import TrainingOptions
from pipelines.training.ray_worker import MetricsChannel, train_worker
from pipelines.training.report import TrainingReport
from unianom.errors import DataError, OptionError


class WorkersLostError(DataError):
    """Workers died more often than they may, or never came; the job itself is not at fault."""


def run_job(
    job: Job, options: TrainingOptions, work: str, run: Run, prefix: str, callbacks: Sequence[Any] = ()
) -> None:
    """Run Ray Train from the start, or from the last checkpoint, to the end.

    Raises:
        UnianomError: what a worker raised for the user.
        WorkersLostError: workers died too often.
        OptionError: the cluster cannot hold the workers.
    """
    resources: dict[str, float] = {"CPU": options.runtime.cpus_per_worker}
    if options.runtime.gpus_per_worker:
        resources["GPU"] = options.runtime.gpus_per_worker
    check_resources(options)
    workers = options.workers
    events = beside_driver(MetricsChannel)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "events": events},
        scaling_config=ScalingConfig(
            num_workers=workers if options.min_workers is None else (options.min_workers, workers),  # type: ignore[arg-type]
            use_gpu=bool(options.runtime.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=work,
            failure_config=FailureConfig(max_failures=options.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[*callbacks],
        ),
    )
    report = _Listener(events, TrainingReport(job.iterations, run, prefix))
    try:
        with own_signals():
            trainer.fit()
    except KeyboardInterrupt:
        report.stop()
        raise
    except Exception as error:  # Ray wraps what a worker raised, in ways that differ by what else went wrong
        report.close()
        failure, first = ray.get([events.failure.remote(), events.first.remote()])
        if failure is not None:
            raise error_from_plain(failure) from error
        if first is not None:
            worker = error_from_plain(first)
            raise WorkersLostError(f"training failed: {reason(worker)}; the same command continues it") from worker
        raise WorkersLostError(f"training failed: {reason(error)}; the same command continues it") from error
    report.close()
    failure = ray.get(events.failure.remote())
    if failure is not None:
        raise error_from_plain(failure)


def check_resources(options: TrainingOptions) -> None:
    """Refuse workers that the cluster cannot hold, for which Ray Train would wait for ever."""
    need = options.min_workers or options.workers
    if pool_size(options.runtime, need) < need:
        raise OptionError(
            f"{need} workers of {options.runtime.cpus_per_worker} CPUs and {options.runtime.gpus_per_worker:g} GPUs "
            f"do not fit this Ray; lower --runtime.workers, or --min_workers"
        )


class _Listener:
    """Passes on what the workers report, while training runs."""

    def __init__(self, events: Any, report: TrainingReport) -> None:
        self._events, self._report = events, report
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.wait(1.0):
            self._pass_on()

    def _pass_on(self) -> None:
        for event in ray.get(self._events.take.remote()):
            self._report.put(event)

    def stop(self) -> None:
        """Ask the workers no more."""
        self._ended.set()
        self._thread.join()

    def close(self) -> None:
        """Pass on what was reported last."""
        self.stop()
        self._pass_on()
        self._report.close()
