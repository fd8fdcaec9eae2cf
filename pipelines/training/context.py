"""The surroundings of one worker of a training: its place among the others, and where its checkpoints go."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from unianom import files


class TrainContext(Protocol):
    """What a worker asks of that which runs it.

    Attributes:
        rank: number of the worker; the first, 0, reports and writes.
        size: number of workers.
    """

    rank: int
    size: int

    def device(self) -> torch.device:
        """Return the GPU of this worker."""

    def checkpoint(self) -> bytes | None:
        """Return the last checkpoint; None if there is none."""

    def report(self, figures: dict[str, Any], state: bytes | None = None) -> None:
        """Report figures, and with a state a checkpoint, which the first worker gives; every worker must call this."""

    def preempted(self) -> bool:
        """Return whether this machine is about to be taken away."""

    def group(self) -> str:
        """Return the name under which the workers hold their CPUs and GPUs; empty if they hold none."""


class LocalContext:
    """The only worker of a training, in the job's own process. A `TrainContext`.

    Args:
        checkpoint: path or URI of the file that holds its last checkpoint; None keeps none.
    """

    rank, size = 0, 1

    def __init__(self, checkpoint: str | None = None) -> None:
        self._checkpoint = checkpoint

    def device(self) -> torch.device:
        return torch.device("cuda")

    def checkpoint(self) -> bytes | None:
        if self._checkpoint is None or not files.exists(self._checkpoint):
            return None
        return files.read_bytes(self._checkpoint)

    def report(self, figures: dict[str, Any], state: bytes | None = None) -> None:
        if state is not None and self._checkpoint is not None:
            files.write_bytes(self._checkpoint, state)  # whole or not at all

    def preempted(self) -> bool:
        return False

    def group(self) -> str:
        return ""
