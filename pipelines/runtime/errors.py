"""The error meant for the user inside what Ray and others wrap around it."""

from __future__ import annotations

from collections.abc import Iterator

from unianom.errors import UnianomError, storage_error


class WorkerError(Exception):
    """What went wrong in a worker and is not an error for the user, told without what Ray wraps around it.

    Attributes:
        reason: class and message, as `reason` gives them.
        trace: the worker's traceback.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason, trace)
        self.reason, self.trace = reason, trace


def wrapped(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that it wraps, was caused by or came in the handling of, the nearest first."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(cause, BaseException):
            # Ray's wrapper may pretend to be of its cause's class, but its text is a remote traceback
            queue.append(cause)
        else:
            yield current
        queue += [current.__cause__, current.__context__]


def user_error(error: BaseException) -> UnianomError | None:
    """Return the error meant for the user inside what Ray and others wrapped around it."""
    for current in wrapped(error):
        if isinstance(current, UnianomError):
            return current
        if (known := storage_error(current)) is not None:
            return known
    return None


def worker_error(error: BaseException) -> WorkerError | None:
    """Return the error of a worker inside what was wrapped around it."""
    return next((current for current in wrapped(error) if isinstance(current, WorkerError)), None)


def reason(error: BaseException) -> str:
    """Return the class and message of an unexpected error, on one line, without what Ray wrapped around it."""
    if (worker := worker_error(error)) is not None:
        return worker.reason
    innermost = error
    while isinstance(cause := getattr(innermost, "cause", None), BaseException) and cause is not innermost:
        innermost = cause
    text = str(innermost)
    if "Traceback (most recent call last)" in text:  # of a remote traceback, the line that names the error
        text = [line for line in text.splitlines() if line.strip()][-1]
    words = " ".join(text.split())
    return f"{type(innermost).__name__}: {words[:LONGEST_REASON] or 'no message'}"


LONGEST_REASON = 500
"""Characters of a message that is not ours, such as a state dict's list of all its keys."""
