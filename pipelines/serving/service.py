"""What a replica does with the images of a request.

    bytes ─▶ threads decode ─▶ batches: the network's turn ─▶ threads draw maps ─▶ answers

Images of all requests share batches and threads; each waits for its own alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pipelines.data.timed_pool import TimedPool
from pipelines.runtime.errors import reason
from pipelines.serving.batcher import Batcher, Item, Scored
from pipelines.serving.events import log_event
from pipelines.serving.heat_maps import MapKind, map_fields
from pipelines.serving.live_model import LiveModel
from pipelines.serving.metrics import ServingMetrics
from pipelines.serving.predictor import Predictor, PreparedImage, ScoredImage, threshold_fields
from pipelines.serving.serve_options import ServeOptions
from unianom.errors import ImageError, MachineError

FAILED_BATCHES = 3
"""Forward passes in a row that fail before a replica calls itself unhealthy, and Ray Serve puts another in its
place."""


class NotReadyError(Exception):
    """There is no model to answer with, now."""


@dataclass(frozen=True, eq=False)
class ImageQuery:
    """An image to score.

    Attributes:
        data: the encoded file, or why there is none.
        category: of the image; None if it is not known.
        name: that the answer has, too.
    """

    data: bytes | ImageError
    category: str | None = None
    name: str | None = None


class ScoringService:
    """Scores the images of requests with the model in use.

    Args:
        live: the model.
        options: of the server.
        cpus: threads that decode, and those of the network.
        metrics: of the replica.

    Attributes:
        score: scores one item, in a batch with those of other requests.
    """

    def __init__(self, live: LiveModel, options: ServeOptions, cpus: int, metrics: ServingMetrics) -> None:
        self.live, self.options, self.metrics = live, options, metrics
        self._batcher = Batcher(options.max_batch_size, options.batch_wait_seconds, cpus, metrics)
        self.score: Callable[[Item], Awaitable[Scored]] = self._batcher.score
        self._pool = TimedPool(cpus, options.limits)
        self._broken = ""

    async def answer(self, queries: Sequence[ImageQuery], kind: MapKind) -> list[dict[str, Any]]:
        """Return an answer for each image, in their order; see `pipelines.serving.schemas.ImageAnswer`.

        Args:
            queries: the images.
            kind: which picture of their maps is wanted.

        Raises:
            NotReadyError: no model is loaded.
        """
        predictor = self.live.predictor
        if predictor is None:
            raise NotReadyError("the model is not loaded yet; try again later")
        return list(await asyncio.gather(*(self._answer(predictor, query, kind) for query in queries)))

    @property
    def fault(self) -> str:
        """What is wrong with this replica, so that another should take its place; empty while it is healthy."""
        if self._broken:
            return self._broken
        if self._batcher.failed >= FAILED_BATCHES:
            return f"{self._batcher.failed} forward passes in a row have failed; see the log of this replica"
        longest = 2 * self.options.request_seconds
        if self._batcher.busy_seconds > longest:
            return f"a forward pass has taken more than {longest:g} s, twice --request_seconds"
        return ""

    async def _answer(self, predictor: Predictor, query: ImageQuery, kind: MapKind) -> dict[str, Any]:
        try:
            prepared = await self._prepare(predictor, query, kind)
            scored = await self.score((predictor, prepared))
            if isinstance(scored, Exception):
                return self._refused(predictor, query, scored)
            picture = await self._draw(prepared, scored, kind)
        except Exception as error:
            return self._refused(predictor, query, error)
        self.metrics.image("ok", scored.decision)
        return _fields(
            query,
            predictor,
            {
                "status": "ok",
                "score": scored.score,
                "calibrated_score": scored.calibrated_score,
                "decision": scored.decision,
                "threshold": threshold_fields(scored.threshold),
                "map": picture,
            },
        )

    def _refused(self, predictor: Predictor, query: ImageQuery, error: Exception) -> dict[str, Any]:
        status, message = self._status_of(error)
        self.metrics.image(status, None)
        return _fields(query, predictor, {"status": status, "error": message})

    async def _prepare(self, predictor: Predictor, query: ImageQuery, kind: MapKind) -> PreparedImage:
        if isinstance(query.data, ImageError):
            raise query.data
        predictor.check_category(query.category)
        self.options.limits.check_bytes(len(query.data))
        pixels = await asyncio.wrap_future(self._pool.submit(predictor.decode, query.data))
        return PreparedImage(pixels, query.category, kind)

    async def _draw(self, image: PreparedImage, scored: ScoredImage, kind: MapKind) -> dict[str, Any] | None:
        if scored.anomaly_map is None:
            return None
        drawn: Future[dict[str, Any]] = self._pool.submit_unlimited(
            map_fields, kind, image.pixels, scored.anomaly_map, scored.brightness
        )
        return await asyncio.wrap_future(drawn)

    def _status_of(self, error: Exception) -> tuple[str, str]:
        """Return status and message of an image that could not be scored."""
        if isinstance(error, ImageError):
            return error.status, str(error)
        if isinstance(error, MachineError):  # threads hang: of this process nothing better is to be expected
            self._broken = str(error)
        log_event("image failed", error=reason(error))
        return "failed", f"the server could not score it ({reason(error)}); try again, or ask whoever runs the server"


def _fields(query: ImageQuery, predictor: Predictor, known: dict[str, Any]) -> dict[str, Any]:
    unknown = ("error", "score", "calibrated_score", "decision", "threshold", "map")
    return {
        "name": query.name,
        "category": query.category,
        "status": known["status"],
        **{name: known.get(name) for name in unknown},
        "model": predictor.digest,
    }
