"""A worker of a training inside Ray Train."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint

from pipelines.runtime.task_worker import UNEXPECTED, error_to_plain
from pipelines.training.trainer import STATE
from pipelines.training.worker import work


class MetricsChannel:
    """Passes what the workers report to the driver. A Ray actor."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._failure: list[str] | None = None
        self._first: list[str] | None = None

    def put(self, event: dict[str, Any]) -> None:
        """Report something."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Return what was reported since the last call."""
        taken, self._events = self._events, []
        return taken

    def fail(self, error: list[str], final: bool) -> None:
        """Report an error as `error_to_plain` gives it; a `final` one only the user can mend, so there is no other try.

        Of others the first is kept: those of other workers come of it.
        """
        if final:
            self._failure = self._failure or error
        else:
            self._first = self._first or error

    def failure(self) -> list[str] | None:
        """Return the final failure."""
        return self._failure

    def first(self) -> list[str] | None:
        """Return the first failure that was not final."""
        return self._first


class RayContext:
    """A worker of Ray Train. A `pipelines.training.context.TrainContext`."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.size: int = context.get_world_size()

    def device(self) -> torch.device:
        device: torch.device = ray.train.torch.get_device()
        return device

    def checkpoint(self) -> bytes | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as directory:
            return (Path(directory) / STATE).read_bytes()

    def report(self, figures: dict[str, Any], state: bytes | None = None) -> None:
        if state is None:
            ray.train.report(figures)
            return
        with tempfile.TemporaryDirectory(prefix="unianom-checkpoint-") as folder:
            (Path(folder) / STATE).write_bytes(state)
            ray.train.report(figures, checkpoint=Checkpoint.from_directory(folder))

    def preempted(self) -> bool:
        return ray.train.get_preemption_info() is not None

    def group(self) -> str:
        group = ray.util.get_current_placement_group() if ray.is_initialized() else None
        return "" if group is None else group.id.hex()


def train_worker(given: dict[str, Any]) -> None:
    """Train in one worker of Ray Train, and report what fails."""
    events = given["events"]
    if ray.get(events.failure.remote()) is not None:
        return  # a restart would fail again
    try:
        work(given["job"], lambda event: events.put.remote(event), RayContext())
    except Exception as error:
        plain = error_to_plain(error)
        ray.get(events.fail.remote(plain, plain[0] != UNEXPECTED))
        raise
