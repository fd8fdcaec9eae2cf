"""A shadow model beside the champion: it scores the same images, and both scores are logged.

    champion's replica ─ answer ─▶ caller
            └─ images and scores, at most `MOST_WAITING` on their way ─▶ shadow's replica ─▶ log, metrics

The champion waits for nothing of this, and what goes wrong here is counted and goes no further. Where the shadow is
slower, images are left out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.runtime.errors import reason
from pipelines.serving.events import log_event
from pipelines.serving.metrics import ServingMetrics
from pipelines.serving.service import ImageQuery, NotReadyError, ScoringService

MOST_WAITING = 64
"""Images of a replica that are on their way to the shadow at a time."""

TOLD = ("score", "calibrated_score", "decision", "model")
"""What is compared and logged of an answer."""


@dataclass(frozen=True)
class ShadowImage:
    """An image that the champion has scored.

    Attributes:
        data: the encoded file.
        category, name: as asked.
        request_id: of its request.
        champion: `TOLD` of the champion's answer.
    """

    data: bytes
    category: str | None
    name: str | None
    request_id: str
    champion: dict[str, Any]


class ShadowFeed:
    """Sends what the champion has scored to the shadow, without waiting for it.

    Args:
        send: has the shadow score images; returns when it has.
        metrics: of the champion's replica.
    """

    def __init__(self, send: Callable[[list[ShadowImage]], Awaitable[None]], metrics: ServingMetrics) -> None:
        self._send, self._metrics = send, metrics
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()  # which would else be collected while they run

    def offer(self, queries: Sequence[ImageQuery], answers: Sequence[dict[str, Any]], request_id: str) -> None:
        """Send the scored images of a request, or leave them out; never raises, and never waits."""
        images = [
            ShadowImage(query.data, query.category, query.name, request_id, {name: answer[name] for name in TOLD})
            for query, answer in zip(queries, answers, strict=True)
            if answer["status"] == "ok" and isinstance(query.data, bytes)
        ]
        room = max(0, MOST_WAITING - self._waiting)
        if len(images) > room:
            self._metrics.compared("dropped", len(images) - room)
            images = images[:room]
        if images:
            self._waiting += len(images)
            task = asyncio.get_running_loop().create_task(self._sent(images))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _sent(self, images: list[ShadowImage]) -> None:
        try:
            await self._send(images)
        except Exception as error:
            self._metrics.compared("failed", len(images))
            log_event("shadow failed", logging.WARNING, images=len(images), error=reason(error))
        finally:
            self._waiting -= len(images)


async def compare(service: ScoringService, images: Sequence[ShadowImage]) -> None:
    """Score images with the shadow, and log its scores beside the champion's.

    Args:
        service: of the shadow.
        images: that the champion has scored.
    """
    metrics = service.metrics
    try:
        answers = await service.answer([ImageQuery(one.data, one.category, one.name) for one in images], "none")
    except NotReadyError:
        metrics.compared("failed", len(images))
        return
    for image, answer in zip(images, answers, strict=True):
        told: dict[str, Any] = {"request_id": image.request_id, "name": image.name, "category": image.category}
        if answer["status"] != "ok":
            metrics.compared("failed")
            log_event("shadow", **told, champion=image.champion, status=answer["status"], error=answer["error"])
            continue
        own = {name: answer[name] for name in TOLD}
        differences = {
            scale: own[name] - image.champion[name]
            for scale, name in (("raw", "score"), ("calibrated", "calibrated_score"))
            if own[name] is not None and image.champion[name] is not None
        }
        decisions = (str(image.champion["decision"]), str(own["decision"]))
        flipped = decisions[0] != decisions[1]
        metrics.compared("compared")
        metrics.difference([(scale, abs(d)) for scale, d in differences.items()], decisions if flipped else None)
        log_event("shadow", **told, champion=image.champion, shadow=own, difference=differences, flipped=flipped)
