"""Options of jobs/export.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from unianom.data.image import ImageLimits
from unianom.options import AtLeastOne, Options, Positive

Precision = Literal["fp32", "fp16", "int8"]
"""What the weights of an exported network are stored in."""

BOUNDS: dict[Precision, tuple[float, float]] = {"fp32": (1e-3, 1e-3), "fp16": (0.02, 0.05), "int8": (0.2, 0.3)}
"""Largest error of scores and of maps that a graph may have, unless told otherwise."""


@dataclass(frozen=True)
class GateOptions(Options):
    """The images on which an exported graph is compared with the model, and how far it may be off.

    Args:
        images: normal images at most, and as many anomalous ones; an even share of every category, at least one each.
        score_bound: largest difference of an image score, as a share of the score or, where that is more, of the median
            score of these images; null takes 0.001 for fp32, 0.02 for fp16, 0.2 for int8.
        map_bound: largest difference of a pixel of a map, as a share of the map's largest value or, where that is more,
            of the median of these; null takes 0.001 for fp32, 0.05 for fp16, 0.3 for int8.
        calibration_images: normal images by which int8 chooses the ranges of its values.
        seed: of the choice of images, and of synthetic anomalies.
    """

    usual = ("images", "score_bound", "map_bound")

    images: AtLeastOne = 24
    score_bound: Positive | None = None
    map_bound: Positive | None = None
    calibration_images: AtLeastOne = 64
    seed: int = 0

    def bounds(self, precision: Precision) -> tuple[float, float]:
        """Return the largest errors of scores and of maps."""
        score, anomaly_map = BOUNDS[precision]
        return self.score_bound or score, self.map_bound or anomaly_map


@dataclass(frozen=True)
class ExportOptions(Options):
    """Write a model as an ONNX file that runs without PyTorch and without unianom.

    Args:
        model: model folder; path or URI.
        shards: shard set with normal images of the model's categories, on which the file is compared with the model;
            path or URI.
        output: folder to write; path or URI.
        precision: what the network is stored and computed in, fp16 at half the size, int8 at a quarter, for CPUs;
            search, maps and scores stay in float32.
        opset: version of ONNX's operators.
        max_bank_mb: megabytes that a memory bank may take in the file.
        batch_size: images in one forward pass, of the comparison; the file takes any number.
        overwrite: replace what another export left in the output.
        limits: what an image may cost.
        gate: on what images, and within what bounds, the file has to agree with the model.
    """

    usual = ("model", "shards", "output", "precision", "max_bank_mb", "overwrite", "gate")

    model: str
    shards: str
    output: str
    precision: Precision = "fp32"
    opset: Annotated[int, Interval(ge=18, le=23)] = 20
    max_bank_mb: AtLeastOne = 512
    batch_size: AtLeastOne = 8
    overwrite: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    gate: GateOptions = field(default_factory=GateOptions)
