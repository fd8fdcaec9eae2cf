"""What the benchmarks compare with: a loop of Pillow, and what else computes metrics and coresets.

Published code that is no package is re-enacted from its description; packages are imported where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

SWEEP_THRESHOLDS = 200


def open_rgb(path: str) -> None:
    """Open an image file as any loader does, and drop it."""
    with Image.open(path) as image:
        image.convert("RGB")


def swept_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Return AUPRO as evaluation codes of the field loop for it.

    At each of 200 thresholds between the lowest and highest score it takes the share of each region and of all normal
    pixels that lies above.

    They find the regions of every mask again at every threshold; here they are found once, so this side is the faster
    for it. The last false-positive rate below `limit` is taken for the limit, as they do.
    """
    regions: list[tuple[Any, ...]] = []  # map, rows, columns
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [(number, *np.nonzero(labels == region)) for region in range(1, count + 1)]
    normal = ~masks
    low, high = float(maps.min()), float(maps.max())
    rates, overlaps = [], []
    for step in range(SWEEP_THRESHOLDS):
        above = maps > np.float32(low + (high - low) * step / SWEEP_THRESHOLDS)
        rate = np.count_nonzero(above & normal) / np.count_nonzero(normal)
        if rate < limit:
            rates.append(rate)
            overlaps.append(np.mean([above[region].mean() for region in regions]))
    fpr, pro = np.array(rates[::-1]), np.array(overlaps[::-1])
    return float(np.trapezoid(pro, fpr / fpr[-1]))


def plain_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """Return exact AUPRO as its definition suggests.

    All pixels are sorted, an anomalous one weighing 1 / (regions × its region's pixels), a normal one 1 / normal
    pixels; both are summed up from the highest score down, ties at once.
    """
    weights = np.zeros(masks.shape)
    count = 0
    for mask, weight in zip(masks, weights, strict=True):
        labels, regions = ndimage.label(mask, np.ones((3, 3)))
        for region in range(1, regions + 1):
            weight[labels == region] = 1 / np.count_nonzero(labels == region)
        count += regions
    order = np.argsort(-maps, axis=None)
    scores, normal = maps.ravel()[order], ~masks.ravel()[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    rates = np.append(0, np.cumsum(normal)[ends] / np.count_nonzero(normal))
    overlaps = np.append(0, np.cumsum(weights.ravel()[order])[ends] / count)
    inside = rates <= limit
    x = np.append(rates[inside], limit)
    y = np.append(overlaps[inside], np.interp(limit, rates, overlaps))
    return float(np.trapezoid(y, x) / limit)


def scikit_learn_metrics(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Return AUROC and AP of all pixels by scikit-learn, AUPRO by `plain_aupro`."""
    truth, scores = masks.ravel(), maps.ravel()
    return {
        "aupro": plain_aupro(maps, masks),
        "auroc": float(roc_auc_score(truth, scores)),
        "ap": float(average_precision_score(truth, scores)),
    }


def anomalib_metrics(maps: np.ndarray, masks: np.ndarray, aupro_only: bool = False) -> Callable[[], dict[str, float]]:
    """Return a function for anomalib's AUPRO, and the AUROC and AP of torchmetrics that it wraps, of these maps."""
    from anomalib.metrics.aupro import _AUPRO
    from torchmetrics.classification import BinaryAUROC, BinaryAveragePrecision

    tensors = torch.from_numpy(maps), torch.from_numpy(masks.astype(np.uint8))
    classes = {"aupro": partial(_AUPRO, fpr_limit=0.3), "auroc": BinaryAUROC, "ap": BinaryAveragePrecision}

    def work() -> dict[str, float]:
        found = {}
        for name, made in classes.items():
            if name == "aupro" or not aupro_only:
                metric = made()
                metric.update(*(tensors if name == "aupro" else (tensors[0].flatten(), tensors[1].flatten())))
                found[name] = float(metric.compute())
        return found

    return work


def adeval_metrics(maps: np.ndarray, masks: np.ndarray) -> Callable[[], dict[str, float]]:
    """Return a function for ADEval's three metrics of these maps, on the CPU, from histograms."""
    import adeval

    if not hasattr(np, "trapz"):
        setattr(np, "trapz", np.trapezoid)  # noqa: B010  # ADEval 1.1 calls it by the name it had in NumPy 1
    truth = masks.astype(np.uint8)
    return lambda: dict(zip(("auroc", "ap", "aupro"), map(float, adeval.auroc_aupr_aupro(maps, truth)), strict=True))


def plain_coreset(features: np.ndarray, starts: np.ndarray, count: int) -> list[int]:
    """Return PatchCore's approximate greedy coreset as its released code goes about it.

    Every pick takes the distances of all rows to it by one float32 matrix product, joins them to the nearest distances
    so far and takes the minimum.
    """
    rows = torch.from_numpy(features)

    def distances(to: torch.Tensor) -> torch.Tensor:
        squares = rows.pow(2).sum(1, keepdim=True) + to.pow(2).sum(1) - 2 * rows @ to.T
        return squares.clamp(min=0).sqrt()  # N K

    nearest = distances(rows[torch.from_numpy(starts)]).mean(1, keepdim=True)  # N 1
    picks: list[int] = []
    for _ in range(count):
        pick = int(nearest.argmax())
        picks.append(pick)
        nearest = torch.cat([nearest, distances(rows[pick : pick + 1])], dim=1).min(1, keepdim=True).values
    return picks


def anomalib_coreset(features: np.ndarray, count: int, seed: int) -> Callable[[], list[int]]:
    """Return a function for anomalib's k-centre greedy on features that are projected already."""
    from anomalib.models.components.sampling import KCenterGreedy

    unprojected = torch.from_numpy(features)[:, :, None]  # it projects matrices only

    def work() -> list[int]:
        torch.manual_seed(seed)
        return KCenterGreedy(unprojected, (count + 0.5) / len(features)).select_coreset_idxs()

    return work


def nearest_distances(patches: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the distance of patches M×D to the nearest of vectors N×D as anomalib computes it: the square root of
    |x|² − 2x·y + |y|² for all pairs, then the smallest."""
    distances = torch.matmul(patches, vectors.T).mul_(-2)
    distances += patches.square().sum(1, keepdim=True)
    distances += vectors.square().sum(1)
    return distances.clamp_min_(0).sqrt_().amin(1)
