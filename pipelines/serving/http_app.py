"""The server's HTTP interface, as a FastAPI app in front of a `ScoringService`. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import base64
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from importlib.resources import files as package_files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.runtime.errors import reason
from pipelines.serving.access import Access
from pipelines.serving.events import log_event
from pipelines.serving.request_reader import RequestError, read_images
from pipelines.serving.schemas import HEAT_MAP_DOCS, SCORE_DOCS, ErrorAnswer, ModelAnswer, ScoreAnswer
from pipelines.serving.service import NotReadyError, ScoringService
from pipelines.serving.shadow import ShadowFeed
from unianom import __version__

REQUEST_ID = "x-request-id"

ERRORS = {
    400: "The request cannot be read.",
    401: "No token, or a wrong one.",
    403: "This server has no token and answers its own machine only.",
    413: "Too many bytes or images.",
    415: "A content type that is not taken.",
    422: "A wrong value.",
    503: "Too much is asked for, or no model is loaded; come again after the seconds that Retry-After says.",
    504: "It took too long.",
}


def make_app(
    service: ScoringService, access: Access, shadow: ShadowFeed | None = None, answers_ids: bool = True
) -> FastAPI:
    """Return the app.

    Args:
        service: what scores.
        access: who may ask.
        shadow: gets what was scored.
        answers_ids: whether request ids are made, and returned as a header, here; Ray Serve's proxies do both.
    """
    app = FastAPI(
        title="unianom",
        version=__version__,
        description="Anomaly scores and decisions for images. Every image gets an answer of its own, a bad one with "
        "its status.",
        docs_url=None,  # FastAPI's pages load their code from elsewhere
        redoc_url=None,
    )
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorAnswer, "description": text} for code, text in ERRORS.items()
    }
    guard = _Guard(service, access)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return _page("upload_page.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return _page("docs_page.html")

    @app.get("/healthz", summary="Whether this replica is healthy")
    async def healthz() -> JSONResponse:
        fault = service.fault
        return JSONResponse({"healthy": not fault, "fault": fault}, 503 if fault else 200)

    @app.get("/readyz", summary="Whether this replica can answer: its model is loaded")
    async def readyz() -> JSONResponse:
        predictor = service.live.predictor
        ready = predictor is not None and not service.fault
        return JSONResponse({"ready": ready, "model": predictor and predictor.digest}, 200 if ready else 503)

    @app.get("/v1/model", summary="The model in use", responses={200: {"model": ModelAnswer}, **errors})
    async def model(request: Request) -> Response:
        async def answer() -> Response:
            predictor = service.live.predictor
            if predictor is None:
                raise NotReadyError("the model is not loaded yet; try again later")
            return JSONResponse(predictor.description())

        return await guard.run(request, "/v1/model", answer)

    @app.post(
        "/v1/score",
        summary="Score one image, or several",
        responses={200: {"model": ScoreAnswer}, **errors},
        openapi_extra=SCORE_DOCS,
    )
    async def score(request: Request) -> Response:
        async def answer() -> Response:
            queries, kind = await read_images(request, service.options)
            results = await service.answer(queries, kind)
            request.state.told = dict(Counter(result["status"] for result in results))
            if shadow is not None:
                shadow.offer(queries, results, _request_id(request))
            return JSONResponse({"request_id": _request_id(request), "results": results})

        return await guard.run(request, "/v1/score", answer)

    @app.post(
        "/v1/heatmap",
        summary="Score one image, and return its heat map as PNG",
        description="Score, decision and model are in the headers X-Unianom-Score, X-Unianom-Decision and "
        "X-Unianom-Model. An image that cannot be scored is an error 422.",
        responses={200: {"content": {"image/png": {}}, "description": "The heat map."}, **errors},
        openapi_extra=HEAT_MAP_DOCS,
        response_class=Response,
    )
    async def heatmap(request: Request) -> Response:
        async def answer() -> Response:
            queries, kind = await read_images(request, service.options)
            if len(queries) != 1:
                raise RequestError(422, f"{len(queries)} images; a heat map is answered for one, or use /v1/score")
            if kind == "raw":
                raise RequestError(422, "map=raw comes with numbers; ask /v1/score for it")
            (result,) = await service.answer(queries, "overlay" if kind == "none" else kind)
            if result["status"] != "ok":
                code = 503 if result["status"] == "failed" else 422
                raise RequestError(code, f"{result['status']}: {result['error']}")
            headers = {
                "X-Unianom-Score": repr(result["score"]),
                "X-Unianom-Decision": str(result["decision"]),
                "X-Unianom-Model": result["model"],
            }
            return Response(base64.b64decode(result["map"]["png"]), 200, headers, "image/png")

        return await guard.run(request, "/v1/heatmap", answer)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _refused(request, error.status_code, f"{request.method} {request.url.path}: {error.detail}", 1)

    app.add_middleware(_RequestIds, answers=answers_ids)
    return app


class _Guard:
    """What every request passes: the token, the time limit, errors as answers, log and metrics."""

    def __init__(self, service: ScoringService, access: Access) -> None:
        self._service, self._access = service, access

    async def run(self, request: Request, path: str, answer: Callable[[], Awaitable[Response]]) -> Response:
        """Answer a request."""
        start = time.monotonic()
        response = await self._answered(request, answer)
        seconds = time.monotonic() - start
        self._service.metrics.request(path, response.status_code, seconds)
        log_event(
            "request",
            request_id=_request_id(request),
            path=path,
            code=response.status_code,
            images=getattr(request.state, "told", None),
            error=getattr(request.state, "error", None),
            milliseconds=round(1000 * seconds, 1),
        )
        return response

    async def _answered(self, request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
        options = self._service.options
        try:
            self._access.check(request)
            return await asyncio.wait_for(answer(), options.request_seconds)
        except RequestError as error:
            code, message = error.code, str(error)
        except NotReadyError as error:
            code, message = 503, str(error)
        except TimeoutError:
            code, message = 504, f"it took more than {options.request_seconds:g} s, the limit (--request_seconds)"
        except ClientDisconnect:
            code, message = 400, "the client ended the connection before all of its request had come"
        except Exception as error:
            code, message = 500, f"an unexpected error, which the server has logged ({type(error).__name__})"
            log_event("unexpected error", request_id=_request_id(request), error=reason(error))
        return _refused(request, code, message, options.replicas.retry_after_seconds)


def _refused(request: Request, code: int, message: str, retry_after: float) -> Response:
    request.state.error = message
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(max(1, round(retry_after)))}}.get(code)
    return JSONResponse({"request_id": _request_id(request), "error": message}, code, headers)


def _request_id(request: Request) -> str:
    found: str = request.scope.get("state", {}).get("request_id", "")
    return found


class _RequestIds:
    """Gives each request an id: the one that it came with, if that is fit for a log, or a new one.

    Args:
        app: what comes next.
        answers: whether the answer's header tells it.
    """

    def __init__(self, app: ASGIApp, answers: bool) -> None:
        self._app, self._answers = app, answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID.encode(), b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.:/+=-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and self._answers:
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _page(name: str) -> HTMLResponse:
    content = package_files("pipelines.serving").joinpath(name).read_text("utf-8")
    policy = "default-src 'self'; style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline'; "
    policy += "img-src 'self' data: blob:; frame-ancestors 'none'"
    return HTMLResponse(content, headers={"Content-Security-Policy": policy})
