"""Options that every memory bank has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unianom.errors import OptionError


@dataclass(frozen=True)
class BankConfig:
    """How normal patches become a memory bank.

    Args:
        coreset_ratio: share of the patches that is kept, chosen by approximate greedy k-centre; 1 keeps all.
        projection: dimension of the random projection in which the coreset is chosen; 0 for none.
        start_points: random patches whose mean distance starts the greedy choice.
        seed: of projection and start points.
        index: "flat" searches every vector; "ivf_flat" only `probes` of `lists` cells (exact distances).
        lists, probes: cells of "ivf_flat", and how many are searched.
        shards: parts of the bank; the search result does not depend on it.
    """

    coreset_ratio: float = 0.1
    projection: int = 128
    start_points: int = 10
    seed: int = 0
    index: Literal["flat", "ivf_flat"] = "flat"
    lists: int = 256
    probes: int = 8
    shards: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.coreset_ratio <= 1:
            raise OptionError(f"bank.coreset_ratio={self.coreset_ratio} must be in (0, 1]")
        if self.projection < 0 or self.start_points < 1 or self.shards < 1:
            raise OptionError("bank: projection must be >= 0, start_points and shards >= 1")
        if self.index == "ivf_flat" and not 1 <= self.probes <= self.lists:
            raise OptionError(f"bank: need 1 <= probes <= lists, got {self.probes} and {self.lists}")
