"""What requests and answers hold, as the OpenAPI page tells it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.serving.heat_maps import MapKind


class ImageRequest(BaseModel):
    """An image of a JSON request."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="The image file (PNG, JPEG, BMP, TIFF or WebP) in base64.")
    category: str | None = Field(None, description="Its category, where thresholds or calibration go by category.")
    name: str | None = Field(None, description="A name that its answer has, too.")


class ScoreRequest(BaseModel):
    """A JSON request: either `image`, with its `category` and `name`, or `images`."""

    model_config = ConfigDict(extra="forbid")

    image: str | None = Field(None, description="One image file in base64.")
    category: str | None = Field(None, description="Of that image; with `images`, of those that name none.")
    name: str | None = Field(None, description="Of that image.")
    images: list[ImageRequest] | None = Field(None, description="Several images.")
    map: MapKind | None = Field(None, description="Which picture of each anomaly map is wanted; else as in the query.")

    @model_validator(mode="after")
    def _one_of_both(self) -> ScoreRequest:
        if (self.image is None) == (self.images is None):
            raise ValueError("give either image or images")
        return self


class ThresholdAnswer(BaseModel):
    """The threshold that an image was judged by."""

    scale: Literal["raw", "calibrated"] = Field(description="Which score is compared with it.")
    fail_above: float = Field(description="Scores above fail.")
    review_above: float = Field(description="Scores above it that do not fail come to review; others pass.")
    category: str | None = Field(description="Whose threshold it is; null for that of all categories together.")


class MapAnswer(BaseModel):
    """A picture of an anomaly map."""

    kind: Literal["overlay", "heat", "raw"]
    png: str = Field(description="PNG in base64, as high and wide as the network's input.")
    offset: float | None = Field(None, description="Of a raw map, 16-bit grey: value = offset + scale · pixel.")
    scale: float | None = Field(None, description="See offset.")


class ImageAnswer(BaseModel):
    """What became of one image."""

    name: str | None
    category: str | None
    model: str = Field(description="Digest of the model; names exactly this one.")
    status: Literal["ok", "corrupt", "too_large", "missing", "unsupported", "timeout", "failed"] = Field(
        description="ok, or why there is no score: corrupt, too_large, missing (no content), unsupported (a kind or "
        "category that the model cannot judge), timeout (in decoding), or failed (a fault of the server)."
    )
    error: str | None = Field(description="The same in a sentence.")
    score: float | None = Field(
        description="Raw image score, higher is more anomalous; equal to that of batch scoring."
    )
    calibrated_score: float | None = Field(description="On a scale that all categories share; null without calibrator.")
    decision: Literal["pass", "review", "fail"] | None = Field(description="null if the model has no threshold for it.")
    threshold: ThresholdAnswer | None
    map: MapAnswer | None


class ScoreAnswer(BaseModel):
    """One answer for each image, in the order in which they came."""

    request_id: str
    results: list[ImageAnswer]


class ErrorAnswer(BaseModel):
    """Why a request was refused as a whole."""

    request_id: str
    error: str


class ModelAnswer(BaseModel):
    """The model in use."""

    name: str
    version: str
    digest: str
    method: str
    input_side: int
    device: str
    engine: str
    categories: list[str]
    calibrated: bool
    threshold: ThresholdAnswer | None
    category_thresholds: dict[str, ThresholdAnswer]


_MAP_PARAMETER: dict[str, Any] = {
    "name": "map",
    "in": "query",
    "description": "Which picture of each anomaly map is wanted: none, the heat map over the image (overlay), alone "
    "(heat), or the values themselves (raw, a 16-bit grey PNG).",
    "schema": {"type": "string", "enum": ["none", "overlay", "heat", "raw"], "default": "none"},
}
_CATEGORY_PARAMETER: dict[str, Any] = {
    "name": "category",
    "in": "query",
    "description": "Category of all images that name none themselves.",
    "schema": {"type": "string"},
}


def _json_schema() -> dict[str, Any]:
    """Return the schema of `ScoreRequest`, whole, since OpenAPI has no place for definitions within a body."""
    schema = ScoreRequest.model_json_schema()
    schema.pop("$defs")
    schema["properties"]["images"]["anyOf"][0]["items"] = ImageRequest.model_json_schema()
    return schema


def _body(several: bool) -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    images = {"type": "array", "items": file} if several else file
    form = {"type": "object", "required": ["image"], "properties": {"image": images, "category": {"type": "string"}}}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form},
            "application/json": {"schema": _json_schema()},
            "application/octet-stream": {"schema": file},
            "image/*": {"schema": file},
        },
    }


SCORE_DOCS = {"requestBody": _body(several=True), "parameters": [_MAP_PARAMETER, _CATEGORY_PARAMETER]}
HEAT_MAP_DOCS = {
    "requestBody": _body(several=False),
    "parameters": [
        {**_MAP_PARAMETER, "schema": {**_MAP_PARAMETER["schema"], "enum": ["overlay", "heat"], "default": "overlay"}},
        _CATEGORY_PARAMETER,
    ],
}
"""What OpenAPI says of bodies and queries that are read by hand, within limits."""
