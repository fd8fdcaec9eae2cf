"""The images of an HTTP request: an upload form, JSON with base64, or the bytes of one file; within limits."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, cast, get_args

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from pipelines.serving.heat_maps import MapKind
from pipelines.serving.schemas import ScoreRequest
from pipelines.serving.serve_options import ServeOptions
from pipelines.serving.service import ImageQuery
from unianom.errors import ImageError

TAKEN = "multipart/form-data, application/json, application/octet-stream or image/…"

LONGEST_TEXT = 512
"""Characters of a category or name."""


class RequestError(Exception):
    """A request that is refused as a whole.

    Attributes:
        code: HTTP status.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


async def read_images(request: Request, options: ServeOptions) -> tuple[list[ImageQuery], MapKind]:
    """Return the images of a request, at least one, and which picture of their maps is wanted.

    Raises:
        RequestError: 400 for one that cannot be read, 413 for too many bytes or images, 415 for another type, 422 for
            wrong values.
    """
    _check_length(request, options.max_request_bytes)
    limited = _Limited(request, options.max_request_bytes).request
    kind = _map_kind(request.query_params.get("map", "none"))
    common = _text("category", request.query_params.get("category"))
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _from_form(limited, options, kind, common)
    if media_type == "application/json":
        # megabytes of text, while other requests wait for this thread
        return await asyncio.to_thread(_from_json, await limited.body(), options, kind, common)
    if media_type == "application/octet-stream" or media_type.startswith("image/"):
        data = await limited.body()
        if not data:
            raise RequestError(400, "the request has no body; send the content of an image file")
        return [ImageQuery(data, common)], kind
    raise RequestError(415, f"content type '{media_type}' is not taken; send {TAKEN}")


def _check_length(request: Request, most: int) -> None:
    """Refuse by its header a request that is too long, before it is read."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_long(most)


def _too_long(most: int) -> RequestError:
    return RequestError(413, f"the request has more than {most} bytes, the limit; send fewer or smaller images")


class _Limited:
    """A request whose body ends in an error where it goes beyond a limit, also one that does not tell its length."""

    def __init__(self, request: Request, most: int) -> None:
        self._receive, self._most, self._count = request.receive, most, 0
        self.request = Request(request.scope, self._take)

    async def _take(self) -> Message:
        message = await self._receive()
        self._count += len(message.get("body", b""))
        if self._count > self._most:
            raise _too_long(self._most)
        return message


async def _from_form(
    request: Request, options: ServeOptions, kind: MapKind, common: str | None
) -> tuple[list[ImageQuery], MapKind]:
    try:
        form = await request.form(max_files=options.max_images, max_fields=options.max_images + 8)
    except HTTPException as error:  # too many files or fields, or no form at all
        code = 413 if "Too many" in str(error.detail) else 400
        raise RequestError(code, f"the form cannot be read: {error.detail} (--max_images)") from error
    try:
        if unknown := sorted(set(form) - {"image", "category", "map"}):
            raise RequestError(422, f"the form has a field '{unknown[0][:40]}'; its fields are image, category and map")
        files = [value for value in form.getlist("image") if isinstance(value, UploadFile)]
        if not files or len(files) < len(form.getlist("image")):
            raise RequestError(422, "the form has no file in its field 'image'")
        categories = _spread([_text("category", value) for value in form.getlist("category")], len(files), common)
        if "map" in form:
            kind = _map_kind(form["map"])
        return [
            ImageQuery(
                await file.read() or ImageError("missing", "the image is empty"),
                category,
                _text("filename", file.filename),
            )
            for file, category in zip(files, categories, strict=True)
        ], kind
    finally:
        await form.close()


def _spread(texts: Sequence[str | None], count: int, common: str | None) -> list[str | None]:
    """Return a category for each image: its own, or the one of all."""
    if len(texts) == count:
        return [text or common for text in texts]
    if len(texts) > 1:
        raise RequestError(422, f"{len(texts)} categories for {count} images; give one, or one for each")
    return [(texts[0] if texts else None) or common] * count


def _from_json(
    body: bytes, options: ServeOptions, kind: MapKind, common: str | None
) -> tuple[list[ImageQuery], MapKind]:
    try:
        asked = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        code = 400 if first["type"] == "json_invalid" else 422
        raise RequestError(code, f"{place + ': ' if place else ''}{first['msg']}") from error
    common = _text("category", asked.category) or common
    kind = asked.map or kind
    if asked.images is None:
        return [ImageQuery(_decoded(asked.image or ""), common, _text("name", asked.name))], kind
    if not asked.images:
        raise RequestError(422, "images is empty; give at least one")
    if len(asked.images) > options.max_images:
        raise RequestError(
            413, f"{len(asked.images)} images; the limit of a request is {options.max_images} (--max_images)"
        )
    return [
        ImageQuery(_decoded(one.image), _text("category", one.category) or common, _text("name", one.name))
        for one in asked.images
    ], kind


def _decoded(text: str) -> bytes | ImageError:
    """Return an image file from base64, with or without the beginning of a data URI."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        return ImageError("corrupt", f"its text is not base64 ({error})")
    return data or ImageError("missing", "the image is empty")


def _map_kind(value: Any) -> MapKind:
    if value not in get_args(MapKind):
        shown = json.dumps(str(value)[:40])
        raise RequestError(422, f"map is {shown}; it is one of {', '.join(get_args(MapKind))}")
    return cast(MapKind, value)


def _text(name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise RequestError(422, f"{name} is no text of at most {LONGEST_TEXT} characters")
    return value
