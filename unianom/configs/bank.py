"""Options that every memory bank has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from unianom.data.image import MAX_SIDE
from unianom.memory.index import DEFAULT_NPROBE
from unianom.options import AtLeastOne, AtLeastZero, Options, PositiveShare, ValueRefused

BlurSigma = Annotated[float, Interval(ge=0, le=MAX_SIDE)]
"""Standard deviation of a Gaussian blur of an anomaly map, in pixels."""


@dataclass(frozen=True)
class BankConfig(Options):
    """How normal patches become a memory bank.

    Args:
        coreset_ratio: share of the patches that is kept; chosen by approximate greedy k-centre, 1 keeps all.
        projection: dimension of the random projection in which the coreset is chosen; 0 for none.
        start_points: random patches whose mean distance starts the greedy choice.
        seed: of projection and start points.
        index: "flat" searches every vector; "ivf_flat" only `nprobe` of `nlist` k-means lists (exact distances).
        nlist: lists of "ivf_flat"; null takes about the square root of the bank's rows.
        nprobe: how many of them are searched.
        shards: parts of the bank; the search result does not depend on it.
    """

    usual = ("coreset_ratio",)

    coreset_ratio: PositiveShare = 0.1
    projection: AtLeastZero = 128
    start_points: AtLeastOne = 10
    seed: int = 0
    index: Literal["flat", "ivf_flat"] = "flat"
    nlist: AtLeastOne | None = None
    nprobe: AtLeastOne = DEFAULT_NPROBE
    shards: AtLeastOne = 1

    def check(self) -> None:
        if self.nlist is not None and self.nlist < self.nprobe:
            raise ValueRefused(f"nprobe={self.nprobe} must be at most nlist={self.nlist}")
