"""Metrics against the codes that papers report with, and of many pixels in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import ndimage

from pipelines.benchmarks.harness import (
    OURS,
    clocked,
    fixed_threads,
    interleave,
)
from pipelines.benchmarks.memory_peak import added_peak, reset_peak, resident_peak
from pipelines.benchmarks.options import MetricsBenchmark
from pipelines.benchmarks.references import adeval_metrics, anomalib_metrics, scikit_learn_metrics, swept_aupro
from pipelines.benchmarks.report import missing_peers, write_report
from unianom.metrics import BinnedPixelAccumulator, PixelAccumulator

SWEEP = "sweep of 200 thresholds"
SCIKIT_LEARN = "scikit-learn, plain AUPRO"

OURS_BINNED = "unianom, binned"


ANOMALIB_AUPRO, ANOMALIB, ADEVAL = "anomalib AUPRO", "anomalib, all three", "ADEval"


def measure_metrics(options: MetricsBenchmark) -> dict[str, Any]:
    """Compute pixel metrics in turns with what others take for some of them, and measure the memory of each.

    Time is CPU time, so that what else runs on the machine weighs less.
    """
    maps, masks = draw_maps(options.maps, options.size)
    needed = {ANOMALIB_AUPRO: "anomalib", ANOMALIB: "anomalib", ADEVAL: "adeval"}
    names = [name for name in METRIC_SIDES if name not in needed or find_spec(needed[name])]
    with fixed_threads(options.threads):
        sides = {
            name: clocked(options.maps, partial(METRIC_SIDES[name], maps, masks), time.process_time) for name in names
        }
        measured = interleave(sides, options.rounds, warm_up=True)
    table: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        path = f"{folder}/maps.npz"
        np.savez(path, maps=maps, masks=masks)
        for name in names:
            table[name] = {**measured.result(name), "MB at the peak": added_peak(partial(_peak_metrics, name, path))}
    return write_report(
        options,
        "maps",
        measured,
        {f"{OURS} ÷ {name}": measured.ratio(OURS, name) for name in names if name != OURS}
        | {f"{OURS_BINNED} ÷ {ADEVAL}": measured.ratio(OURS_BINNED, ADEVAL) for name in names if name == ADEVAL},
        tables={"values, and memory beyond the maps themselves": table},
        notes=["seconds are CPU seconds", *missing_peers(["anomalib", "adeval"])],
    )


def _peak_metrics(name: str, path: str) -> float:
    """Return bytes at the peak beyond what the process held before, imports and a first small call included."""
    with fixed_threads(1), np.load(path) as stored:
        maps, masks = stored["maps"], stored["masks"]
        METRIC_SIDES[name](maps[:4, :64, :64], masks[:4, :64, :64])  # what is imported late
        reset_peak()
        before = resident_peak()
        METRIC_SIDES[name](maps, masks)
        return float(resident_peak() - before)


def draw_maps(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth anomaly maps, N×S×S float32, and masks, N×S×S bool.

    Six in ten maps have a few regions, where scores are raised by a strength of their own.
    """
    rng = np.random.default_rng(seed)

    def smooth(sigma: float) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.normal(size=(count, size, size)).astype(np.float32), (0, sigma, sigma))
        return field / field.std()

    masks = smooth(size / 20) > 2
    masks[-(-6 * count // 10) :] = False
    strength = rng.gamma(4, 0.75, count).astype(np.float32)[:, None, None]
    raised = ndimage.gaussian_filter(masks.astype(np.float32), (0, size / 64, size / 64))
    return np.exp(0.4 * (smooth(size / 50) + strength * raised)), masks


def our_metrics(
    maps: np.ndarray, masks: np.ndarray, accumulator: PixelAccumulator | BinnedPixelAccumulator
) -> dict[str, float]:
    """Return the pixel metrics of an accumulator that the others have too."""
    accumulator.update(maps, masks)
    found = accumulator.compute().as_dict()
    return {name: found[key] for name, key in (("aupro", "aupro"), ("auroc", "pixel_auroc"), ("ap", "pixel_ap"))}


METRIC_SIDES: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    OURS: lambda maps, masks: our_metrics(maps, masks, PixelAccumulator()),
    OURS_BINNED: lambda maps, masks: our_metrics(maps, masks, BinnedPixelAccumulator()),
    SWEEP: lambda maps, masks: {"aupro": swept_aupro(maps, masks)},
    SCIKIT_LEARN: scikit_learn_metrics,
    ANOMALIB_AUPRO: lambda maps, masks: anomalib_metrics(maps, masks, aupro_only=True)(),
    ANOMALIB: lambda maps, masks: anomalib_metrics(maps, masks)(),
    ADEVAL: lambda maps, masks: adeval_metrics(maps, masks)(),
}
"""What each side computes of the same maps."""
