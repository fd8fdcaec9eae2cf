"""Scoring for a simulated device: images per second ÷ those that the device computes.

    python -m pipelines.benchmarks.simulated_device --output simulated_device.json

The scoring of jobs/score.py reads JPEG files, decodes and scales them on the CPUs of this machine and writes scores;
only the network of its model waits instead of computing, without a CPU, for as long as a device of a given rate would
take. A ratio below 1 is the time that a real device would wait.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.benchmarks.waiting_method import WaitingConfig, WaitingMethod, register
from pipelines.inference.options import ScoreOptions
from pipelines.runtime.options import RuntimeOptions
from unianom.data.maps import MapsKept
from unianom.methods import OWN_METHODS
from unianom.model import Model
from unianom.thresholds import Threshold

SOURCES = 256
"""Files that are drawn; all others are links to them."""


def draw_files(folder: Path, count: int, side: int, flagged: float = 0.05) -> None:
    """Write JPEG files of random blobs with some noise; a share of them with a white corner, all others with a black
    one."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8))
        noise = generator.normal(0, 6, (side, side, 3))
        blobs = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        pixels = np.clip(blobs + noise, 0, 255).astype(np.uint8)
        pixels[:16, :16] = 255 if number < round(flagged * count) else 0
        Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=90)


def link_files(sources: Path, folder: Path, count: int) -> None:
    """Fill a folder with so many links to the files of another, in turns."""
    found = sorted(sources.iterdir())
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:09}.jpg").hardlink_to(found[number % len(found)])


def save_model(folder: Path, rate: float, log: Path) -> None:
    """Write the model of a device that computes so many images per second; it fails images with a white corner."""
    log.mkdir()
    method = WaitingMethod(WaitingConfig(rate, str(log)))
    threshold = Threshold(0.0, 0.05, 0.95, 100, 96, 0.04)  # stands between black (-1) and white (1)
    Model(method, categories=["parts"], threshold=threshold, provenance={}).save(folder)


def measure(rate: float, stages: str, maps: MapsKept, sources: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Score once, in a Ray of its own; return what it took."""
    count = max(1, round(rate * options.seconds))
    with tempfile.TemporaryDirectory(dir=sources.parent) as made:
        folder = Path(made)
        link_files(sources, folder / "images", count)
        save_model(folder / "model", rate, folder / "log")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of warnings about every pool of actors
        start, before = time.time(), tree_cpu_seconds()
        import ray  # whose start counts

        from pipelines.inference.score import score

        ray.init(
            address="local",
            num_cpus=options.cpus,
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        result = score(
            ScoreOptions(
                str(folder / "model"),
                output=str(folder / "scores"),
                images=(str(folder / "images"),),
                maps=maps,
                batch_size=options.batch_size,
                runtime=RuntimeOptions(
                    local=False,
                    workers=1,
                    cpus_per_worker=1 if stages == "separate" else options.cpus,
                    stages=stages,  # type: ignore[arg-type]
                    engine="pytorch",
                ),
            )
        )
        end, cpu = time.time(), tree_cpu_seconds() - before
        ray.shutdown()
        batches = [line.split() for path in (folder / "log").iterdir() for line in path.read_text().splitlines()]
    assert result.scores.manifest["statuses"] == {"ok": count}
    first, last = min(float(began) for began, _ in batches), max(float(ended) for _, ended in batches)
    return {
        "stages": stages,
        "maps": maps,
        "rate": rate,
        "images": count,
        "while the device works": count / (last - first) / rate,
        "whole job": count / (end - start) / rate,
        "seconds before the first batch": first - start,
        "seconds after the last batch": end - last,
        "CPU ms": 1000 * cpu / count,
        "load": os.getloadavg()[0],
        "said": result.stages,
    }


def tree_cpu_seconds() -> float:
    """Return the CPU seconds of this process and all that it started and that still run."""
    import psutil  # Ray brings its own, and shows it when imported

    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file to write")
    parser.add_argument("--rates", nargs="+", type=float, default=[50, 100, 200, 400, 800], help="images per second")
    parser.add_argument("--stages", nargs="+", default=["separate", "fused"], choices=["separate", "fused"])
    parser.add_argument("--maps", nargs="+", default=["none", "flagged"], choices=["none", "flagged", "all"])
    parser.add_argument("--flagged", type=float, default=0.05, help="share of the images that fail")
    parser.add_argument("--seconds", type=float, default=60, help="that the device computes at each rate")
    parser.add_argument("--batch_size", type=int, default=32, help="images in one forward pass")
    parser.add_argument("--side", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument(
        "--cpus", type=int, default=(os.cpu_count() or 1) + 1, help="that Ray counts; one belongs to the waiting device"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    output = Path(options.output)
    if output.exists():
        raise SystemExit(f"{output} is there already; choose another output, or remove it first")
    register()
    os.environ[OWN_METHODS] = f"{register.__module__}:{register.__name__}"  # for the processes that Ray starts
    rows = []
    with tempfile.TemporaryDirectory() as made:
        sources = Path(made) / "sources"
        sources.mkdir()
        draw_files(sources, SOURCES, options.side, options.flagged)
        for stages in options.stages:
            for maps in options.maps:
                for rate in options.rates:
                    rows.append(measure(rate, stages, maps, sources, options))
                    print(
                        ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
                    )
                    output.write_text(json.dumps({"options": vars(options), "runs": rows}, indent=2))


if __name__ == "__main__":
    main()
