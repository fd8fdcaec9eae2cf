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
from unianom.data.image import decode_image, encode_map
from unianom.errors import ImageError


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
            neither threshold nor rule; `calibrated_score`, if it has a calibrator; with maps also `anomaly_map`, a
            16-bit grey PNG at the model's input resolution of which a pixel v stands for `map_offset + map_scale * v`.

        Raises:
            ImageError: an image cannot be used; names the row.
        """
        rows = list(model_input.index)
        images = [_to_bytes(image, row) for image, row in zip(model_input["image"], rows, strict=True)]
        categories = list(model_input["category"]) if "category" in model_input else None
        try:
            results = self.model.predict(images, categories=categories)
        except ImageError as error:
            raise _name_row(error, images, rows) from error
        columns: dict[str, Any] = {
            "score": pd.Series([result.score for result in results], rows, dtype=float),
            "decision": pd.Series([result.decision for result in results], rows, dtype=object),
        }
        if self.model.calibrator is not None:
            columns["calibrated_score"] = pd.Series([r.calibrated_score for r in results], rows, dtype=float)
        if params and params.get("maps"):
            packed = [encode_map(result.anomaly_map) for result in results]
            columns["anomaly_map"] = pd.Series([png for png, _, _ in packed], rows, dtype=object)
            columns["map_offset"] = pd.Series([offset for _, offset, _ in packed], rows, dtype=float)
            columns["map_scale"] = pd.Series([scale for _, _, scale in packed], rows, dtype=float)
        return pd.DataFrame(columns)


def _to_bytes(image: Any, row: Any) -> bytes:
    """Return an encoded image, as it came or from base64: MLflow decodes base64 in JSON requests, but not in data
    frames."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str):
        try:
            return base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError("corrupt", f"row {row}: the text in column 'image' is not base64 ({error})") from error
    raise ImageError(
        "missing", f"row {row}: column 'image' holds {type(image).__name__}; give encoded bytes or base64 text"
    )


def _name_row(error: ImageError, images: list[bytes], rows: list[Any]) -> ImageError:
    """Return the same error with the row it is about, found by decoding the images one by one."""
    for image, row in zip(images, rows, strict=True):
        try:
            decode_image(image)
        except ImageError as found:
            return ImageError(found.status, f"row {row}: {found}")
    return error


set_model(UnianomPyfunc())
