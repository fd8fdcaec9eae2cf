"""Histograms of single anomaly maps, from which pixel metrics of resampled images are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipelines.evaluation.labelled_images import Group
from unianom.metrics.bootstrap import chunks
from unianom.metrics.region import SplitMap
from unianom.metrics.streaming import ANOMALOUS, NORMAL_BESIDE, NORMAL_ELSEWHERE, WEIGHT, map_table

RESAMPLING_BITS = 16
"""Bits of a score that name its bin where images are resampled: 128 bins for every doubling of the score."""


@dataclass(frozen=True, eq=False)
class Histograms:
    """Histograms of the maps of a group, for resampling.

    Attributes:
        sample_ids: of the maps, in their order.
        lengths: how many bins each map has.
        bins: (k,) of all maps one after the other.
        counts: (k, 3) normal pixels, anomalous pixels, weight of these.
    """

    sample_ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bins: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def resample(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return histograms of resamples of the maps.

        Args:
            drawn: (resamples, n) how often each map is in each.

        Returns:
            The bins that hold a pixel, (k,) ascending, and the three counts in each of them, (3, resamples, k)
            float64. All are sums of whole numbers below 2**53 for the pixels, so no order of adding shows.
        """
        held, place = np.unique(np.concatenate(self.bins), return_inverse=True)
        counts = np.concatenate(self.counts).astype(np.float64)
        counts[:, 2] /= 1 << 16  # keeps sums of weights below 2**53 as well
        counts[:, 2] = np.rint(counts[:, 2])
        ends = np.cumsum(self.lengths)
        sums = np.zeros((3, len(drawn), len(held)))
        for maps in chunks(len(self.lengths), len(held)):
            first = int(ends[maps[0]]) - self.lengths[maps[0]]
            rows = slice(first, int(ends[maps[-1]]))
            map_of_row = np.repeat(np.arange(len(maps)), self.lengths[maps[0] : maps[-1] + 1])
            weights = drawn[:, maps[0] : maps[-1] + 1].astype(np.float64)
            for column in range(3):
                dense = np.zeros((len(maps), len(held)))
                dense[map_of_row, place[rows]] = counts[rows, column]
                sums[column] += weights @ dense
        return held, sums


def histogram_of(split: SplitMap) -> tuple[np.ndarray, np.ndarray]:
    """Return the bins of one map and the counts in them, see `unianom.metrics.streaming.map_table`."""
    return map_table(split, RESAMPLING_BITS)


def histogram_arrays(histograms: Sequence[tuple[np.ndarray, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """Return the arrays that a part's file holds of the histograms of its maps, one after the other."""
    bins = np.concatenate([bins for bins, _ in histograms]) if histograms else np.empty(0)
    counts = np.concatenate([counts for _, counts in histograms]) if histograms else np.empty((0, 4), np.int64)
    return {
        f"{kind}/lengths": np.array([len(bins) for bins, _ in histograms], np.int64),
        f"{kind}/bins": bins.astype(np.uint32),
        f"{kind}/pixels": np.stack(
            [counts[:, NORMAL_BESIDE] + counts[:, NORMAL_ELSEWHERE], counts[:, ANOMALOUS]], axis=1
        ).astype(np.uint32),
        f"{kind}/weight": counts[:, WEIGHT],
    }


def add_histograms(
    histograms: dict[Group, Histograms],
    arrays: dict[str, np.ndarray],
    kind: str,
    identities: list[tuple[str, Group]],
) -> None:
    """Add the histograms of a part's file to those of their groups; `identities` are name and group of its maps."""
    lengths = arrays[f"{kind}/lengths"]
    counts = np.column_stack([arrays[f"{kind}/pixels"].astype(np.int64), arrays[f"{kind}/weight"]])
    ends = np.cumsum(lengths)
    for (sample_id, group), length, end in zip(identities, lengths.tolist(), ends.tolist(), strict=True):
        of_group = histograms.setdefault(group, Histograms())
        of_group.sample_ids.append(sample_id)
        of_group.lengths.append(length)
        of_group.bins.append(arrays[f"{kind}/bins"][end - length : end])
        of_group.counts.append(counts[end - length : end])
