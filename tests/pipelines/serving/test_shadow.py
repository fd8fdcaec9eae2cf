"""A shadow model: scores of both are logged, and the champion's callers notice nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.serving.service import ImageQuery
from pipelines.serving.shadow import MOST_WAITING, ShadowFeed, ShadowImage, compare
from tests.pipelines.serving.conftest import RecordedMetrics, client_of, service_of
from unianom.errors import ImageError
from unianom.model import load

OK = {"status": "ok", "score": 1.0, "calibrated_score": None, "decision": "pass", "model": "a"}


def queries(count: int) -> list[ImageQuery]:
    return [ImageQuery(b"image", None, str(number)) for number in range(count)]


def test_only_what_has_a_score_is_sent() -> None:
    sent: list[list[ShadowImage]] = []

    async def send(images: list[ShadowImage]) -> None:
        sent.append(images)

    async def run() -> None:
        feed = ShadowFeed(send, RecordedMetrics())  # type: ignore[arg-type]
        broken = ImageQuery(ImageError("corrupt", "no base64"))
        feed.offer([*queries(2), broken], [OK, {**OK, "status": "corrupt"}, {**OK, "status": "corrupt"}], "r1")
        await asyncio.sleep(0.01)

    asyncio.run(run())
    ((image,),) = sent
    assert (image.name, image.request_id, image.champion["score"]) == ("0", "r1", 1.0)


def test_a_shadow_that_is_slow_or_fails_is_left_behind() -> None:
    metrics = RecordedMetrics()

    async def run() -> None:
        release = asyncio.Event()

        async def send(images: list[ShadowImage]) -> None:
            await release.wait()
            raise RuntimeError("replica lost")

        feed = ShadowFeed(send, metrics)  # type: ignore[arg-type]
        for _ in range(3):
            feed.offer(queries(MOST_WAITING // 2), [OK] * (MOST_WAITING // 2), "r")
        release.set()
        await asyncio.sleep(0.01)
        feed.offer(queries(1), [OK], "r")  # there is room again
        await asyncio.sleep(0.01)

    asyncio.run(run())
    half = MOST_WAITING // 2
    assert metrics.of("compared") == [["dropped", half], ["failed", half], ["failed", half], ["failed", 1]]


def test_both_scores_are_logged_and_flips_counted(
    tiny_model: Path, pictures: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_model)
    assert model.threshold is not None
    (expected,) = model.predict([pictures[0]])
    shadow = service_of(tiny_model)
    other = "pass" if expected.decision == "fail" else "fail"
    champion = {"score": expected.score - 0.5, "calibrated_score": None, "decision": other, "model": "champion"}
    same = {**champion, "score": expected.score, "decision": expected.decision}
    images = [ShadowImage(pictures[0], None, "part", "r7", one) for one in (champion, same)]
    images.append(ShadowImage(b"no image for this one", None, None, "r8", same))
    with caplog.at_level("INFO", "ray.serve.unianom"):
        asyncio.run(compare(shadow, images))
    told = [json.loads(record.getMessage()) for record in caplog.records]
    first, second, third = [one for one in told if one["event"] == "shadow"]
    assert (first["request_id"], first["name"], first["flipped"], second["flipped"]) == ("r7", "part", True, False)
    assert first["shadow"]["score"] == pytest.approx(expected.score, rel=1e-5)
    assert first["difference"]["raw"] == pytest.approx(0.5, rel=1e-4)
    assert third["status"] == "corrupt"
    metrics: Any = shadow.metrics
    assert metrics.of("compared") == [["compared"], ["compared"], ["failed"]]
    (values, flip), (_, none) = metrics.of("difference")
    assert values == [("raw", pytest.approx(0.5, rel=1e-4))]
    assert (flip, none) == ((other, expected.decision), None)


def test_callers_get_the_champion_s_answer(tiny_model: Path, pictures: list[bytes]) -> None:
    offered: list[Any] = []

    class Feed:
        def offer(self, *values: Any) -> None:
            offered.append(values)

    service = service_of(tiny_model)
    plain = client_of(service).post("/v1/score", content=pictures[0], headers={"Content-Type": "image/png"}).json()
    asking = client_of(service, shadow=Feed())
    answer = asking.post(
        "/v1/score", content=pictures[0], headers={"Content-Type": "image/png", "X-Request-ID": "r9"}
    ).json()
    assert answer["results"] == plain["results"]
    ((sent, answers, request_id),) = offered
    assert (sent[0].data, answers, request_id) == (pictures[0], answer["results"], "r9")
