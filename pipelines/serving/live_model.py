"""The model that is in use, replaced when another one lies where it came from.

    source ─ every poll ─▶ another version? ─▶ fetch ─▶ load ─▶ predict once ─▶ takes over
                                               └────── fails ──────┘ ─▶ the old one stays

Requests hold on to the predictor they began with, so none is dropped, and the old one is let go with the last of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.runtime.errors import reason, user_error
from pipelines.serving.events import log_event
from pipelines.serving.metrics import ServingMetrics
from pipelines.serving.model_source import ModelSource, fetch_folder
from pipelines.serving.predictor import Predictor

LONGEST_PAUSE = 16
"""After failures in a row the same version is tried again at the 1st, 2nd, 4th … poll, at most so many later."""


FIRST_POLL_SECONDS = 30.0
"""How often is looked for a model that is not needed at once, where nothing is looked for later."""


class LiveModel:
    """Keeps the predictor of a source up to date.

    Args:
        source: where the model lies.
        load: makes a predictor of a model folder and a version.
        metrics: told of every change.
    """

    def __init__(self, source: ModelSource, load: Callable[[str, str], Predictor], metrics: ServingMetrics) -> None:
        self._source, self._load, self._metrics = source, load, metrics
        self._predictor: Predictor | None = None
        self._failed, self._failures, self._pause = "", 0, 0
        self._end = threading.Event()

    @property
    def predictor(self) -> Predictor | None:
        """The one in use; None before the first is loaded."""
        return self._predictor

    def start(self, poll_seconds: float | None, needed: bool = True) -> None:
        """Load the model, and look for another one from then on.

        Args:
            poll_seconds: how often; None never looks again.
            needed: whether the first model must be loaded when this returns; else it is loaded beside, and looked for
                until it is.

        Raises:
            UnianomError: the model is needed and cannot be loaded; also whatever else its loading raises.
        """
        if needed:
            self._replace(self._source.version())
        if poll_seconds is not None or not needed:
            threading.Thread(
                target=self._watch, args=(poll_seconds, not needed), name="model-watch", daemon=True
            ).start()

    def close(self) -> None:
        """Look for no other model any more."""
        self._end.set()

    def poll(self) -> bool:
        """Look whether another model lies there, and put it to use; return whether one was. Never raises."""
        version = ""
        try:
            version = self._source.version()
            if self._pause > 0 and version == self._failed:
                self._pause -= 1
                return False
            if self._predictor is not None and version == self._predictor.version:
                if self._failures:  # the alias was moved back
                    self._failures, self._failed = 0, ""
                    self._metrics.load(True)
                return False
            self._replace(version)
        except Exception as error:
            self._failures = self._failures + 1 if version == self._failed else 1
            self._failed, self._pause = version, min(2 ** (self._failures - 1), LONGEST_PAUSE) - 1
            self._metrics.load(False)
            used = self._predictor
            log_event(
                "model not loaded",
                logging.ERROR,
                model=self._source.uri,
                version=version,
                error=str(user_error(error) or reason(error)),
                still_in_use=None if used is None else used.version,
            )
            return False
        return True

    def _replace(self, version: str) -> None:
        start = time.monotonic()
        folder = fetch_folder()
        predictor = self._load(self._source.fetch(version, Path(folder.name)), version)
        predictor.files = folder
        before, self._predictor = self._predictor, predictor
        self._failures, self._failed = 0, ""
        if before is not None:
            self._metrics.model(before.version, before.digest, False)
        self._metrics.model(version, predictor.digest, True)
        self._metrics.load(True)
        log_event(
            "model loaded",
            model=self._source.uri,
            version=version,
            digest=predictor.digest,
            replaces=None if before is None else before.version,
            seconds=round(time.monotonic() - start, 3),
        )

    def _watch(self, poll_seconds: float | None, at_once: bool) -> None:
        if at_once:
            self.poll()
        while poll_seconds is not None or self._predictor is None:
            if self._end.wait(FIRST_POLL_SECONDS if poll_seconds is None else poll_seconds):
                return
            self.poll()
