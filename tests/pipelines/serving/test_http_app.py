"""The HTTP interface: forms of requests, limits, who may ask, and what is answered when something is wrong."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipelines.serving.http_app import ERRORS
from pipelines.serving.live_model import LiveModel
from pipelines.serving.model_source import FolderSource
from pipelines.serving.predictor import Predictor
from pipelines.serving.service import FAILED_BATCHES, ScoringService
from tests.pipelines.serving.conftest import RecordedMetrics, client_of, options, service_of
from unianom.data.image import ImageLimits, decode_map
from unianom.errors import ImageError, MachineError
from unianom.model import load

PNG = {"Content-Type": "image/png"}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def results(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["results"]
    return found


def error(response: Any, code: int) -> str:
    assert response.status_code == code, response.text
    assert code in {*ERRORS, 404, 405}
    told: str = response.json()["error"]
    return told


def test_every_form_of_request_gives_the_same_answer(client: TestClient, pictures: list[bytes]) -> None:
    image = pictures[0]
    category = {"category": "cog"}
    answers = [
        client.post("/v1/score?category=cog", content=image, headers=PNG),
        client.post("/v1/score", content=image, headers={"Content-Type": "application/octet-stream"}, params=category),
        client.post("/v1/score", files={"image": image}, data=category),
        client.post("/v1/score", json={"image": text(image), **category}),
        client.post("/v1/score", json={"image": "data:image/png;base64," + text(image), **category}),
        client.post("/v1/score", json={"images": [{"image": text(image), **category}]}),
    ]
    first, *others = [results(answer) for answer in answers]
    assert first[0]["status"] == "ok"
    assert all([{**one, "name": None} for one in other] == first for other in others)


def test_an_answer_is_what_the_model_says(client: TestClient, model: Path, pictures: list[bytes]) -> None:
    (answer,) = results(client.post("/v1/score?map=raw&category=weave", content=pictures[1], headers=PNG))
    loaded = load(model)
    (expected,) = loaded.predict([pictures[1]], categories=["weave"])
    assert answer["score"] == pytest.approx(expected.score, rel=1e-6)
    assert (answer["decision"], answer["model"]) == (expected.decision, loaded.digest)
    threshold = loaded.category_thresholds["weave"].value
    assert answer["threshold"] == {
        "scale": "raw",
        "fail_above": threshold,
        "review_above": threshold,
        "category": "weave",
    }
    found = answer["map"]
    drawn = decode_map(base64.b64decode(found["png"]), found["offset"], found["scale"])
    assert drawn == pytest.approx(expected.anomaly_map, abs=found["scale"] + 1e-4)


def test_a_bad_image_is_an_answer_with_its_status_and_spoils_no_other(model: Path, pictures: list[bytes]) -> None:
    service = service_of(model, limits=ImageLimits(max_bytes=20_000, seconds=0.3))
    slow = pictures[3]
    decode = Predictor.decode

    def hangs(self: Predictor, data: bytes) -> Any:
        if data == slow:
            time.sleep(2)
        return decode(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "decode", hangs)
        images = [pictures[0], pictures[1][:200], bytes(20_001), b"GIF89a", slow, b"", pictures[2]]
        asked: list[dict[str, Any]] = [{"image": text(data), "name": str(n)} for n, data in enumerate(images)]
        asked.insert(1, {"image": "***", "name": "no base64"})
        found = results(client_of(service).post("/v1/score", json={"images": asked}))
    assert [one["name"] for one in found] == ["0", "no base64", "1", "2", "3", "4", "5", "6"]
    assert [one["status"] for one in found] == [
        "ok", "corrupt", "corrupt", "too_large", "corrupt", "timeout", "missing", "ok",
    ]  # fmt: skip
    for one in found:
        assert (one["score"] is None) == (one["error"] is not None) == (one["status"] != "ok")
    alone = results(client_of(service_of(model)).post("/v1/score", json={"image": text(pictures[0])}))
    assert found[0]["score"] == pytest.approx(alone[0]["score"], rel=1e-6)
    assert sorted(status for status, _ in service.metrics.of("image")) == sorted(  # type: ignore[attr-defined]
        one["status"] for one in found
    )


def test_several_files_of_a_form_have_their_own_categories(client: TestClient, pictures: list[bytes]) -> None:
    files = [("image", (f"{n}.png", data)) for n, data in enumerate(pictures[:2])]
    found = results(client.post("/v1/score", files=files, data={"category": ["cog", "weave"]}))
    assert [(one["name"], one["threshold"]["category"]) for one in found] == [("0.png", "cog"), ("1.png", "weave")]
    found = results(client.post("/v1/score", files=files, data={"category": "cog", "map": "heat"}))
    assert [(one["category"], one["map"]["kind"]) for one in found] == [("cog", "heat")] * 2
    three = client.post("/v1/score", files=files, data={"category": ["a", "b", "c"]})
    assert "3 categories for 2 images" in error(three, 422)


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415, "content type 'text/plain' is not taken"),
        ({"content": b"x"}, 415, "send multipart/form-data"),
        ({"content": b"", "headers": PNG}, 400, "no body"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "JSON"),
        ({"json": {"images": []}}, 422, "at least one"),
        ({"json": {}}, 422, "give either image or images"),
        ({"json": {"image": "AAAA", "images": []}}, 422, "give either image or images"),
        ({"json": {"image": "AAAA", "maps": True}}, 422, "maps"),
        ({"json": {"images": [{"image": 1}]}}, 422, "images.0.image"),
        ({"json": {"image": "AAAA", "map": "all"}}, 422, "map"),
        ({"json": {"image": "AAAA", "category": "x" * 600}}, 422, "at most 512 characters"),
        ({"json": {"images": [{"image": "AAAA"}] * 4}}, 413, "the limit of a request is 3"),
        ({"files": [("image", b"AAAA")] * 4}, 413, "Too many files"),
        ({"files": {"picture": b"AAAA"}}, 422, "a field 'picture'"),
        ({"data": {"category": "a"}, "files": {"image": ("", b"")}}, 422, "no file in its field 'image'"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "form cannot be read"),
        ({"content": bytes(5001), "headers": PNG}, 413, "more than 5000 bytes"),
        ({"content": iter([bytes(3000)] * 3), "headers": PNG}, 413, "more than 5000 bytes"),
        (
            {"content": iter([b'{"image": "' + b"A" * 6000]), "headers": {"Content-Type": "application/json"}},
            413,
            "5000",
        ),
        ({"files": {"image": bytes(6000)}}, 413, "more than 5000 bytes"),
        ({"content": b"x", "headers": PNG, "params": {"map": "all"}}, 422, "one of none, overlay, heat, raw"),
    ],
)
def test_a_request_that_is_wrong_as_a_whole(limited: TestClient, request_: Any, code: int, words: str) -> None:
    assert words in error(limited.post("/v1/score", **request_), code)


@pytest.fixture(scope="module")
def limited(model: Path) -> TestClient:
    return client_of(service_of(model, max_images=3, max_request_bytes=5000))


def test_a_heat_map_alone(client: TestClient, pictures: list[bytes]) -> None:
    (expected,) = results(client.post("/v1/score?map=overlay", content=pictures[0], headers=PNG))
    answer = client.post("/v1/heatmap", content=pictures[0], headers=PNG)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content == base64.b64decode(expected["map"]["png"])
    assert Image.open(io.BytesIO(answer.content)).size == (64, 64)
    assert float(answer.headers["x-unianom-score"]) == expected["score"]
    assert answer.headers["x-unianom-decision"] == expected["decision"]
    assert "corrupt: " in error(client.post("/v1/heatmap", content=b"no image", headers=PNG), 422)
    assert "2 images" in error(client.post("/v1/heatmap", json={"images": [{"image": "AAAA"}] * 2}), 422)
    assert "map=raw" in error(client.post("/v1/heatmap?map=raw", content=pictures[0], headers=PNG), 422)


def test_only_who_has_the_token_is_answered(service: ScoringService, pictures: list[bytes]) -> None:
    asking = client_of(service, token="secret", host="10.1.2.3")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}, {"Authorization": "é"}):
        headers = {**PNG, **{name: value.encode() for name, value in header.items()}}
        refused = asking.post("/v1/score", content=pictures[0], headers=headers)
        assert "send it in the header" in error(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
    assert service.metrics.of("image") == []  # type: ignore[attr-defined]
    assert error(asking.get("/v1/model"), 401)
    right = {"Authorization": "Bearer secret"}
    assert results(asking.post("/v1/score", content=pictures[0], headers={**PNG, **right}))[0]["status"] == "ok"
    assert asking.get("/v1/model", headers=right).json()["method"] == "uniformaly"
    assert [asking.get(path).status_code for path in ("/healthz", "/readyz", "/", "/docs")] == [200] * 4


def test_without_a_token_only_this_machine_is_answered(service: ScoringService, pictures: list[bytes]) -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert results(client_of(service, host=host).post("/v1/score", content=pictures[0], headers=PNG))
    for host in ("10.1.2.3", "2001:db8::1", "testclient"):
        refused = client_of(service, host=host).post("/v1/score", content=pictures[0], headers=PNG)
        assert "UNIANOM_SERVE_TOKEN" in error(refused, 403)


def test_request_ids_are_kept_or_made(client: TestClient) -> None:
    answer = client.post("/v1/score", content=b"x", headers={**PNG, "X-Request-ID": "line-3:42"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "line-3:42"
    for strange in ("a b", "x" * 200, '{"a":1}'):
        answer = client.get("/nothing", headers={"X-Request-ID": strange})
        assert error(answer, 404) == "GET /nothing: Not Found"
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_a_request_is_logged_with_its_id(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ray.serve.unianom")
    client.post("/v1/score", content=b"no image", headers={**PNG, "X-Request-ID": "r1"})
    told = [json.loads(record.getMessage()) for record in caplog.records]
    (request,) = [one for one in told if one["event"] == "request"]
    assert (request["request_id"], request["code"], request["images"]) == ("r1", 200, {"corrupt": 1})


def test_without_a_model_nobody_is_answered(model: Path) -> None:
    live = LiveModel(FolderSource(str(model)), lambda *_: pytest.fail("not loaded here"), RecordedMetrics())  # type: ignore[arg-type]
    service = ScoringService(live, options(model), 1, RecordedMetrics())  # type: ignore[arg-type]
    asking = client_of(service)
    assert (asking.get("/readyz").status_code, asking.get("/healthz").status_code) == (503, 200)
    refused = asking.post("/v1/score", content=b"x", headers=PNG)
    assert "not loaded yet" in error(refused, 503)
    assert refused.headers["retry-after"] == "1"


def test_a_request_that_takes_too_long_is_ended(model: Path, pictures: list[bytes]) -> None:
    service = service_of(model, request_seconds=0.2)

    async def never(_: Any) -> Any:
        await asyncio.sleep(30)

    service.score = never
    answer = client_of(service).post("/v1/score", content=pictures[0], headers=PNG)
    assert "more than 0.2 s" in error(answer, 504)


def test_who_breaks_off_an_upload_is_no_fault_of_the_server(service: ScoringService) -> None:
    app = client_of(service).app
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/score",
        "raw_path": b"/v1/score",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] in ([400], [])
    assert service.metrics.of("request")[-1][1] == 400  # type: ignore[attr-defined]


def test_a_fault_of_the_server_is_told_and_makes_it_unhealthy(
    model: Path, pictures: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(model)
    asking = client_of(service)

    def fails(*_: Any) -> Any:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", fails)
        for healthy in (200, 200, 503)[-FAILED_BATCHES:]:
            (told,) = results(asking.post("/v1/score", content=pictures[0], headers=PNG))
            assert (told["status"], told["score"]) == ("failed", None)
            assert "RuntimeError: device lost" in told["error"]
            assert asking.get("/healthz").status_code == healthy
    assert results(asking.post("/v1/score", content=pictures[0], headers=PNG))[0]["status"] == "ok"
    assert asking.get("/healthz").status_code == 200


def test_hanging_threads_make_a_replica_unhealthy(service: ScoringService, pictures: list[bytes]) -> None:
    def hang(*_: Any) -> Any:
        raise MachineError("9 threads of a worker hang")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "decode", hang)
        (told,) = results(client_of(service).post("/v1/score", content=pictures[0], headers=PNG))
    assert told["status"] == "failed"
    assert service.fault == "9 threads of a worker hang"
    assert client_of(service).get("/readyz").status_code == 503


def test_images_that_cannot_be_read_are_no_fault_of_the_server(service: ScoringService, pictures: list[bytes]) -> None:
    async def refused(_: Any) -> Any:
        return ImageError("unsupported", "no finite score")

    service.score = refused
    for _ in range(FAILED_BATCHES + 1):
        (told,) = results(client_of(service).post("/v1/score", content=pictures[0], headers=PNG))
        assert told["status"] == "unsupported"
    assert not service.fault


@pytest.fixture
def pages(client: TestClient) -> dict[str, str]:
    return {path: client.get(path).text for path in ("/", "/docs")}


def test_pages_load_nothing_from_elsewhere(pages: dict[str, str], client: TestClient) -> None:
    for content in pages.values():
        assert content.startswith("<!doctype html>")
        assert re.findall(r'(?:src|href)\s*=\s*"(?!data:|docs"|\./"|openapi\.json")[^"]*"', content) == []
        assert "//" not in re.sub(r"https?://\$|://127", "", content.replace("<!--", ""))
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


def test_openapi_describes_what_is_answered(client: TestClient, pictures: list[bytes]) -> None:
    api = client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/healthz", "/readyz", "/v1/model", "/v1/score", "/v1/heatmap"}
    schemas = api["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(api)))
    assert named <= set(schemas)
    (answer,) = results(client.post("/v1/score?map=raw", content=pictures[0], headers=PNG))
    assert set(answer) == set(schemas["ImageAnswer"]["properties"])
    assert set(answer["threshold"]) == set(schemas["ThresholdAnswer"]["properties"])
    assert set(answer["map"]) == set(schemas["MapAnswer"]["properties"])
    assert set(client.get("/v1/model").json()) == set(schemas["ModelAnswer"]["properties"])
    assert set(api["paths"]["/v1/score"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data", "application/json", "application/octet-stream", "image/*",
    }  # fmt: skip
