"""From the distances of teacher and student to map and score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unianom.errors import OptionError
from unianom.options import Options, Share


def check_side(side: int) -> None:
    """Refuse inputs whose levels the decoder cannot meet, which doubles what encoder and bottleneck halve five times.

    Raises:
        OptionError: the input's side is no multiple of 32.
    """
    if side % 32:
        raise OptionError(f"an input of {side} pixels does not halve five times; set input.size to a multiple of 32")


@dataclass(frozen=True)
class DistanceMapConfig(Options):
    """From the distances of all levels to one anomaly map and an image score.

    Args:
        fuse: "sum" or "mean" of the levels' maps, each upsampled to the input's size.
        blur: of the map: "gaussian" (sigma 4, SciPy's, reflecting border), "box" (a 5×5 kernel of sigma 4, which is
            nearly a box filter; zeros beyond the border) or "none".
        score_share: share of the largest pixels whose mean is the image score; 0 takes the largest, 1 the mean of all.
    """

    fuse: Literal["sum", "mean"] = "sum"
    blur: Literal["gaussian", "box", "none"] = "gaussian"
    score_share: Share = 0.0
