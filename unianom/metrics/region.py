"""Region-level metric: AUPRO, the area under the per-region overlap curve (Bergmann et al., MVTec AD, IJCV 2021).

A region is a connected component (8-connectivity) of a ground-truth mask. PRO(t) is the mean over all regions of all
images of the share of the region's pixels with score ≥ t; FPR(t) the share of flagged pixels among all normal pixels
of all images, normal images included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from unianom.configs.metrics import AuproVariant, check_aupro_options
from unianom.errors import DataError
from unianom.metrics.curves import Array, Curve, OperatingPoints, operating_points, rising_curve

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)


@dataclass(frozen=True, eq=False)
class SplitMap:
    """One anomaly map taken apart by its ground truth; pixels in raster order.

    Attributes:
        normal: float32 (n,) scores of normal pixels.
        anomalous: float32 (m,) scores of anomalous pixels.
        region: int32 (m,) the region each anomalous pixel belongs to, from 0.
        region_sizes: int64 (r,) pixels in each region.
    """

    normal: NDArray[np.float32]
    anomalous: NDArray[np.float32]
    region: NDArray[np.int32]
    region_sizes: NDArray[np.int64]


def split_maps(maps: Sequence[Any] | Array, masks: Sequence[Any] | Array) -> list[SplitMap]:
    """Take anomaly maps apart by their masks; the arrays given are copied, not kept.

    Args:
        maps: B×H×W array or B arrays H×W of any sizes, higher is more anomalous; converted to float32.
        masks: bool, the same shapes, True where anomalous.

    Raises:
        DataError: maps and masks do not match, a mask is not bool, a map is empty or holds NaN or infinite values.
    """
    if len(maps) != len(masks):
        raise DataError(f"{len(maps)} anomaly maps but {len(masks)} masks; give one mask a map")
    return [_split_map(np.asarray(maps[i], dtype=np.float32), np.asarray(masks[i]), i) for i in range(len(maps))]


def _split_map(scores: NDArray[np.float32], mask: Array, index: int) -> SplitMap:
    if scores.ndim != 2 or scores.size == 0:
        raise DataError(f"anomaly map {index} of this batch has shape {scores.shape}; it must be height × width")
    if mask.shape != scores.shape:
        raise DataError(
            f"mask {index} of this batch has shape {mask.shape} but its anomaly map has {scores.shape}; "
            f"resize the mask to the map (nearest neighbour) first"
        )
    if mask.dtype != bool:
        raise DataError(f"mask {index} of this batch is {mask.dtype}, not bool; binarise it first, e.g. mask > 0")
    # NaN passes through min and max, so two quick passes see every value that is not finite.
    if not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        raise DataError(
            f"anomaly map {index} of this batch holds NaN or infinite values; "
            f"leave out images that could not be scored, or mend the model that gave it"
        )
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        nothing = np.empty(0, np.float32)
        return SplitMap(scores.flatten(), nothing, np.empty(0, np.int32), np.empty(0, np.int64))
    columns = np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # labelling is dear, most masks are small
    labels, _ = ndimage.label(box, structure=_EIGHT_NEIGHBOURS)
    region = labels[box] - 1
    return SplitMap(scores[~mask], scores[mask], region.astype(np.int32), np.bincount(region))


def aupro(
    maps: Sequence[Any] | Array,
    masks: Sequence[Any] | Array,
    limit: float = 0.3,
    variant: AuproVariant = "exact",
) -> float:
    """Compute the area under the PRO curve over FPR in [0, limit], divided by `limit`: 0 to 1.

    Args:
        maps: B×H×W array or B arrays H×W, higher is more anomalous; converted to float32.
        masks: bool, the same shapes, True where anomalous.
        limit: highest false-positive rate, in (0, 1].
        variant:
            - "exact": all distinct scores as thresholds, trapezoid rule (ties are diagonal segments), PRO
              interpolated linearly at exactly `limit`.
            - "legacy_global_200": 200 thresholds evenly spaced from the lowest score, flagging score > threshold;
              points with FPR < limit are kept and their FPR is divided by its own maximum. This is what much of the
              literature reports. It is biased where the last FPR kept lies well below `limit`, and NaN where fewer
              than two different FPRs are kept.
            - "legacy_per_image": the mean over anomalous images of "legacy_global_200" of that image alone, as the
              one-class codes of reverse distillation and ReContrast compute it.

    Returns:
        The area; NaN where there are no regions or no normal pixels.

    Raises:
        OptionError: unknown variant or a limit outside (0, 1].
        DataError: see `split_maps`.
    """
    check_aupro_options(limit, variant)
    split = split_maps(maps, masks)
    points = operating_points(concatenate([m.anomalous for m in split]), sorted_normal(split))
    return aupro_of(split, points, limit, variant)


def aupro_of(maps: Sequence[SplitMap], points: OperatingPoints, limit: float, variant: AuproVariant) -> float:
    """Compute `aupro` of maps already taken apart.

    Args:
        maps: the maps.
        points: operating points of all their pixels, anomalous scores in the order of `maps`.
        limit, variant: see `aupro`.
    """
    if not points.defined:
        return float("nan")
    if variant == "legacy_global_200":
        return _swept_aupro(maps, limit)
    if variant == "legacy_per_image":
        per_image = [_swept_aupro([m], limit) for m in maps if len(m.region_sizes)]
        return math.fsum(per_image) / len(per_image)
    region, sizes = _regions_of(maps)
    # PRO is a mean of recalls, so its area is the mean over regions of the mean share of their pixels. The exact
    # sum over regions makes the result independent of the order of the images.
    share = area_share(points, limit)[points.position]  # one value an anomalous pixel
    return math.fsum(np.bincount(region, weights=share) / sizes) / len(sizes)


def area_share(points: OperatingPoints, limit: float) -> Array:
    """Return what one anomalous pixel at each threshold adds to the area over FPR in [0, limit] / limit; (k,), 0 to 1.

    A pixel with score t is found from the false-positive rate of "above t" on; where normal pixels tie with it, it
    counts in part, rising linearly to 1 at the rate of "at or above t" (the diagonal segment of the trapezoid
    rule). Its share is the integral of that step or ramp up to `limit`, cut there exactly, over `limit`.
    """
    start = points.false_positives_above / points.n_normal
    end = points.false_positives / points.n_normal
    start_cut, end_cut = np.minimum(start, limit), np.minimum(end, limit)
    ramp = np.divide((end_cut - start_cut) ** 2, 2 * (end - start), out=np.zeros_like(end), where=end > start)
    return (limit - end_cut + ramp) / limit


def pro_curve(maps: Sequence[SplitMap], points: OperatingPoints, max_points: int = 1000) -> Curve:
    """Return PRO over false-positive rate, (0, 0) to (1, 1), thinned to `max_points`; arguments as for `aupro_of`."""
    if not points.defined:
        return Curve(np.empty(0), np.empty(0))
    region, sizes = _regions_of(maps)
    weights = 1 / (len(sizes) * sizes)
    gained = np.bincount(points.position, weights=weights[region])
    return rising_curve(points, np.minimum(np.cumsum(gained), 1.0), max_points)


def concatenate(scores: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Join any number of float32 arrays, none to an empty one."""
    return np.concatenate([np.empty(0, np.float32), *scores])


def sorted_normal(maps: Sequence[SplitMap]) -> NDArray[np.float32]:
    """Return the scores of all normal pixels, ascending."""
    scores = concatenate([m.normal for m in maps])
    scores.sort()
    return scores


def _regions_of(maps: Sequence[SplitMap]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the region of each anomalous pixel, numbered through all maps (m,), and each region's size (r,)."""
    sizes = np.concatenate([m.region_sizes for m in maps])
    first = np.cumsum([0] + [len(m.region_sizes) for m in maps])
    return np.concatenate([m.region + start for m, start in zip(maps, first)]), sizes


def _swept_aupro(maps: Sequence[SplitMap], limit: float) -> float:
    """Compute AUPRO over 200 evenly spaced thresholds with the false-positive rate rescaled by its own maximum."""
    n_thresholds = 200
    normal, anomalous = sorted_normal(maps), concatenate([m.anomalous for m in maps])
    if len(normal) == 0:
        return float("nan")
    lowest, highest = float(min(normal[0], anomalous.min())), float(max(normal[-1], anomalous.max()))
    thresholds = lowest + (highest - lowest) * np.arange(n_thresholds) / n_thresholds
    thresholds = thresholds.astype(np.float32)
    fpr = (len(normal) - np.searchsorted(normal, thresholds, side="right")) / len(normal)

    region, sizes = _regions_of(maps)
    passed = np.searchsorted(thresholds, anomalous, side="left")  # number of thresholds each pixel lies above
    histogram = np.bincount(region * (n_thresholds + 1) + passed, minlength=len(sizes) * (n_thresholds + 1))
    histogram = histogram.reshape(len(sizes), n_thresholds + 1)
    flagged = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1][:, 1:]  # regions × thresholds
    overlap = flagged / sizes[:, None]
    pro = np.array([math.fsum(column) for column in overlap.T]) / len(sizes)

    kept = fpr < limit
    fpr, pro = fpr[kept][::-1], pro[kept][::-1]
    if len(np.unique(fpr)) < 2:
        return float("nan")
    return float(np.trapezoid(pro, fpr / fpr[-1]))
