"""Pixel metrics of very many pixels in bounded memory."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from pipelines.benchmarks.harness import Measured, Timing, fixed_threads
from pipelines.benchmarks.memory_peak import reset_peak, resident_peak
from pipelines.benchmarks.metrics import draw_maps
from pipelines.benchmarks.options import PixelsBenchmark
from pipelines.benchmarks.report import write_report
from pipelines.runtime.cli import console
from unianom.metrics import BinnedPixelAccumulator, PixelAccumulator


def measure_pixels(options: PixelsBenchmark) -> dict[str, Any]:
    """Count a subset, against the exact metrics, and all pixels, with their own bounds."""
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
    return write_report(options, "pixels", measured, ratios, tables=tables_by_title, notes=["seconds are CPU seconds"])


def count_drawn(options: PixelsBenchmark, count: int, exact: bool) -> tuple[dict[str, float], float, float]:
    """Return metrics of so many maps, CPU seconds of counting and computing them, and bytes at the peak.

    The peak is what was added to the drawn maps.
    """
    with fixed_threads(1):
        maps, masks = draw_maps(options.drawn, options.size)
        accumulator: Any = PixelAccumulator() if exact else BinnedPixelAccumulator()
        reset_peak()
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
