"""What is measured for a sizing."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

from pipelines.benchmarks.harness import Measured, Side, interleave
from pipelines.benchmarks.sizing_disk import DiskRates, disk_rates
from pipelines.benchmarks.sizing_figures import PARTS, counted, worker_counts
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.benchmarks.sizing_setup import Setup
from pipelines.benchmarks.sizing_stages import MeasuredStages, Pass
from pipelines.benchmarks.sizing_workers import Workers
from unianom.data.maps import MapsKept

READING = "read, decode, resize"
"""Side whose turns are the first stage."""


@dataclass(frozen=True)
class Figures:
    """What was measured, medians of the rounds.

    Attributes:
        milliseconds: of an image by maps kept and part of the work, on one core or, of parts that a GPU computes, on
            that.
        gpu_rates: images per second that the GPU here computes, by maps kept; empty where CPUs compute.
        written: bytes of an image's row and map, by maps kept.
        rates: images per second by number of workers.
        of_perfect: rate of so many workers ÷ (their number · rate of one), median of the rounds.
        efficiency: E(2w), rate of 2w workers ÷ (2 · rate of w), by 2w; median of the rounds.
        slowdown: CPU time of an image with all workers at work ÷ with one, at least 1.
        one_worker: CPU milliseconds of an image in a worker that does everything by itself, maps none; None where
            workers only read.
        disk: rates of reading and writing.
        load: load average before anything was measured.
        gpu_seconds: that the GPU computed in a turn, at least; None where CPUs compute.
        unread: images of the sample that cannot be read.
    """

    milliseconds: Mapping[str, Mapping[str, float]]
    gpu_rates: Mapping[str, float]
    written: Mapping[str, float]
    rates: Mapping[int, float]
    of_perfect: Mapping[int, float]
    efficiency: Mapping[int, float]
    slowdown: float
    one_worker: float | None
    disk: DiskRates
    load: float
    gpu_seconds: float | None
    unread: int


def measure_figures(options: SizingBenchmark, setup: Setup, folder: str, load: float) -> tuple[Measured, Figures]:
    """Let stages and workers take turns, then the disk."""
    kinds: tuple[MapsKept, ...] = get_args(MapsKept)
    counts = worker_counts(options.workers or os.cpu_count() or 1)
    images = setup.images
    stages = MeasuredStages(setup.arguments, setup.models, images.whole, images.ranges, options.flagged)
    worked = {**setup.arguments, "maps": "none"}
    with Workers(worked, setup.models, images.ranges, folder, counts[-1]) as workers:
        sides: dict[str, Side] = {READING: stages.read}
        sides |= {side_of(kind): partial(stages.compute_and_write, kind, folder) for kind in kinds}
        sides |= {counted(count, "worker"): partial(workers.run, count) for count in counts}
        measured = interleave(sides, options.rounds, warm_up=True)
    disk = disk_rates(images.stored, folder, options.rounds)
    return measured, figures_of(measured, kinds, counts, disk, load, len(stages.unread))


def figures_of(
    measured: Measured, kinds: Sequence[str], counts: Sequence[int], disk: DiskRates, load: float, unread: int
) -> Figures:
    """Return medians of what the sides' turns gave."""
    passes = {side: [turn.result for turn in turns] for side, turns in measured.turns.items()}
    images = {side: turns[0].amount for side, turns in measured.turns.items()}
    reading = _medians(passes[READING], images[READING])
    milliseconds, gpu_seconds, written = {}, {}, {}
    for kind in kinds:
        side = side_of(kind)
        parts = reading | _medians(passes[side], images[side])
        milliseconds[kind] = {part: parts[part] for part in PARTS if part in parts}
        written[kind] = passes[side][-1].written / images[side]
        if passes[side][0].busy is not None:
            gpu_seconds[kind] = statistics.median(one.busy for one in passes[side])
    alone, together = (passes[counted(count, "worker")] for count in (counts[0], counts[-1]))
    return Figures(
        milliseconds=milliseconds,
        gpu_rates={kind: images[side_of(kind)] / seconds for kind, seconds in gpu_seconds.items()},
        written=written,
        rates={count: measured.summary()[counted(count, "worker")]["rate_median"] for count in counts},
        of_perfect={count: _ratio(measured, count, 1) for count in counts},
        efficiency={2 * count: _ratio(measured, 2 * count, count) for count in counts if 2 * count in counts},
        slowdown=max(1.0, statistics.median(many / one for many, one in zip(together, alone, strict=True))),
        one_worker=None if gpu_seconds else 1000 * statistics.median(alone),
        disk=disk,
        load=load,
        gpu_seconds=min(gpu_seconds.values(), default=None),
        unread=unread,
    )


def side_of(kind: str) -> str:
    """Return the name of the side whose turns are the other stages."""
    return f"compute and write, maps {kind}"


def _ratio(measured: Measured, count: int, fewer: int) -> float:
    """Return the rate of workers ÷ that of fewer, each of whom does the same."""
    ratio = measured.ratio(counted(count, "worker"), counted(fewer, "worker"), count / fewer)
    return float(ratio["median"])


def _medians(passes: Sequence[Pass], images: float) -> dict[str, float]:
    """Return milliseconds of an image by part of the work, medians of the rounds."""
    names = dict.fromkeys(name for one in passes for name in one.seconds)
    return {name: 1000 * statistics.median(one.seconds[name] for one in passes) / images for name in names}
