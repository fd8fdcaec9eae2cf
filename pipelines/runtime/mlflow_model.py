"""The script that MLflow keeps beside a logged model and runs to load it (a "model from code", so no pickle).

It may import `unianom`, which travels with the model, and nothing else of this project.
"""

import base64
import binascii
from typing import Any

import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

import unianom
from unianom.data.image import decode_prepared, encode_map
from unianom.errors import ImageError
from unianom.model import ImageResult


class UnianomPyfunc(PythonModel):
    """A unianom model folder as an MLflow model."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder; the network runs on the GPU if this process sees one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = unianom.load(context.artifacts["model"], device)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Score images.

        Args:
            context: as MLflow gives it; not used.
            model_input: a column `image` of encoded image files, as bytes or base64 text; by a column `category`, where
                given, images are judged by the thresholds of single categories. A model whose calibrator goes by
                category needs it.
            params: {"maps": True} adds the anomaly maps.

        Returns:
            For each row, under its index: `score`; `decision`, "pass", "review" or "fail", null if the model has
            neither threshold nor rule; `status`, "ok" or why there is no score ("corrupt", "too_large", "missing"), and
            then `error`, the same in a sentence; `calibrated_score`, if the model has a calibrator; with maps also
            `anomaly_map`, a 16-bit grey PNG at the model's input resolution of which a pixel v stands for
            `map_offset + map_scale * v`. An image without a score has nulls elsewhere.
        """
        rows = list(model_input.index)
        images = [_to_bytes(image) for image in model_input["image"]]
        categories = list(model_input["category"]) if "category" in model_input else None
        results = self._predict(images, categories)
        scored = [None if isinstance(result, ImageError) else result for result in results]
        errors = [result if isinstance(result, ImageError) else None for result in results]
        columns: dict[str, Any] = {
            "score": _numbers([r and r.score for r in scored], rows),
            "decision": pd.Series([r and r.decision for r in scored], rows, dtype=object),
            "status": pd.Series(["ok" if error is None else error.status for error in errors], rows, dtype=object),
            "error": pd.Series([None if error is None else str(error) for error in errors], rows, dtype=object),
        }
        if self.model.calibrator is not None:
            columns["calibrated_score"] = _numbers([r and r.calibrated_score for r in scored], rows)
        if params and params.get("maps"):
            packed = [(None, None, None) if result is None else encode_map(result.anomaly_map) for result in scored]
            columns["anomaly_map"] = pd.Series([png for png, _, _ in packed], rows, dtype=object)
            columns["map_offset"] = _numbers([offset for _, offset, _ in packed], rows)
            columns["map_scale"] = _numbers([scale for _, _, scale in packed], rows)
        return pd.DataFrame(columns)

    def _predict(
        self, images: list[bytes | ImageError], categories: list[str] | None
    ) -> list[ImageResult | ImageError]:
        """Return for each image what the model says of it, or why it cannot be read."""
        results: dict[int, ImageResult | ImageError] = {}
        good: dict[int, bytes] = {}
        for row, image in enumerate(images):
            if isinstance(image, ImageError):
                results[row] = image
            else:
                good[row] = image

        def predict() -> list[ImageResult]:
            own = None if categories is None else [categories[row] for row in good]
            return self.model.predict(list(good.values()), categories=own)

        try:
            found = predict()
        except ImageError:  # rare, so only then each image is looked at by itself
            for row, image in list(good.items()):
                try:
                    decode_prepared(image, self.model.method.input)
                except ImageError as error:
                    results[row] = error
                    del good[row]
            found = predict()
        results.update(zip(good, found, strict=True))
        return [results[row] for row in range(len(images))]


def _numbers(values: list[Any], rows: list[Any]) -> pd.Series:
    """Return a column of floats, in which a null stays one: as NaN, MLflow's server would write what is no JSON."""
    return pd.Series(values, rows, dtype=object if None in values else float)


def _to_bytes(image: Any) -> bytes | ImageError:
    """Return an encoded image, as it came or from base64: MLflow decodes base64 in JSON requests, but not in data
    frames."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str):
        try:
            return base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            return ImageError("corrupt", f"the text in column 'image' is not base64 ({error})")
    return ImageError("missing", f"column 'image' holds {type(image).__name__}; give encoded bytes or base64 text")


set_model(UnianomPyfunc())
