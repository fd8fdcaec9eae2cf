"""Ingest against a loop of Pillow."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.benchmarks.harness import OURS, Timing, clocked, interleave
from pipelines.benchmarks.options import IngestBenchmark
from pipelines.benchmarks.references import (
    open_rgb,
)
from pipelines.benchmarks.report import write_report
from pipelines.benchmarks.scoring import span
from pipelines.data.ingest_part import PartIngester
from pipelines.data.ingest_plan import PartTasks, SampleListing
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.tasks import run_tasks
from unianom.data.image import ImageLimits
from unianom.data.layouts import LAYOUTS, iter_samples, make_options
from unianom.temporary_database import temporary_database

MEANINGFUL_SECONDS = 10
"""Below so many seconds, starting the tasks of an ingest weighs too much in its throughput."""


def measure_ingest(options: IngestBenchmark) -> dict[str, Any]:
    """Ingest a source, in turns with a warm pool of processes that open each image and mask and convert it to RGB.

    Ingest also binarises and packs masks, hashes, and writes Parquet to disk; the loop keeps nothing.
    """
    workers = options.workers or os.cpu_count() or 1
    runtime = RuntimeOptions(workers=workers, local=False)
    layout_options = make_options(LAYOUTS[options.layout], options.layout_options)
    with (
        temporary_database() as database,
        TemporaryDirectory(prefix="unianom-benchmark-") as folder,
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
    ):
        listing = SampleListing(database, iter_samples(options.layout, options.source, layout_options))
        paths = [path for ref in listing for path in (ref.uri, ref.mask_uri) if path is not None]
        tasks = PartTasks(listing, range(listing.deal(part_bytes=256 << 20, min_parts=16)))

        def ingest() -> Timing:
            with TemporaryDirectory(dir=folder) as output:
                arguments = {
                    "output": output,
                    "plan": "benchmark",
                    "limits": ImageLimits(),
                    "resize": None,
                    "threads": 2,
                }
                results = list(run_tasks(PartIngester, arguments, tasks, runtime, listing.count))
            return Timing(sum(result["rows"] for result in results), span(results))

        def pillow() -> None:
            for _ in pool.map(open_rgb, paths, chunksize=16):
                pass

        peer = f"Pillow, {workers} processes"
        sides = {OURS: ingest, peer: clocked(listing.count, pillow)}
        measured = interleave(sides, options.rounds, warm_up=True)
    ratios = {f"R_ingest = {OURS} ÷ {peer}": measured.ratio(OURS, peer)}
    notes = []
    if (seconds := min(timing.seconds for timing in measured.turns[OURS])) < MEANINGFUL_SECONDS:
        notes.append(f"ingest took {seconds:.1f} s: below {MEANINGFUL_SECONDS} s this measures Ray, take more images")
    return write_report(options, "images", measured, ratios, notes=notes)
