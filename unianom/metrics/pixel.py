"""Pixel-level metrics: how well anomaly maps mark the anomalous pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unianom.errors import OptionError
from unianom.metrics.curves import (
    Array,
    Curve,
    OperatingPoints,
    auroc,
    average_precision,
    f1_scores,
    operating_points,
    pr_curve,
    roc_curve,
)
from unianom.metrics.region import (
    AuproVariant,
    SplitMap,
    aupro_of,
    check_aupro_options,
    concatenate,
    pro_curve,
    sorted_normal,
    split_maps,
)


@dataclass(frozen=True)
class PixelMetrics:
    """Pixel- and region-level metrics of a set of anomaly maps.

    All but the counts are NaN unless there are both normal and anomalous pixels. Thresholds flag score ≥ threshold
    and are chosen on the masks they are measured with, as the field reports them: F1-max, IoU-max, DSC and IoU are
    upper bounds.

    Attributes:
        auroc: area under the ROC curve over all pixels of all maps, never flipped when below 0.5.
        auroc_anomalous_only: the same over the pixels of maps with an anomalous pixel alone; a different number that
            some codes print under the same name. NaN if those maps are anomalous throughout.
        ap: average precision Σ (R_n − R_{n−1}) P_n over all pixels.
        f1_max: highest F1 (Dice) of all pixels pooled, 1e-7 in the denominator.
        f1_threshold: the (highest) threshold that gives it.
        iou_max: highest intersection over union of all pixels pooled.
        dsc: mean over maps of the Dice coefficient at `dsc_threshold` (UniAS, Sec. 4.1): 2|P∩G| / (|P| + |G|); a map
            without anomalous pixels counts 1 if nothing is flagged, else 0.
        iou: mean over maps of |P∩G| / |P∪G| at `dsc_threshold`, maps without anomalous pixels as for `dsc`.
        dsc_threshold: the (highest) threshold with the largest sum of precision and recall over all pixels. Only
            scores of anomalous pixels are candidates, so the point (recall 0, precision 1), which no threshold
            reaches, never wins; where nothing is told apart it falls to the lowest of them (recall 1).
        soft_dice: mean over maps with an anomalous pixel of (2 Σpg + 1) / (Σp + Σg + 1), with g the mask and p the map
            scaled to 0…1 between its own minimum and maximum (0 where it is constant): no threshold, as the field
            reports it for polyps. What the scale of the scores tells between images is lost.
        soft_iou: mean over the same maps of (Σpg + 1) / (Σp + Σg − Σpg + 1).
        aupro: area under the per-region overlap curve, see `unianom.metrics.region.aupro`.
        aupro_limit: highest false-positive rate of `aupro`.
        aupro_variant: how `aupro` was computed.
        n_maps: number of maps.
        n_anomalous_maps: maps with an anomalous pixel.
        n_regions: ground-truth regions (8-connected) in them.
    """

    auroc: float
    auroc_anomalous_only: float
    ap: float
    f1_max: float
    f1_threshold: float
    iou_max: float
    dsc: float
    iou: float
    dsc_threshold: float
    soft_dice: float
    soft_iou: float
    aupro: float
    aupro_limit: float
    aupro_variant: AuproVariant
    n_maps: int
    n_anomalous_maps: int
    n_regions: int

    def as_dict(self, soft: bool = False) -> dict[str, float]:
        """Return the numbers under the names tables use; soft Dice and soft IoU, which suit maps of probabilities, only
        on demand.

        AUPRO is "aupro" if exact with limit 0.3; any other variant or limit is part of its name
        ("aupro_legacy_global_200", "aupro_0.05").
        """
        aupro_name = "aupro"
        if self.aupro_variant != "exact":
            aupro_name += f"_{self.aupro_variant}"
        if self.aupro_limit != 0.3:
            aupro_name += f"_{self.aupro_limit:g}"
        return {
            "pixel_auroc": self.auroc,
            "pixel_auroc_anomalous_only": self.auroc_anomalous_only,
            "pixel_ap": self.ap,
            "pixel_f1_max": self.f1_max,
            "pixel_f1_threshold": self.f1_threshold,
            "pixel_iou_max": self.iou_max,
            "dsc": self.dsc,
            "iou": self.iou,
            "dsc_threshold": self.dsc_threshold,
            **({"soft_dice": self.soft_dice, "soft_iou": self.soft_iou} if soft else {}),
            aupro_name: self.aupro,
            "n_maps": self.n_maps,
            "n_anomalous_maps": self.n_anomalous_maps,
            "n_regions": self.n_regions,
        }


class PixelAccumulator:
    """Exact pixel metrics of maps that arrive in batches, on one or many workers.

    Accumulators merged in any order give the very same numbers as one that saw every map.

    Memory: 4 bytes a normal pixel and 8 an anomalous one (float32 score, int32 region); `compute` takes another 4
    bytes a normal pixel and some 100 an anomalous one while it runs. 1000 maps of 256×256 hold 0.26 GB.

    Leave out images whose mask is unknown; normal images take part with a mask of zeros.

    Args:
        aupro_limit: highest false-positive rate of AUPRO, in (0, 1].
        aupro_variant: see `unianom.metrics.region.aupro`.

    Raises:
        OptionError: unknown variant or a limit outside (0, 1].
    """

    def __init__(self, aupro_limit: float = 0.3, aupro_variant: AuproVariant = "exact") -> None:
        check_aupro_options(aupro_limit, aupro_variant)
        self.aupro_limit = aupro_limit
        self.aupro_variant: AuproVariant = aupro_variant
        self._maps: list[SplitMap] = []

    def update(self, maps: Sequence[Any] | Array, masks: Sequence[Any] | Array) -> None:
        """Add a batch; nothing of it is added if an error is raised.

        Args:
            maps: B×H×W array or B arrays H×W of any sizes, higher is more anomalous; converted to float32.
            masks: bool, the same shapes, True where anomalous.

        Raises:
            DataError: maps and masks do not match, a mask is not bool, or a map holds NaN or infinite values.
        """
        self._maps.extend(split_maps(maps, masks))

    def add(self, split: SplitMap) -> None:
        """Add a map that is taken apart already."""
        self._maps.append(split)

    def merge(self, other: PixelAccumulator) -> None:
        """Add all that another accumulator has seen.

        Raises:
            OptionError: the other one computes AUPRO differently.
        """
        ours, theirs = (self.aupro_limit, self.aupro_variant), (other.aupro_limit, other.aupro_variant)
        if ours != theirs:
            raise OptionError(f"cannot merge accumulators with AUPRO options {ours} and {theirs}; use the same ones")
        self._maps.extend(other._maps)

    def compute(self) -> PixelMetrics:
        """Compute the metrics of all maps so far."""
        return self._metrics(*self._operating_points())

    def curves(self, max_points: int = 1000) -> dict[str, Curve]:
        """Return ROC, PR and PRO curve of all maps so far, keys "roc", "pr", "pro", thinned to `max_points` each."""
        return self._curves(self._operating_points()[1], max_points)

    def summary(self, max_points: int = 1000) -> tuple[PixelMetrics, dict[str, Curve]]:
        """Return what `compute` and `curves` do at once, which sorts the scores once."""
        within, points = self._operating_points()
        return self._metrics(within, points), self._curves(points, max_points)

    def _metrics(self, within: OperatingPoints, points: OperatingPoints) -> PixelMetrics:
        nan = float("nan")
        f1_max = f1_threshold = iou_max = dsc = iou = dsc_threshold = soft_dice = soft_iou = nan
        if points.defined:
            f1 = f1_scores(points)
            best = int(np.argmax(f1))
            f1_max, f1_threshold = float(f1[best]), float(points.thresholds[best])
            iou_max = float(np.max(points.true_positives / (points.n_anomalous + points.false_positives)))
            dsc_threshold = float(points.thresholds[np.argmax(points.precision + points.recall)])
            dsc, iou = _mean_overlap(self._maps, dsc_threshold)
            soft_dice, soft_iou = _mean_soft_overlap(self._maps)
        return PixelMetrics(
            auroc=auroc(points),
            auroc_anomalous_only=auroc(within),
            ap=average_precision(points),
            f1_max=f1_max,
            f1_threshold=f1_threshold,
            iou_max=iou_max,
            dsc=dsc,
            iou=iou,
            dsc_threshold=dsc_threshold,
            soft_dice=soft_dice,
            soft_iou=soft_iou,
            aupro=aupro_of(self._maps, points, self.aupro_limit, self.aupro_variant),
            aupro_limit=self.aupro_limit,
            aupro_variant=self.aupro_variant,
            n_maps=len(self._maps),
            n_anomalous_maps=sum(len(m.region_sizes) > 0 for m in self._maps),
            n_regions=sum(len(m.region_sizes) for m in self._maps),
        )

    def _curves(self, points: OperatingPoints, max_points: int) -> dict[str, Curve]:
        return {
            "roc": roc_curve(points, max_points),
            "pr": pr_curve(points, max_points),
            "pro": pro_curve(self._maps, points, max_points),
        }

    def _operating_points(self) -> tuple[OperatingPoints, OperatingPoints]:
        """Return operating points over the pixels of maps with an anomalous pixel, and over those of all maps."""
        anomalous = concatenate([m.anomalous for m in self._maps])
        within = operating_points(anomalous, sorted_normal([m for m in self._maps if len(m.region_sizes)]))
        return within, within.with_more_normal(sorted_normal([m for m in self._maps if not len(m.region_sizes)]))


def pixel_metrics(
    maps: Sequence[Any] | Array,
    masks: Sequence[Any] | Array,
    aupro_limit: float = 0.3,
    aupro_variant: AuproVariant = "exact",
) -> PixelMetrics:
    """Compute the metrics of maps that are all at hand; arguments and errors of `PixelAccumulator` and its `update`."""
    accumulator = PixelAccumulator(aupro_limit, aupro_variant)
    accumulator.update(maps, masks)
    return accumulator.compute()


def _mean_overlap(maps: Sequence[SplitMap], threshold: float) -> tuple[float, float]:
    """Return mean Dice and mean IoU over maps at one threshold; a map without anomalous pixels scores 1 or 0."""
    dice: list[float] = []
    iou: list[float] = []
    for m in maps:
        hits = int(np.count_nonzero(m.anomalous >= threshold))
        false_alarms = int(np.count_nonzero(m.normal >= threshold))
        if len(m.anomalous):
            dice.append(2 * hits / (hits + false_alarms + len(m.anomalous)))
            iou.append(hits / (false_alarms + len(m.anomalous)))
        else:
            dice.append(float(false_alarms == 0))
            iou.append(float(false_alarms == 0))
    # Exact sums make the means independent of the order of the maps.
    return math.fsum(dice) / len(maps), math.fsum(iou) / len(maps)


def _mean_soft_overlap(maps: Sequence[SplitMap]) -> tuple[float, float]:
    """Return mean soft Dice and mean soft IoU over maps with an anomalous pixel."""
    found = [soft_overlap(m) for m in maps if len(m.anomalous)]
    return math.fsum(dice for dice, _ in found) / len(found), math.fsum(iou for _, iou in found) / len(found)


def soft_overlap(m: SplitMap) -> tuple[float, float]:
    """Return soft Dice and soft IoU of a map with an anomalous pixel, scaled by its own extremes; see
    `PixelMetrics`."""
    low = float(min(m.anomalous.min(), m.normal.min(initial=np.inf)))
    high = float(max(m.anomalous.max(), m.normal.max(initial=-np.inf)))
    scale = 1 / (high - low) if high > low else 0.0
    hits = float(np.sum(m.anomalous, dtype=np.float64) - low * len(m.anomalous)) * scale
    total = hits + float(np.sum(m.normal, dtype=np.float64) - low * len(m.normal)) * scale
    return (2 * hits + 1) / (total + len(m.anomalous) + 1), (hits + 1) / (total + len(m.anomalous) - hits + 1)
