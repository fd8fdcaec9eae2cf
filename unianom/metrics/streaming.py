"""Pixel metrics in bounded memory: scores are counted in fixed bins, and every metric comes with its own error bound.

A bin is the first bits of a float32 whose bits were turned into an order: the sign bit flipped for positive numbers,
all bits for negative ones. So bins need no range known beforehand, depend on nothing but the score, and are even on a
logarithmic scale: with 22 bits a score is known to 1 part in 8192 of itself. What accumulators hold are integers, so
those of any workers merge in any order to the very same state.

Within a bin the order of scores is forgotten. Every metric is given as if they tied, with the least and the most that
any order of them could give, so what the exact metric is (ties included) lies between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unianom.configs.metrics import check_aupro_options
from unianom.errors import DataError, OptionError
from unianom.metrics.curves import (
    Array,
    Curve,
    OperatingPoints,
    auroc,
    average_precision,
    f1_scores,
    pr_curve,
    rising_curve,
    roc_curve,
)
from unianom.metrics.pixel import soft_overlap
from unianom.metrics.region import SplitMap, area_share, split_maps

BITS = 22
"""Of 32 bits of a score, those that name its bin."""

REGION_UNIT = 1 << 32
"""What all pixels of a region weigh together; the weight of a bin is a whole number, off by less than 1."""

NORMAL_BESIDE, NORMAL_ELSEWHERE, ANOMALOUS, WEIGHT = range(4)
"""Columns of a table of counts: normal pixels of maps with an anomalous pixel, those of other maps, anomalous pixels,
and what these weigh in the mean over regions."""

_PENDING_PIXELS = 1 << 19
"""Pixels kept before they are counted: one pass over the bins for several maps."""

_PENDING_ROWS = 1 << 18
"""Rows of tables kept before they are added up."""

_ROUNDING = 1e-12
"""Slack of every bound for sums of floating-point numbers."""


def score_bins(scores: NDArray[np.float32], bits: int = BITS) -> NDArray[np.uint32]:
    """Return the bin of each finite score, rising with it, from 0 to 2**bits − 1; −0 and 0 share one."""
    pattern = (scores + np.float32(0)).view(np.uint32)
    negative = (pattern.view(np.int32) >> 31).view(np.uint32)  # all bits set, or none
    return (pattern ^ (negative | np.uint32(1 << 31))) >> np.uint32(32 - bits)


def bin_edges(bins: Array, bits: int = BITS) -> NDArray[np.float32]:
    """Return the lowest score of each bin, so that score ≥ edge flags the bin and all above it."""
    key = np.asarray(bins).astype(np.uint32) << np.uint32(32 - bits)
    positive = key >> np.uint32(31) == 1
    return np.where(positive, key ^ np.uint32(1 << 31), ~key).astype(np.uint32).view(np.float32)


@dataclass(frozen=True)
class Bounded:
    """A metric and the bounds between which its exact value lies; all NaN where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """The most by which `value` can be off."""
        return max(self.high - self.value, self.value - self.low)


_UNDEFINED = Bounded(float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True)
class BinnedMetrics:
    """Pixel metrics from bins; what each is, and when it is NaN, as in `unianom.metrics.pixel.PixelMetrics`.

    The mean Dice and IoU over maps at a threshold are not among them: they need every map at a threshold that is known
    only when all maps were seen. Soft Dice and soft IoU need none, so they are exact.
    """

    auroc: Bounded
    auroc_anomalous_only: Bounded
    ap: Bounded
    f1_max: Bounded
    f1_threshold: float
    iou_max: Bounded
    soft_dice: float
    soft_iou: float
    aupro: Bounded
    aupro_limit: float
    n_maps: int
    n_anomalous_maps: int
    n_regions: int

    def as_dict(self, soft: bool = False) -> dict[str, float]:
        """Return the numbers under the names tables use, those of `PixelMetrics.as_dict`; "<name>_error" is the most by
        which one can be off."""
        bounded = {
            "pixel_auroc": self.auroc,
            "pixel_auroc_anomalous_only": self.auroc_anomalous_only,
            "pixel_ap": self.ap,
            "pixel_f1_max": self.f1_max,
            "pixel_iou_max": self.iou_max,
            "aupro" if self.aupro_limit == 0.3 else f"aupro_{self.aupro_limit:g}": self.aupro,
        }
        return {
            **{name: metric.value for name, metric in bounded.items()},
            "pixel_f1_threshold": self.f1_threshold,
            **({"soft_dice": self.soft_dice, "soft_iou": self.soft_iou} if soft else {}),
            **{f"{name}_error": metric.error for name, metric in bounded.items()},
            "n_maps": self.n_maps,
            "n_anomalous_maps": self.n_anomalous_maps,
            "n_regions": self.n_regions,
        }


class BinnedPixelAccumulator:
    """Pixel metrics of maps that arrive in batches, on one or many workers, in memory that does not grow with them.

    Accumulators merged in any order, of maps in any batches, give the very same numbers.

    Memory: 40 bytes a bin that holds a score (some 50,000 bins for ordinary maps; 2**bits at the very most, 168 MB),
    16 bytes an anomalous map, and some 50 MB while it counts.

    Args:
        aupro_limit: highest false-positive rate of AUPRO, in (0, 1].
        bits: of a score that name its bin, 9 to 24.

    Raises:
        OptionError: a limit or a number of bits out of range.
    """

    def __init__(self, aupro_limit: float = 0.3, bits: int = BITS) -> None:
        check_aupro_options(aupro_limit, "exact")
        if not 9 <= bits <= 24:
            raise OptionError(f"bits={bits} must be 9 (sign and exponent of a score) to 24")
        self.aupro_limit = aupro_limit
        self.bits = bits
        self._bins, self._counts = np.empty(0, np.int64), np.empty((0, 4), np.int64)  # bins ascending
        self._pending: tuple[list[NDArray[np.uint32]], list[NDArray[np.uint32]]] = ([], [])
        self._pending_tables: list[tuple[Array, Array]] = []
        self._pending_pixels = 0
        self._soft_dice: list[float] = []
        self._soft_iou: list[float] = []
        self._n_maps = self._n_regions = 0

    def update(self, maps: Sequence[Any] | Array, masks: Sequence[Any] | Array) -> None:
        """Add a batch; arguments and errors as of `PixelAccumulator.update`."""
        for split in split_maps(maps, masks):
            self.add(split)

    def add(self, split: SplitMap) -> None:
        """Add a map that is taken apart already."""
        beside = len(split.region_sizes) > 0
        self._pending[NORMAL_BESIDE if beside else NORMAL_ELSEWHERE].append(score_bins(split.normal, self.bits))
        if beside:
            self._pending_tables.append(_anomalous_table(split, self.bits))
            dice, iou = soft_overlap(split)
            self._soft_dice.append(dice)
            self._soft_iou.append(iou)
        self._n_maps += 1
        self._n_regions += len(split.region_sizes)
        self._pending_pixels += len(split.normal) + len(split.anomalous)
        if self._pending_pixels >= _PENDING_PIXELS:
            self._count_pending()
            if sum(len(bins) for bins, _ in self._pending_tables) >= _PENDING_ROWS:
                self._fold()

    def merge(self, other: BinnedPixelAccumulator) -> None:
        """Add all that another accumulator has seen.

        Raises:
            OptionError: the other one has other bins or another limit of AUPRO.
        """
        ours, theirs = (self.aupro_limit, self.bits), (other.aupro_limit, other.bits)
        if ours != theirs:
            raise OptionError(f"cannot merge accumulators with AUPRO limit and bits {ours} and {theirs}; use the same")
        self._pending_tables.append(other.table())
        self._fold()
        self._soft_dice += other._soft_dice
        self._soft_iou += other._soft_iou
        self._n_maps += other._n_maps
        self._n_regions += other._n_regions

    def table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return bins that hold a score, (k,) ascending, and their counts, (k, 4); see `NORMAL_BESIDE` and what
        follows."""
        self._fold()
        return self._bins, self._counts

    def _count_pending(self) -> None:
        """Make tables of the normal pixels that are pending."""
        for column in (NORMAL_BESIDE, NORMAL_ELSEWHERE):
            if self._pending[column]:
                bins, found = _count(np.concatenate(self._pending[column]))
                counts = np.zeros((len(bins), 4), np.int64)
                counts[:, column] = found
                self._pending_tables.append((bins, counts))
        self._pending, self._pending_pixels = ([], []), 0

    def _fold(self) -> None:
        """Add up all that is pending."""
        self._count_pending()
        self._bins, self._counts = _sum_tables([(self._bins, self._counts), *self._pending_tables])
        self._pending_tables = []

    def to_arrays(self) -> dict[str, Array]:
        """Return the whole state as arrays, for a file; `from_arrays` is the inverse."""
        bins, counts = self.table()
        return {
            "options": np.array([self.aupro_limit, self.bits], np.float64),
            "bins": bins,
            "counts": counts,
            "soft": np.array([self._soft_dice, self._soft_iou], np.float64),
            "n": np.array([self._n_maps, self._n_regions], np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> BinnedPixelAccumulator:
        """Return the accumulator that `to_arrays` took apart.

        Raises:
            DataError: an array is missing or has another shape.
        """
        try:
            made = cls(float(arrays["options"][0]), int(arrays["options"][1]))
            made._bins, made._counts = arrays["bins"], arrays["counts"].reshape(len(arrays["bins"]), 4)
            made._soft_dice, made._soft_iou = (values.tolist() for values in arrays["soft"])
            made._n_maps, made._n_regions = map(int, arrays["n"])
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"these are not the arrays of an accumulator ({error}); count the maps again") from error
        return made

    def compute(self) -> BinnedMetrics:
        """Compute the metrics of all maps so far."""
        points, weights = self._points(NORMAL_BESIDE, NORMAL_ELSEWHERE)
        within, _ = self._points(NORMAL_BESIDE)
        f1_max, f1_threshold, iou_max = _highest_overlaps(points)
        maps = len(self._soft_dice)
        undefined = float("nan")
        return BinnedMetrics(
            auroc=_bounded_auroc(points),
            auroc_anomalous_only=_bounded_auroc(within),
            ap=_bounded_ap(points),
            f1_max=f1_max,
            f1_threshold=f1_threshold,
            iou_max=iou_max,
            soft_dice=math.fsum(self._soft_dice) / maps if points.defined else undefined,
            soft_iou=math.fsum(self._soft_iou) / maps if points.defined else undefined,
            aupro=_bounded_aupro(points, weights, self.aupro_limit),
            aupro_limit=self.aupro_limit,
            n_maps=self._n_maps,
            n_anomalous_maps=maps,
            n_regions=self._n_regions,
        )

    def curves(self, max_points: int = 1000) -> dict[str, Curve]:
        """Return ROC, PR and PRO curve of all maps so far, keys "roc", "pr", "pro", thinned to `max_points` each."""
        points, weights = self._points(NORMAL_BESIDE, NORMAL_ELSEWHERE)
        pro = Curve(np.empty(0), np.empty(0))
        if points.defined:
            pro = rising_curve(points, np.cumsum(weights) / np.sum(weights), max_points)
        return {"roc": roc_curve(points, max_points), "pr": pr_curve(points, max_points), "pro": pro}

    def summary(self, max_points: int = 1000) -> tuple[BinnedMetrics, dict[str, Curve]]:
        """Return what `compute` and `curves` do at once."""
        return self.compute(), self.curves(max_points)

    def _points(self, *normal: int) -> tuple[OperatingPoints, Array]:
        """Return what each bin with an anomalous score flags, highest first, and the weight of its anomalous pixels."""
        bins, counts = self.table()
        return table_points(counts, normal, bin_edges(bins, self.bits))


def table_points(counts: Array, normal: Sequence[int], edges: Array) -> tuple[OperatingPoints, Array]:
    """Return operating points at the bins that hold an anomalous score, and the weights of these bins.

    Args:
        counts: (k, 4) int64, bins ascending.
        normal: columns that count normal pixels.
        edges: (k,) lowest score of each bin.
    """
    found, passed = counts[::-1, ANOMALOUS], counts[::-1, list(normal)].sum(axis=1)
    flagged = np.cumsum(passed)
    kept = found > 0
    points = OperatingPoints(
        thresholds=edges[::-1][kept],
        position=np.empty(0, np.int64),
        true_positives=np.cumsum(found)[kept],
        false_positives=flagged[kept],
        false_positives_above=(flagged - passed)[kept],
        n_anomalous=int(found.sum()),
        n_normal=int(passed.sum()),
    )
    return points, counts[::-1, WEIGHT][kept]


def map_table(split: SplitMap, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return bins, (k,) ascending, and counts, (k, 4), of one map."""
    bins, found = _count(score_bins(split.normal, bits))
    counts = np.zeros((len(bins), 4), np.int64)
    counts[:, NORMAL_BESIDE if len(split.region_sizes) else NORMAL_ELSEWHERE] = found
    return _sum_tables([(bins, counts), _anomalous_table(split, bits)])


def _anomalous_table(split: SplitMap, bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return bins and counts of the anomalous pixels of one map.

    From the highest score down, a region's weight at or above a bin is the share of its pixels there, rounded down to
    a whole number of units of 2**-32: at every bin PRO is off by less than that, however many pixels a region has.
    """
    top = (1 << bits) - 1
    place = (split.region.astype(np.int64) << bits) | (top - score_bins(split.anomalous, bits).astype(np.int64))
    places, counts = np.unique(place, return_counts=True)  # by region, then falling scores
    region = places >> bits
    first = np.cumsum(split.region_sizes) - split.region_sizes
    size = split.region_sizes[region]
    reached = np.cumsum(counts) - first[region]
    weight = reached * REGION_UNIT // size - (reached - counts) * REGION_UNIT // size
    table = np.zeros((len(places), 4), np.int64)
    table[:, ANOMALOUS], table[:, WEIGHT] = counts, weight
    return _sum_tables([(top - (places & top), table)])


def _count(bins: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct bins, ascending, and how often each occurs."""
    if len(bins) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    lowest = int(bins.min())
    found = np.bincount(bins - np.uint32(lowest))
    held = np.flatnonzero(found)
    return held + lowest, found[held]


def _sum_tables(tables: Sequence[tuple[Array, Array]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Make one table of several: rows of the same bin are added."""
    bins = np.concatenate([bins for bins, _ in tables])
    counts = np.concatenate([counts for _, counts in tables])
    if len(bins) == 0:
        return bins, counts
    order = np.argsort(bins, kind="stable")
    bins = bins[order]
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    return bins[starts], np.add.reduceat(counts[order], starts, axis=0)


# -- bounds ------------------------------------------------------------------------------------------------------------
# At a bin, TP and FP are the anomalous and normal scores at or above it, TP₀ and FP₀ those above it.


def _bounded_auroc(points: OperatingPoints) -> Bounded:
    """Bound AUROC. Pairs within a bin count half; at worst all of them are lost or won."""
    if not points.defined:
        return _UNDEFINED
    tied = points.found * ((points.false_positives - points.false_positives_above) / 2)
    half = float(np.sum(tied) / points.n_anomalous / points.n_normal) + _ROUNDING
    value = auroc(points)
    return Bounded(value, value - half, value + half)


def _bounded_ap(points: OperatingPoints) -> Bounded:
    """Bound AP. It is least if all normal scores of a bin come before its anomalous ones: Σⱼ (TP₀ + j) / (TP₀ + j +
    FP), which is at least the integral of x / (x + FP) from TP₀ to TP. Most: no precision in a bin is above TP / (TP +
    FP₀)."""
    if not points.defined:
        return _UNDEFINED
    found, flagged = points.found, points.false_positives.astype(np.float64)
    before = (points.true_positives - found).astype(np.float64)
    step = np.divide(found, before + flagged, out=np.zeros_like(flagged), where=flagged > 0)
    low = np.maximum(found - flagged * np.log1p(step), 0)
    high = found * (points.true_positives / (points.true_positives + points.false_positives_above))
    total = points.n_anomalous
    return Bounded(
        average_precision(points), float(low.sum() / total) - _ROUNDING, float(high.sum() / total) + _ROUNDING
    )


def _highest_overlaps(points: OperatingPoints) -> tuple[Bounded, float, Bounded]:
    """Bound the highest F1, its threshold, and the highest IoU: at the edges of bins, which are thresholds themselves;
    between two edges none is above what TP and FP₀ together would give."""
    if not points.defined:
        return _UNDEFINED, float("nan"), _UNDEFINED
    best_case = OperatingPoints(
        points.thresholds,
        points.position,
        points.true_positives,
        points.false_positives_above,
        points.false_positives_above,
        points.n_anomalous,
        points.n_normal,
    )
    f1 = f1_scores(points)
    best = int(np.argmax(f1))
    iou = [float(np.max(p.true_positives / (p.n_anomalous + p.false_positives))) for p in (points, best_case)]
    highest = float(f1[best])
    return (
        Bounded(highest, highest - _ROUNDING, float(np.max(f1_scores(best_case))) + _ROUNDING),
        float(points.thresholds[best]),
        Bounded(iou[0], iou[0] - _ROUNDING, iou[1] + _ROUNDING),
    )


def _bounded_aupro(points: OperatingPoints, weights: Array, limit: float) -> Bounded:
    """Bound AUPRO. A pixel's share of the area is least from the rate with all normal scores of its bin on, most from
    the rate with none of them; rounding of the weights adds at most 2**-32."""
    if not points.defined:
        return _UNDEFINED
    total = float(np.sum(weights))
    rates = (points.false_positives / points.n_normal, points.false_positives_above / points.n_normal)
    low, high = (float(np.sum(weights * (limit - np.minimum(rate, limit)) / limit)) / total for rate in rates)
    slack = 1 / REGION_UNIT + _ROUNDING
    return Bounded(float(np.sum(weights * area_share(points, limit))) / total, low - slack, high + slack)
