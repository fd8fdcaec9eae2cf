"""A method whose network waits instead of computing, which stands for a device of a known rate in a real scoring.

It is no method of the package: it is known where `register` was called, as `OWN_METHODS` has it done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from unianom.configs.backbone import BackboneConfig
from unianom.data.image import InputPolicy
from unianom.methods.base import METHODS, Method, Prediction, RawOutputs, ScoredImages, register_method
from unianom.options import Options

STEP = 32
"""Pixels between two cells of the map."""


@dataclass(frozen=True)
class WaitingConfig(Options):
    """A network that waits.

    Args:
        images_per_second: that the device it stands for would compute.
        log: folder for a file of each process, with the seconds since the epoch at which every batch began and ended.
        input: how images become its input.
        backbone: of no effect.
    """

    images_per_second: float = 100.0
    log: str = ""
    input: InputPolicy = field(
        default_factory=lambda: InputPolicy(resize="stretch", size=224, crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    )
    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig("none", weights="random"))


class SimulatedDevice:
    """Waits as long as a device would compute, without a CPU.

    Args:
        rate: images per second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = 0.0  # when the device has done all that it was given

    def compute(self, images: int, asked: float) -> None:
        """Wait until so many images are done, which were there at a time (`time.monotonic`)."""
        # one that was waited for begins where the last one ended, so that what sleep adds does not add up
        self._free = max(asked, self._free) + images / self._rate
        time.sleep(max(0.0, self._free - time.monotonic()))


class WaitingMethod(Method[WaitingConfig]):
    """A network that waits. The score is the first pixel's red; the map has cells of 32 × 32 pixels.

    The embedding of the images is their score, 1×1×1.
    """

    Config = WaitingConfig

    def __init__(self, config: WaitingConfig) -> None:
        super().__init__()
        self.config = config
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)
        self._device = SimulatedDevice(config.images_per_second)
        self._log = Path(config.log) / f"{os.getpid()}.txt" if config.log else None

    def forward(self, images: Tensor) -> RawOutputs:
        """Wait, then return red of one pixel in 32 × 32, "cells" B×h×w."""
        began, asked = time.time(), time.monotonic()
        self._device.compute(len(images), asked)
        if self._log is not None:
            with self._log.open("a") as handle:
                handle.write(f"{began} {time.time()}\n")
        return RawOutputs({"cells": images[:, 0, ::STEP, ::STEP].clone()}, images[:, :1, :1, :1].clone())

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: WaitingConfig | None = None) -> tuple[Tensor, Tensor]:
        """Return the cells in their places, twice."""
        side = self.input.side
        whole = tensors["cells"].repeat_interleave(STEP, 1).repeat_interleave(STEP, 2)[:, :side, :side].contiguous()
        return whole, whole

    def image_scores(
        self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: WaitingConfig | None = None
    ) -> Tensor:
        """Return the first cell of each image."""
        return tensors["cells"][:, 0, 0]

    @torch.inference_mode()
    def score_images(self, images: Tensor) -> ScoredImages:
        """Score images; maps are made of those that are asked for."""
        # they are not checked: a device would do that itself, in the time it takes
        found = self.forward(images)
        cells = found.tensors["cells"]

        def predict_rows(rows: Tensor) -> Prediction:
            return self.postprocess(RawOutputs({"cells": cells[rows]}, found.embedding[rows]))

        return ScoredImages(cells[:, 0, 0], found.embedding, predict_rows)


def register() -> None:
    """Make the method known in this process, as "waiting"."""
    if "waiting" not in METHODS:
        register_method("waiting")(WaitingMethod)
