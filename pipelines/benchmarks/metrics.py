"""Metrics against the codes that papers report with, and of many pixels in bounded memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import ndimage

from pipelines.benchmarks.harness import (
    OURS,
    Measured,
    Timing,
    _absent,
    _report,
    clocked,
    fixed_threads,
    interleave,
)
from pipelines.benchmarks.options import MetricsBenchmark, PixelsBenchmark
from pipelines.benchmarks.references import adeval_metrics, anomalib_metrics, scikit_learn_metrics, swept_aupro
from pipelines.runtime.cli import console
from unianom.errors import OptionError
from unianom.metrics import BinnedPixelAccumulator, PixelAccumulator

SWEEP = "sweep of 200 thresholds"
SCIKIT_LEARN = "scikit-learn, plain AUPRO"

OURS_BINNED = "unianom, binned"


ANOMALIB_AUPRO, ANOMALIB, ADEVAL = "anomalib AUPRO", "anomalib, all three", "ADEval"


def measure_metrics(options: MetricsBenchmark) -> dict[str, Any]:
    """All of our pixel metrics in turns with what others take for some of them, and what each takes in memory.

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
            table[name] = {**measured.result(name), "MB at the peak": _peak_of(partial(_peak_metrics, name, path))}
    return _report(
        options,
        "maps",
        measured,
        {f"{OURS} ÷ {name}": measured.ratio(OURS, name) for name in names if name != OURS}
        | {f"{OURS_BINNED} ÷ {ADEVAL}": measured.ratio(OURS_BINNED, ADEVAL) for name in names if name == ADEVAL},
        tables={"values, and memory beyond the maps themselves": table},
        notes=["seconds are CPU seconds", *_absent(["anomalib", "adeval"])],
    )


def _peak_of(work: Callable[[], float]) -> float:
    """MB that a piece of work adds to the peak of a process of its own, which only ever rises."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work).result() / 1e6


def _peak_metrics(name: str, path: str) -> float:
    """Bytes of memory at the peak beyond what the process held before, imports and a first small call included."""
    with fixed_threads(1), np.load(path) as stored:
        maps, masks = stored["maps"], stored["masks"]
        METRIC_SIDES[name](maps[:4, :64, :64], masks[:4, :64, :64])  # what is imported late
        _forget_peak()
        before = resident_peak()
        METRIC_SIDES[name](maps, masks)
        return float(resident_peak() - before)


def _forget_peak() -> None:
    """Let the peak of this process begin anew at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def draw_maps(count: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth anomaly maps, N×S×S float32, and masks, N×S×S bool: six in ten maps have a few regions, where scores are
    raised by a strength of their own."""
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
    """Every pixel metric that an accumulator gives; those that the others have too."""
    accumulator.update(maps, masks)
    found = accumulator.compute().as_dict()
    return {name: found[key] for name, key in (("aupro", "aupro"), ("auroc", "pixel_auroc"), ("ap", "pixel_ap"))}


def measure_pixels(options: PixelsBenchmark) -> dict[str, Any]:
    """Two rows: a subset, against the exact metrics; all of them, with their own bounds."""
    count = -(-options.pixels // options.size**2)
    names = {"exact": options.exact_maps, "binned": options.exact_maps, "binned, all": count}
    sides: dict[str, Timing] = {}
    tables: dict[str, dict[str, Any]] = {}
    for name, maps in names.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            values, seconds, peak = pool.submit(count_drawn, options, maps, name == "exact").result()
        sides[name] = Timing(maps * options.size**2, seconds, values)
        tables[name] = {"pixels": maps * options.size**2, "CPU seconds": seconds, "MB at the peak": peak / 1e6}
        console.print(f"{name}: {maps * options.size**2:,} pixels, {seconds:.1f} CPU seconds, {peak / 1e6:.0f} MB")
    accuracy: dict[str, dict[str, Any]] = {}
    for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_iou_max", "aupro"):
        exact, found, everything = (sides[name].result for name in names)
        accuracy[key] = {
            "exact": exact[key],
            "binned": found[key],
            "off by": abs(found[key] - exact[key]),
            "at most": found[f"{key}_error"],
            "of all": everything[key],
            "of all, off by at most": everything[f"{key}_error"],
        }
    measured = Measured({name: [timing] for name, timing in sides.items()}, [os.getloadavg()[0]])
    ratios = {"binned ÷ exact": measured.ratio("binned", "exact")}
    tables_by_title = {"time and memory": tables, "accuracy": accuracy}
    return _report(options, "pixels", measured, ratios, tables=tables_by_title, notes=["seconds are CPU seconds"])


def count_drawn(options: PixelsBenchmark, count: int, exact: bool) -> tuple[dict[str, float], float, float]:
    """Metrics of so many maps, CPU seconds that counting and computing them took, and bytes at the peak beyond the
    drawn maps."""
    with fixed_threads(1):
        maps, masks = draw_maps(options.drawn, options.size)
        accumulator: Any = PixelAccumulator() if exact else BinnedPixelAccumulator()
        _forget_peak()
        before, seconds = resident_peak(), 0.0
        for number in range(count):
            timing, place = divmod(number, options.drawn)
            scores = maps[place] * np.float32(1.0007**timing)
            start = time.process_time()
            accumulator.update([scores], [masks[place]])
            seconds += time.process_time() - start
        start = time.process_time()
        values = accumulator.compute().as_dict()
        return values, seconds + time.process_time() - start, float(resident_peak() - before)


def resident_peak() -> int:
    """Bytes of memory that this process ever held; getrusage would count its parent's, too."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError as error:
        raise OptionError("memory on the CPU is measured on Linux alone; take --device cuda") from error
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


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
