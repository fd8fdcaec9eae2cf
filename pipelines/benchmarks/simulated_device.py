"""Stages of their own against a simulated device: images per second ÷ those that the device computes.

    python -m pipelines.benchmarks.simulated_device --output simulated_device.json

JPEG files are read, decoded and scaled on the CPUs of this machine and handed to a device that waits instead of
computing, without a CPU, for as long as one of a given rate would take; then scores are written. A ratio below 1 is the
time that a real device would wait.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.runtime.device_turn import Turn
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.stage_blocks import Block
from pipelines.runtime.stage_clock import StageClock
from pipelines.runtime.stage_times import StageTimes
from pipelines.runtime.stages import Stages, run_staged
from pipelines.runtime.task_worker import ENDED, STARTED
from unianom import files
from unianom.data.image import InputPolicy, decode_upright, encode_map, fit_image


class ReadFiles:
    """Reads and decodes image files. A `ReadStage`.

    Args:
        folder: where they are.
        policy: size of the pixels.
    """

    def __init__(self, folder: str, policy: InputPolicy) -> None:
        self._files, self._policy = sorted(Path(folder).iterdir()), policy

    def read(self, task: dict[str, Any], clock: StageClock) -> Block:
        """Return the images numbered from `start` to `end`; after the last file comes the first again."""
        numbers = range(task["start"], task["end"])
        pixels = np.empty((len(numbers), self._policy.side, self._policy.side, 3), np.uint8)
        for number, place in zip(numbers, pixels, strict=True):
            with clock.stage("read"):
                data = self._files[number % len(self._files)].read_bytes()
            with clock.stage("decode"):
                upright = decode_upright(data, self._policy)
            with clock.stage("resize"):
                place[...] = fit_image(upright, self._policy)
        return Block({"pixels": pixels}, pa.table({"sample_id": [str(number) for number in numbers]}))


class SimulatedDevice:
    """Waits as long as a device would compute, without a CPU. A `ComputeStage`.

    Args:
        rate: images per second.
        maps: share of the images that it returns a map of.
    """

    def __init__(self, rate: float, maps: float) -> None:
        self._rate, self._maps = rate, maps
        self._free = 0.0  # when the device has done all that it was given

    def compute(self, block: Block, clock: StageClock, turn: Turn) -> Block:
        """Return a score of each image, and maps of some."""
        pixels = block.arrays["pixels"]
        asked = time.monotonic()
        with turn:
            # one that was waited for begins where the last one ended, so that what sleep adds does not add up
            self._free = max(asked, self._free) + len(pixels) / self._rate
            time.sleep(max(0.0, self._free - time.monotonic()))
        with clock.stage("results"):
            kept = round(self._maps * len(pixels))
            maps = pixels[:kept, :, :, 0].astype(np.float32)
            return Block({"score": pixels[:, 0, 0, 0].astype(np.float32), "maps": maps}, block.rows)


class WriteScores:
    """Encodes maps and writes scores. A `WriteStage`.

    Args:
        folder: for one file a task.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def write(self, task: dict[str, Any], block: Block, clock: StageClock) -> dict[str, Any]:
        """Write a Parquet file, and return how many images are in it."""
        with clock.stage("encode maps"):
            maps = [encode_map(one)[0] for one in block.arrays["maps"]]
        with clock.stage("write"):
            count = len(block.arrays["score"])
            assert block.rows is not None
            table = block.rows.append_column("score", pa.array(block.arrays["score"]))
            table = table.append_column("map", pa.array([*maps, *[None] * (count - len(maps))], pa.binary()))
            with files.open_atomic(files.join(self._folder, f"{task['start']:09}.parquet")) as handle:
                pq.write_table(table, handle)
        return {"images": count}


def draw_files(folder: Path, count: int, side: int) -> None:
    """Write JPEG files of random blobs with some noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8))
        noise = generator.normal(0, 6, (side, side, 3))
        blobs = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        Image.fromarray(np.clip(blobs + noise, 0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=90)


def measure(rate: float, sources: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run all stages once at a rate, in a Ray of their own; return what they took."""
    start = time.time()
    import ray  # whose start counts

    from pipelines.runtime.actors import connect

    count = max(1, round(rate * options.seconds / options.block))
    spans = [{"start": number * options.block, "end": (number + 1) * options.block} for number in range(count)]
    runtime = RuntimeOptions(local=False, workers=1, local_cpus=options.cpus)
    policy = InputPolicy(resize="stretch", size=options.side, crop=None)
    times = StageTimes()
    with tempfile.TemporaryDirectory() as folder:
        stages = Stages(
            partial(ReadFiles, sources, policy),
            partial(SimulatedDevice, rate, options.maps),
            partial(WriteScores, folder),
        )
        connect(runtime)
        before = tree_cpu_seconds()
        results = list(run_staged(stages, spans, runtime, compute_cpus=0))
        end = time.time()
        cpu = tree_cpu_seconds() - before
        written = sum(pq.read_metadata(path).num_rows for path in Path(folder).iterdir())
    ray.shutdown()
    images = count * options.block
    assert written == images == sum(result["images"] for result in results)
    for result in results:
        times.add(result)
    working = max(result[ENDED] for result in results) - min(result[STARTED] for result in results)
    return {
        "rate": rate,
        "images": images,
        "with start": images / (end - start) / rate,
        "without start": images / working / rate,
        "stages CPU ms": 1000 * sum(times.cpu.values()) / images,
        "all CPU ms": 1000 * cpu / images,
        "cores": cpu / (end - start),
        "device busy": times.busy_share,
        "stages": times.sentence(images),
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
    parser.add_argument("--seconds", type=float, default=60, help="that the device computes at each rate")
    parser.add_argument("--block", type=int, default=512, help="images of a task")
    parser.add_argument("--side", type=int, default=224, help="height and width of the images in pixels")
    parser.add_argument("--maps", type=float, default=0.0, help="share of the images whose maps are kept")
    parser.add_argument("--images", help="folder of image files to read; drawn ones unless given")
    parser.add_argument("--cpus", type=int, help="CPUs to use; all unless given")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    output = Path(options.output)
    if output.exists():
        raise SystemExit(f"{output} is there already; choose another output, or remove it first")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if not options.images:
            draw_files(Path(folder), 256, options.side)
        for rate in options.rates:
            rows.append(measure(rate, options.images or folder, options))
            print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
            output.write_text(json.dumps({"options": vars(options), "rates": rows}, indent=2))


if __name__ == "__main__":
    main()
