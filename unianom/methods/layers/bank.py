"""Options that every memory bank has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unianom.errors import OptionError
from unianom.memory.index import DEFAULT_NPROBE


@dataclass(frozen=True)
class BankConfig:
    """How normal patches become a memory bank.

    Args:
        coreset_ratio: share of the patches that is kept, chosen by approximate greedy k-centre; 1 keeps all.
        projection: dimension of the random projection in which the coreset is chosen; 0 for none.
        start_points: random patches whose mean distance starts the greedy choice.
        seed: of projection and start points.
        index: "flat" searches every vector; "ivf_flat" only `nprobe` of `nlist` k-means lists (exact distances).
        nlist: lists of "ivf_flat"; null takes about the square root of the bank's rows.
        nprobe: how many of them are searched.
        shards: parts of the bank; the search result does not depend on it.
    """

    coreset_ratio: float = 0.1
    projection: int = 128
    start_points: int = 10
    seed: int = 0
    index: Literal["flat", "ivf_flat"] = "flat"
    nlist: int | None = None
    nprobe: int = DEFAULT_NPROBE
    shards: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.coreset_ratio <= 1:
            raise OptionError(f"bank.coreset_ratio={self.coreset_ratio} must be in (0, 1]")
        if self.projection < 0 or self.start_points < 1 or self.shards < 1:
            raise OptionError("bank: projection must be >= 0, start_points and shards >= 1")
        if self.nprobe < 1 or (self.nlist is not None and self.nlist < self.nprobe):
            raise OptionError(f"bank: need 1 <= nprobe <= nlist, got nprobe={self.nprobe} and nlist={self.nlist}")
