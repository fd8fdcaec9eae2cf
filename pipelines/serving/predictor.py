"""A loaded model as a server uses it: encoded images in, scores and decisions out. Knows neither HTTP nor Ray.

Files are decoded as batch scoring decodes them, and predicted by what it predicts by, so the same images in the same
batch get the same bits.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.inference.range_scorer import predict_batch
from pipelines.runtime.models import load_model
from pipelines.serving.events import log_event
from pipelines.serving.heat_maps import MapKind, brightness
from pipelines.serving.serve_options import ServeOptions
from unianom.data.device_feed import DeviceFeed
from unianom.data.image import ImageLimits, decode_prepared
from unianom.encoder_engine import openvino_is_installed
from unianom.errors import EngineError, ImageError
from unianom.execution import Execution
from unianom.methods.trained import TrainedMethod
from unianom.model import Model
from unianom.visual import heat_colours


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as input of a network.

    Attributes:
        pixels: S×S×3 uint8.
        category: that its thresholds are of; None if it is not known.
        map: which picture of its anomaly map is wanted.
    """

    pixels: np.ndarray
    category: str | None = None
    map: MapKind = "none"


@dataclass(frozen=True)
class AppliedThreshold:
    """The threshold that an image is judged by.

    Attributes:
        scale: "raw" or "calibrated": which score is compared with it.
        fail_above: scores above fail.
        review_above: scores above, that do not fail, come to review; equal to `fail_above` where none does.
        category: whose threshold it is; None if it is that of all categories together.
        spread: standard deviation of normal scores; None if it is not known.
    """

    scale: str
    fail_above: float
    review_above: float
    category: str | None
    spread: float | None


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """What a model says of one image.

    Attributes:
        score: raw image score, a float32.
        calibrated_score: None if the model has no calibrator.
        decision: "pass", "review" or "fail"; None if the model has no threshold for the image.
        threshold: what decided; None as there.
        anomaly_map: S×S float32, raw; None where none was wanted.
    """

    score: float
    calibrated_score: float | None
    decision: str | None
    threshold: AppliedThreshold | None
    anomaly_map: np.ndarray | None

    @property
    def brightness(self) -> float | None:
        """Return how bright its map is drawn; None where that cannot be told from a threshold."""
        found = self.threshold
        judged = self.score if found is None or found.scale == "raw" else self.calibrated_score
        if found is None or judged is None or not found.spread:
            return None
        return brightness(judged, found.fail_above, found.spread)


_gpu_turn = threading.Lock()
"""Held by what predicts on a GPU. A model that is to take over does so once, from a thread of its own, and it is a
setting of the process that parts of a method compute in full float32."""


class Predictor:
    """A model, ready to score.

    Args:
        model: loaded.
        name: how it was asked for.
        version: as its source tells it.
        batch_size: images that `predict` takes at most.
        limits: what an image may cost; `seconds` is for the caller to see to.

    Attributes:
        digest: of the model; names exactly this one.
    """

    def __init__(self, model: Model, name: str, version: str, batch_size: int, limits: ImageLimits) -> None:
        self.model, self.name, self.version, self.digest = model, name, version, model.digest
        self._batch_size, self._limits = batch_size, limits
        self._feed = DeviceFeed(model.method.device, model.method.input, batch_size)
        self._thresholds: dict[str | None, AppliedThreshold | None] = {}
        self._turn = _gpu_turn if model.method.device.type == "cuda" else nullcontext()
        self.files: tempfile.TemporaryDirectory[str] | None = None  # where it was loaded from, as long as it is in use

    def decode(self, data: bytes) -> np.ndarray:
        """Return the S×S×3 uint8 input of an encoded image.

        Raises:
            ImageError: it is too large or cannot be read.
        """
        return decode_prepared(data, self.model.method.input, self._limits)

    def check_category(self, category: str | None) -> None:
        """Raise ImageError "unsupported" for an image of a category by which the model cannot calibrate."""
        calibrator = self.model.calibrator
        if calibrator is not None and calibrator.config.variant == "labels" and category not in calibrator.categories:
            named = "no category was given" if category is None else f"category '{category}' is unknown"
            raise ImageError(
                "unsupported",
                f"{named}, and this model calibrates by category; give one of {', '.join(calibrator.categories)}",
            )

    def predict(self, images: Sequence[PreparedImage]) -> list[ScoredImage | ImageError]:
        """Score images, at most `batch_size`, in one forward pass; ImageError "unsupported" for one without a score.

        Raises:
            Exception: whatever the network or its device raises; of no single image.
        """
        with self._turn, torch.inference_mode():
            return self._predict(images)

    def _predict(self, images: Sequence[PreparedImage]) -> list[ScoredImage | ImageError]:
        (batch,) = self._feed.batches(np.stack([image.pixels for image in images]))
        names = [image.category or "" for image in images]
        scored, calibration, _ = predict_batch(self.model, batch, names, "none")
        stacked = torch.stack([scored.score.float(), *(part.float() for part in calibration or ())])
        values = self._feed.fetch(stacked).numpy()  # 1×B, or 4×B
        finite = np.flatnonzero(np.isfinite(values).all(axis=0))
        common = values[3] if len(values) == 4 else None
        decisions = np.full(len(images), None, object)
        decisions[finite] = self.model.decide_each(
            values[0][finite],
            None if common is None else common[finite],
            [images[row].category for row in finite.tolist()],
        )
        wanted = [row for row in finite.tolist() if images[row].map != "none"]
        maps: dict[int, np.ndarray] = {}
        if wanted:
            chosen = scored.predict_rows(torch.tensor(wanted, device=batch.device)).anomaly_map
            maps = dict(zip(wanted, self._feed.fetch(chosen.float()).numpy(), strict=True))
        known = set(finite.tolist())
        return [
            ScoredImage(
                float(values[0][row]),
                None if common is None else float(common[row]),
                decisions[row],
                self.threshold(image.category),
                maps.get(row),
            )
            if row in known
            else ImageError(
                "unsupported", "the model gives it no finite score; check the model's weights and precision"
            )
            for row, image in enumerate(images)
        ]

    def threshold(self, category: str | None) -> AppliedThreshold | None:
        """Return the threshold that judges images of a category, or of an unknown one (None); None if there is none."""
        known = category if category in self._categories else None  # few, whatever names requests come up with
        if known not in self._thresholds:
            self._thresholds[known] = self._find_threshold(known)
        return self._thresholds[known]

    def warm_up(self) -> None:
        """Predict drawn images once alone and once in a full batch, so that the first requests need not wait for what
        libraries prepare at their first call.

        Raises:
            Exception: whatever the network or its device raises: a model that cannot predict is not put to use.
        """
        side = self.model.method.input.side
        pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        calibrator = self.model.calibrator
        category = None if calibrator is None or not calibrator.categories else calibrator.categories[0]
        for size in sorted({1, self._batch_size}):
            self.predict([PreparedImage(pixels, category, "raw")] * size)
        heat_colours()  # of Matplotlib, which takes a second to import

    def description(self) -> dict[str, Any]:
        """Return what there is to know of the model, as plain data."""
        method = self.model.method
        named = {name: self.threshold(name) for name in sorted(self._categories)}
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "method": method.name,
            "input_side": method.input.side,
            "device": str(method.device),
            "engine": method.execution.engine,
            "categories": self.model.categories,
            "calibrated": self.model.calibrator is not None,
            "threshold": threshold_fields(self.threshold(None)),
            "category_thresholds": {
                name: threshold_fields(own) for name, own in named.items() if own is not None and own.category == name
            },
        }

    @property
    def _categories(self) -> set[str]:
        """Categories that have thresholds of their own."""
        rule = self.model.decision_rule
        return set(self.model.category_thresholds if rule is None else rule.categories)

    def _find_threshold(self, category: str | None) -> AppliedThreshold | None:
        rule = self.model.decision_rule
        if rule is not None:
            if not rule.knows(category):
                return None
            bands = rule.bands(category)
            own = category if category in rule.categories else None
            return AppliedThreshold(rule.kind, bands.fail.value, bands.review.value, own, bands.spread)
        threshold = self.model.threshold if category is None else self.model.category_thresholds[category]
        if threshold is None:
            return None
        scores = self.model.normal_scores
        normal = scores.get(category, []) if category is not None else [one for own in scores.values() for one in own]
        spread = float(np.std(normal)) if normal else None
        return AppliedThreshold("raw", threshold.value, threshold.value, category, spread)


def threshold_fields(threshold: AppliedThreshold | None) -> dict[str, Any] | None:
    """Return what an answer says of a threshold, as plain data."""
    if threshold is None:
        return None
    return {
        "scale": threshold.scale,
        "fail_above": threshold.fail_above,
        "review_above": threshold.review_above,
        "category": threshold.category,
    }


def load_predictor(folder: str, name: str, version: str, options: ServeOptions, device: str) -> Predictor:
    """Load a model folder and predict with it once.

    Args:
        folder: path or URI.
        name, version: as of `Predictor`.
        options: of the server.
        device: that its network runs on.

    Raises:
        ModelError, OptionError: as `unianom.load`; also whatever its first predictions raise.
    """
    model = _load(folder, options, device)
    if options.fold_batch_norm and isinstance(model.method, TrainedMethod):
        model.fold()
    predictor = Predictor(model, name, version, options.max_batch_size, options.limits)
    predictor.warm_up()
    return predictor


def _load(folder: str, options: ServeOptions, device: str) -> Model:
    if options.engine != "auto":
        return load_model(folder, Execution(device, options.engine, options.search))
    if device == "cpu" and openvino_is_installed():
        try:
            return load_model(folder, Execution(device, "openvino", options.search))
        except EngineError as error:
            log_event("pytorch runs the encoder", reason=str(error))
    return load_model(folder, Execution(device, "pytorch", options.search))


def predict_each(
    items: Sequence[tuple[Predictor, PreparedImage]],
) -> list[ScoredImage | ImageError | Exception]:
    """Score images that may be of several predictors, as while a model is replaced; each predictor's in one batch.

    Returns:
        For each what `Predictor.predict` says of it. Where a batch fails, its images are tried one by one, so that one
        which the network cannot stand takes no other with it; its own error is returned.
    """
    results: dict[int, Any] = {}
    for predictor in dict.fromkeys(predictor for predictor, _ in items):
        rows = [row for row, (own, _) in enumerate(items) if own is predictor]
        images = [items[row][1] for row in rows]
        found: Sequence[Any] | Exception = _predicted(predictor, images)
        if isinstance(found, Exception):
            one_by_one = [_predicted(predictor, [image]) for image in images] if len(rows) > 1 else [found]
            found = [one if isinstance(one, Exception) else one[0] for one in one_by_one]
        results |= dict(zip(rows, found, strict=True))
    return [results[row] for row in range(len(items))]


def _predicted(predictor: Predictor, images: Sequence[PreparedImage]) -> list[ScoredImage | ImageError] | Exception:
    """Return what is said of images, or what was raised; not where it was raised, which holds the memory of the device
    that the batch took."""
    try:
        return predictor.predict(images)
    except Exception as error:
        return error.with_traceback(None)
