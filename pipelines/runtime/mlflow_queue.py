"""What is sent to a server of MLflow, in order, and kept in memory while the server is away."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipelines.runtime.mlflow_environment import ONE_RETRY, environment, is_refusal, reason

FIRST_PAUSE, LONGEST_PAUSE = 5.0, 300.0
"""Seconds between two attempts while a server is away; they double. An attempt holds the job up, so they grow long."""

PATIENCE = 60.0
"""Seconds that the end of a job waits for a server that is away."""


def until_answered(send: Callable[[], Any], patience: float) -> Any:
    """Send a request until it is answered or refused, for so many seconds; return what it returns.

    Raises:
        Exception: the last one that `send` raised.
    """
    deadline, pause = time.monotonic() + patience, 0.5
    while True:
        try:
            return send()
        except Exception as error:
            if is_refusal(error) or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


class Request(NamedTuple):
    """A request that waits.

    Attributes:
        what: it is about, in the plural.
        send: makes it; may be called again where it is not known what became of it.
        needed: by those after it, so it waits even if it is refused.
    """

    what: str
    send: Callable[[], object]
    needed: bool


class SendQueue:
    """Sends requests to a server, those that wait first. A server that is away, or refuses, costs a line on stderr.

    Args:
        server: how these lines call it.
        patience: variables of MLflow's environment while the job goes on.
        after: queue of which nothing may wait when this one sends.
    """

    def __init__(self, server: str, patience: Mapping[str, str], after: SendQueue | None = None) -> None:
        self._server, self._patience, self._after = server, patience, after
        self._waiting: deque[Request] = deque()
        self._refused: Counter[str] = Counter()
        self._away = ""
        self._next_attempt, self._pause = 0.0, FIRST_PAUSE
        self._lock = threading.RLock()  # workers' losses come by a thread of their own

    def put(self, what: str, send: Callable[[], object], needed: bool = False) -> None:
        """Send a request, or keep it until the server answers; arguments are those of `Request`."""
        with self._lock:
            self._waiting.append(Request(what, send, needed))
            if time.monotonic() >= self._next_attempt:
                self._attempt(0.0, self._patience)

    def wait(self, what: str, send: Callable[[], object], error: Exception) -> None:
        """Keep a request that failed and that those after it need."""
        with self._lock:
            self._waiting.append(Request(what, send, needed=True))
            self._failed(error)

    def flush(self, patience: float) -> None:
        """Send what waits; if the server is away, try for so many seconds."""
        with self._lock:
            if self._waiting:
                self._attempt(patience, ONE_RETRY)

    @property
    def away(self) -> str:
        """Why the server cannot be used; empty if it can."""
        return self._away

    @property
    def missing(self) -> Counter[str]:
        """How many requests wait or were refused, by what they are about."""
        return self._refused + Counter(request.what for request in self._waiting)

    def _attempt(self, patience: float, variables: Mapping[str, str]) -> None:
        if self._after is not None and self._after._waiting:
            return
        was_away = self._away
        try:
            with environment(variables):
                until_answered(self._send_waiting, patience)
        except Exception as error:
            self._failed(error)
            return
        self._away, self._next_attempt, self._pause = "", 0.0, FIRST_PAUSE
        if was_away:
            self._tell("answers again, and what waited was sent")

    def _failed(self, error: Exception) -> None:
        told, self._away = self._away, reason(error)
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not told:
            self._tell(f"cannot be used for now ({self._away}); the job goes on, and what it records is sent later")

    def _send_waiting(self) -> None:
        while self._waiting:
            request = self._waiting[0]
            try:
                request.send()
            except Exception as error:
                if request.needed or not is_refusal(error):
                    raise
                if not self._refused[request.what]:
                    self._tell(f"refuses {request.what} ({reason(error)}); the job goes on without them")
                self._refused[request.what] += 1
            self._waiting.popleft()

    def _tell(self, words: str) -> None:
        print(f"{self._server} {words}", file=sys.stderr, flush=True)
