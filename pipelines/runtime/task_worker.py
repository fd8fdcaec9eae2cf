"""What does tasks, in a thread or an actor: made when it is needed, with results and errors as plain data."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from pipelines.runtime.errors import WorkerError, reason, user_error
from unianom.errors import DataError, EngineError, MachineError, ModelError, OptionError, UnianomError, WeightsError

STARTED, ENDED = "_started", "_ended"
"""Keys of a task's result: when its actor began and ended it, in seconds since 1970."""

ERROR = "_error"
"""Key of the result of a task that failed: class and message of an error for the user; of any other `UNEXPECTED`, its
reason and its traceback."""

UNEXPECTED = "_unexpected"

ERRORS: dict[str, type[UnianomError]] = {
    error.__name__: error for error in (DataError, EngineError, MachineError, ModelError, OptionError, WeightsError)
}


class PartTask(Protocol):
    """Does one task at a time; made once per actor."""

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do a task, commit its output, and return what came of it as plain data."""


class TaskWorker:
    """A `PartTask` that is made when its first task comes, with results and errors as plain data.

    Args:
        make: makes the `PartTask`.
        threads: of PyTorch and FAISS; see `set_threads`.
    """

    def __init__(self, make: Callable[[], PartTask], threads: int) -> None:
        self._make, self._threads = make, threads
        self._worker: PartTask | None = None

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return a task's result, or its error as a result: Ray Data replaces exceptions by its own on their way."""
        try:
            if self._worker is None:
                set_threads(self._threads)
                self._worker = self._make()
            start = time.time()
            return {**self._worker.run(task), STARTED: start, ENDED: time.time()}
        except Exception as error:
            return {ERROR: error_to_plain(error)}


def error_to_plain(error: Exception) -> list[str]:
    """Return an error as plain data, which no Ray replaces on its way; see `ERROR`."""
    known = user_error(error)
    if known is not None:
        return [type(known).__name__, str(known)]
    return [UNEXPECTED, reason(error), "".join(traceback.format_exception(error))]


def error_from_plain(plain: Sequence[str]) -> UnianomError | WorkerError:
    """Return the error that `error_to_plain` made plain, to be raised where the job runs."""
    name, message, *trace = plain
    return WorkerError(message, *trace) if name == UNEXPECTED else ERRORS.get(name, UnianomError)(message)


def set_threads(threads: int) -> None:
    """Set the threads of PyTorch and FAISS in this process; one that has not loaded PyTorch by now runs no network."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.set_num_threads(threads)
    try:
        import faiss

        faiss.omp_set_num_threads(threads)
    except ImportError:
        pass  # jobs that need FAISS say so themselves


@contextmanager
def torch_threads() -> Iterator[None]:
    """Give back, after a block that sets the threads of PyTorch and FAISS, those that there were before."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if before is not None:
            set_threads(before)
