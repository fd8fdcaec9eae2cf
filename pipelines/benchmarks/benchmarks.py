"""How fast the project is, as ratios to what it stands on and to what else does the same work.

Figures of one machine mean little on another, so every figure here is a ratio: both sides work on the same input in
the same process tree with fixed threads, in turns (A B A B …), so that whatever else the machine does hits both. A
ratio is the median of the ratios of the rounds; the load average is recorded with every round.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from threadpoolctl import threadpool_limits

from pipelines.benchmarks.references import (
    BareForward,
    adeval_metrics,
    anomalib_coreset,
    anomalib_metrics,
    open_rgb,
    plain_coreset,
    scikit_learn_metrics,
    swept_aupro,
)
from pipelines.data.feature_cache import MASKS, PIXELS, Arrays, PartPreparer, array_name, learnable
from pipelines.data.ingest import PartIngester, plan_parts
from pipelines.inference.score import PartScorer
from pipelines.runtime.actors import ENDED, STARTED, RuntimeOptions, connect, run_units, set_threads
from pipelines.runtime.cli import AS_WRITTEN, console, print_table
from pipelines.runtime.models import ModelShelf, load_model
from pipelines.training.batches import Batches, Companions, Order, PreparedImages, TrainingImages, TrainingSet
from pipelines.training.networks import Trainer, synthesiser_of, wants_pixels
from unianom import files
from unianom.data.image import ImageLimits, decode_image, normalise, prepare_image
from unianom.data.layouts import LAYOUTS, iter_samples, make_options
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, OptionError
from unianom.memory.coreset import farthest_points, greedy_coreset, random_projection
from unianom.memory.index import MemoryBank
from unianom.methods import MemoryMethod
from unianom.methods.layers.similarity import EPSILON, log_similarity
from unianom.methods.trained import TrainedMethod
from unianom.metrics import BinnedPixelAccumulator, PixelAccumulator
from unianom.model import Model
from unianom.serialise import to_plain
from unianom.written import plain_options

OURS = "unianom"
"""Name of the side that is this project's."""

MEANINGFUL_IMAGES = 500
"""Below so many images, the first and last unit weigh too much in a throughput."""

MEANINGFUL_SECONDS = 10
"""Below so many seconds, starting the units of an ingest weighs too much in its throughput."""

FORWARD_IMAGES = 256
"""Images in one turn of the bare forward pass."""

STAGE_IMAGES = 128
"""Images, at least, that the stages of a worker are measured on."""


# --- sides, turns and ratios -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What a side did when it was its turn.

    Attributes:
        amount: units of work.
        seconds: how long they took.
        result: what came of them.
    """

    amount: float
    seconds: float
    result: Any = None

    @property
    def rate(self) -> float:
        """Units of work per second."""
        return self.amount / self.seconds


Side = Callable[[], Turn]


def clocked(amount: float, work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Side:
    """A side that does so many units of work in one call."""

    def turn() -> Turn:
        start = clock()
        result = work()
        return Turn(amount, clock() - start, result)

    return turn


@dataclass(frozen=True)
class Measured:
    """What `interleave` saw.

    Attributes:
        turns: of each side by its name, one for each round.
        loads: 1-minute load average at the start of each round, what others run included.
    """

    turns: dict[str, list[Turn]]
    loads: list[float]

    def result(self, side: str) -> Any:
        """What came of a side's last turn."""
        return self.turns[side][-1].result

    def ratio(self, side: str, other: str, times: float = 1) -> dict[str, Any]:
        """Rate of `side` ÷ (`times` × rate of `other`), round by round."""
        pairs = zip(self.turns[side], self.turns[other], strict=True)
        rounds = [turn.rate / (times * against.rate) for turn, against in pairs]
        return {"median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "rounds": rounds}

    def summary(self) -> dict[str, Any]:
        """Seconds and rates of each side as plain data."""
        return {
            name: {
                "amount": turns[0].amount,
                "seconds": [turn.seconds for turn in turns],
                "seconds_min": min(turn.seconds for turn in turns),
                "seconds_median": statistics.median(turn.seconds for turn in turns),
                "rate_median": statistics.median(turn.rate for turn in turns),
            }
            for name, turns in self.turns.items()
        }


def interleave(sides: Mapping[str, Side], rounds: int, warm_up: bool = False) -> Measured:
    """Let each side have its turn, and all of them again, round after round.

    Args:
        sides: by name, in the order of their turns.
        rounds: how often.
        warm_up: one more round before these, which does not count.
    """
    if warm_up:
        for side in sides.values():
            side()
    measured = Measured({name: [] for name in sides}, [])
    for number in range(rounds):
        measured.loads.append(os.getloadavg()[0])
        for name, side in sides.items():
            turn = side()
            measured.turns[name].append(turn)
            console.print(f"round {number + 1}/{rounds}: {name}: {turn.seconds:.3f} s, {turn.rate:.5g}/s")
    return measured


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """So many threads in PyTorch, FAISS, OpenCV and every BLAS of this process."""
    set_threads(threads)
    if find_spec("cv2"):
        import cv2

        cv2.setNumThreads(threads)
    with threadpool_limits(threads):
        yield


def machine_facts() -> dict[str, Any]:
    """What the figures depend on: processor, cores, versions."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = ("unianom", "torch", "timm", "ray", "faiss-cpu", "faiss-gpu", "numpy", "pillow", "pyarrow")
    found = {name: found for name in (*packages, *PEERS) if (found := _version(name)) is not None}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "versions": found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PEERS = ("anomalib", "adeval")
"""Packages that some benchmarks compare with where they are installed."""


def _absent(peers: Sequence[str]) -> list[str]:
    """A note for each peer that cannot be compared with."""
    return [f"{name}: not installed; pip install {name}" for name in peers if find_spec(name) is None]


def _report(options: Any, unit: str, measured: Measured, ratios: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Write everything as JSON to the benchmark's output and return it."""
    content = {
        "benchmark": next(name for name, (cls, _) in BENCHMARKS.items() if cls is type(options)),
        "options": to_plain(options),
        "machine": machine_facts(),
        "unit": unit,
        "loads": measured.loads,
        "sides": measured.summary(),
        "ratios": ratios,
        "notes": [],
        **more,
    }
    files.write_json(options.output, content)
    return content


def print_report(content: dict[str, Any]) -> None:
    """Sides, ratios and what else a benchmark found, as tables."""
    unit = content["unit"]
    rows = [
        [name, f"{s['seconds_min']:.3f}", f"{s['seconds_median']:.3f}", f"{s['rate_median']:.5g}"]
        for name, s in content["sides"].items()
    ]
    print_table(f"{content['benchmark']}: turns", ["side", "min s", "median s", f"{unit}/s (median)"], rows)
    rows = [[name, *(f"{r[key]:.3f}" for key in ("median", "min", "max"))] for name, r in content["ratios"].items()]
    print_table("ratios, round by round", ["ratio", "median", "min", "max"], rows)
    for title, table in content.get("tables", {}).items():
        columns = list(dict.fromkeys(key for row in table.values() for key in row))
        rows = [[name, *(_cell(row.get(key)) for key in columns)] for name, row in table.items()]
        print_table(title, ["", *columns], rows)
    for note in content["notes"]:
        console.print(note)
    machine = content["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; load average {min(content['loads']):.2f} to "
        f"{max(content['loads']):.2f}; Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    )


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


# --- pipe: scoring against the bare forward pass ---------------------------------------------------------------------


@dataclass(frozen=True)
class PipeBenchmark:
    """R_pipe: images scored end to end per second ÷ (workers × those of the bare backbone on one thread).

    Args:
        model: model folder of a memory method; path or URI.
        shards: shard set, all splits are scored; path or URI.
        output: JSON file to write; path or URI.
        workers: actors of one thread each; null takes one a core.
        rounds: turns of each side.
        maps: keep anomaly maps.
        batch_size: images in one forward pass, on all sides.
    """

    model: str
    shards: str
    output: str
    workers: int | None = None
    rounds: int = 3
    maps: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        _check_positive(self, "rounds", "batch_size", "workers")


def measure_pipe(options: PipeBenchmark) -> dict[str, Any]:
    """Score a shard set as jobs/score.py does, in turns with the bare forward pass.

    A turn of scoring lasts from the start of the first unit to the end of the last, so Ray's start-up is not in it; it
    is told apart. The bare forward pass is timm's `forward_features`, all blocks, on decoded images kept in memory:
    in one process, and in as many processes at the same time as there are workers.
    """
    shards = ShardSet.open(options.shards)
    workers = options.workers or os.cpu_count() or 1
    runtime = RuntimeOptions(workers=workers)
    model = _memory_model(options.model)
    images = shards.count(Selection())
    connect(runtime)
    alone, together = "bare forward, 1 process", f"bare forward, {workers} processes at once"
    walls: list[float] = []
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder:
        cached = str(Path(folder) / "images.npy")
        batches = input_batches(model, shards, Selection(), options.batch_size)
        np.save(cached, np.concatenate(list(islice(batches, max(1, FORWARD_IMAGES // options.batch_size)))))

        def score() -> Turn:
            with TemporaryDirectory(dir=folder) as output:
                start = time.perf_counter()
                results = list(
                    run_units(PartScorer, scorer_arguments(options, shards, output), _units(shards), runtime)
                )
                walls.append(time.perf_counter() - start)
            return Turn(images, span(results))

        with BareForward(options.model, cached, options.batch_size, workers) as bare:
            sides: dict[str, Side] = {
                OURS: score,
                alone: lambda: Turn(*bare.run(1)),
                together: lambda: Turn(*bare.run(workers)),
            }
            measured = interleave(sides, options.rounds)
        stages = stage_split(options, shards, folder)
    starts = [wall - turn.seconds for wall, turn in zip(walls, measured.turns[OURS], strict=True)]
    notes = [f"Ray's start-up (actors, loading the model), not in R_pipe: {statistics.median(starts):.1f} s (median)"]
    if images < MEANINGFUL_IMAGES:
        notes.append(f"only {images} images: take at least {MEANINGFUL_IMAGES} for a figure that means something")
    return _report(
        options,
        "images",
        measured,
        {
            f"R_pipe = {OURS} ÷ ({workers} × {alone})": measured.ratio(OURS, alone, workers),
            f"{OURS} ÷ {together}": measured.ratio(OURS, together),
        },
        start_up_seconds=starts,
        tables={"one worker, CPU milliseconds an image": stages},
        notes=notes,
    )


def scorer_arguments(options: PipeBenchmark, shards: ShardSet, output: str) -> dict[str, Any]:
    """Arguments of `PartScorer`, as jobs/score.py gives them."""
    shelf = ModelShelf.open(options.model)
    return {
        "shards": shards,
        "selection": Selection(),
        "shelf": shelf,
        "digests": dict(zip(shelf.folders, (model["digest"] for model in shelf.descriptions()), strict=True)),
        "output": output,
        "plan": files.digest_of(to_plain(options)),
        "maps": options.maps,
        "batch_size": options.batch_size,
        "limits": ImageLimits(),
        "device": "cpu",
        "threads": 1,
    }


def span(results: Sequence[dict[str, Any]]) -> float:
    """Seconds from the start of the first unit to the end of the last."""
    return max(result[ENDED] for result in results) - min(result[STARTED] for result in results)


def _units(shards: ShardSet) -> list[dict[str, Any]]:
    return [{"part": part} for part in shards.parts]


def _memory_model(folder: str) -> Model:
    shelf = ModelShelf.open(folder)
    if shelf.by_category:
        raise OptionError(f"{folder} holds a model for each category; give the folder of one of them")
    model = load_model(shelf.uri, "cpu")
    if not isinstance(model.method, MemoryMethod):
        raise OptionError(f"{folder} holds a {model.method.name}; this benchmark takes models with a memory bank")
    return model


def input_batches(model: Model, shards: ShardSet, selection: Selection, batch_size: int) -> Iterator[torch.Tensor]:
    """Selected images as the network's input, B×3×S×S; a smaller last batch is left out."""
    policy = model.method.input
    waiting: list[np.ndarray] = []
    for part in shards.parts:
        for rows in shards.read(part, selection, ["image"]):
            for data in rows["image"].to_pylist():
                waiting.append(prepare_image(decode_image(data).pixels, policy))
                if len(waiting) == batch_size:
                    yield normalise(waiting, policy)
                    waiting = []


class StagedScorer(PartScorer):
    """A `PartScorer` that also tells how much CPU time its stages took."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def run(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Score a part; the record has the CPU seconds of each stage as "stages"."""
        self._seconds.clear()
        start = time.process_time()
        record = super().run(unit)
        # what is neither: reading and writing Parquet, packing maps, Ray's own threads
        rest = time.process_time() - start - sum(self._seconds.values())
        return {**record, "stages": {**self._seconds, "read, write, rest": rest}}

    def _decode(self, row: dict[str, Any]) -> Any:
        return self._clocked("decode", super()._decode)(row)

    def _model(self, folder: str) -> Model:
        new = folder not in self._models
        model = super()._model(folder)
        if new:
            method: Any = model.method
            method.embed = self._clocked("forward", method.embed)
            for name in ("find_patches", "read_maps", "read_scores"):
                setattr(method, name, self._clocked("search, map", getattr(method, name)))
        return model

    def _clocked(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self._seconds[stage] += time.thread_time() - start

        return call


def stage_split(options: PipeBenchmark, shards: ShardSet, folder: str) -> dict[str, dict[str, float]]:
    """CPU milliseconds an image of each stage of one worker, and its share."""
    units = _units(shards)
    entries = shards.manifest["files"]
    enough = next((n for n in range(1, len(units)) if sum(e["rows"] for e in entries[:n]) >= STAGE_IMAGES), len(units))
    seconds: dict[str, float] = {}
    images = 0
    with TemporaryDirectory(dir=folder) as output:
        arguments = scorer_arguments(options, shards, output)
        for result in run_units(StagedScorer, arguments, units[:enough], RuntimeOptions(workers=1)):
            for stage, spent in result["stages"].items():
                seconds[stage] = seconds.get(stage, 0.0) + spent
            images += result["rows"]
    total = sum(seconds.values())
    return {
        stage: {"ms": 1000 * spent / images, "share": spent / total}
        for stage, spent in {**seconds, "all": total}.items()
    }


# --- ingest: against a loop of Pillow --------------------------------------------------------------------------------


@dataclass(frozen=True)
class IngestBenchmark:
    """R_ingest: images ingested per second ÷ those that a pool of processes opens with Pillow.

    Args:
        layout: name of the source's layout.
        source: root folder on this machine.
        output: JSON file to write; path or URI.
        layout_options: options of the layout, by name.
        workers: actors, and processes of the pool; null takes one a core.
        rounds: turns of each side.
    """

    layout: str
    source: str
    output: str
    layout_options: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    workers: int | None = None
    rounds: int = 5

    def __post_init__(self) -> None:
        _check_positive(self, "rounds", "workers")
        if self.layout not in LAYOUTS:
            raise OptionError(f"no layout '{self.layout}'; known: {', '.join(LAYOUTS)}")
        object.__setattr__(self, "layout_options", plain_options(self.layout_options, LAYOUTS[self.layout].options))
        if not files.is_local(self.source):
            raise OptionError(f"source={self.source}: Pillow opens files of this machine only; give a local folder")


def measure_ingest(options: IngestBenchmark) -> dict[str, Any]:
    """Ingest a source, in turns with a warm pool of processes that open each image and mask and convert it to RGB.

    Ingest also binarises and packs masks, hashes, and writes Parquet to disk; the loop keeps nothing.
    """
    workers = options.workers or os.cpu_count() or 1
    runtime = RuntimeOptions(workers=workers)
    layout_options = make_options(LAYOUTS[options.layout], options.layout_options)
    refs = list(iter_samples(options.layout, options.source, layout_options))
    paths = [path for ref in refs for path in (ref.uri, ref.mask_uri) if path is not None]
    units = [
        {"number": number, "refs": [to_plain(ref) for ref in part]}
        for number, part in enumerate(plan_parts(refs, part_bytes=256 << 20, min_parts=16))
    ]
    connect(runtime)
    with (
        TemporaryDirectory(prefix="unianom-benchmark-") as folder,
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
    ):

        def ingest() -> Turn:
            with TemporaryDirectory(dir=folder) as output:
                arguments = {
                    "output": output,
                    "plan": "benchmark",
                    "limits": ImageLimits(),
                    "resize": None,
                    "threads": 2,
                }
                results = list(run_units(PartIngester, arguments, units, runtime))
            return Turn(sum(result["rows"] for result in results), span(results))

        def pillow() -> None:
            for _ in pool.map(open_rgb, paths, chunksize=16):
                pass

        peer = f"Pillow, {workers} processes"
        sides = {OURS: ingest, peer: clocked(len(refs), pillow)}
        measured = interleave(sides, options.rounds, warm_up=True)
    ratios = {f"R_ingest = {OURS} ÷ {peer}": measured.ratio(OURS, peer)}
    notes = []
    if (seconds := min(turn.seconds for turn in measured.turns[OURS])) < MEANINGFUL_SECONDS:
        notes.append(f"ingest took {seconds:.1f} s: below {MEANINGFUL_SECONDS} s this measures Ray, take more images")
    return _report(options, "images", measured, ratios, notes=notes)


# --- metrics: against the codes that papers report with --------------------------------------------------------------


@dataclass(frozen=True)
class MetricsBenchmark:
    """Pixel metrics against scikit-learn and a plain AUPRO, a sweep of 200 thresholds, anomalib and ADEval, on drawn
    anomaly maps: time, memory and values.

    Args:
        output: JSON file to write; path or URI.
        maps: anomaly maps, of which six in ten are anomalous.
        size: their height and width in pixels.
        rounds: turns of each side.
        threads: threads of each side.
    """

    output: str
    maps: int = 200
    size: int = 256
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "maps", "size", "rounds", "threads")


SWEEP = "sweep of 200 thresholds"
SCIKIT_LEARN = "scikit-learn, plain AUPRO"
ANOMALIB_AUPRO, ANOMALIB, ADEVAL = "anomalib AUPRO", "anomalib, all three", "ADEval"

OURS_BINNED = "unianom, binned"

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
        before = _resident_peak()
        METRIC_SIDES[name](maps, masks)
        return float(_resident_peak() - before)


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


# --- pixels: a thousand million of them in bounded memory ------------------------------------------------------------


@dataclass(frozen=True)
class PixelsBenchmark:
    """Binned pixel metrics of very many pixels: time, memory, and how far off they are where the exact ones are known.

    Args:
        output: JSON file to write; path or URI.
        pixels: how many, at least.
        size: height and width of a map.
        drawn: maps that are drawn; beyond, each is taken again with its scores scaled by another factor.
        exact_maps: maps that are also counted exactly.
    """

    output: str
    pixels: int = 1_000_000_000
    size: int = 256
    drawn: int = 200
    exact_maps: int = 200

    def __post_init__(self) -> None:
        _check_positive(self, "pixels", "size", "drawn", "exact_maps")


def measure_pixels(options: PixelsBenchmark) -> dict[str, Any]:
    """Two rows: a subset, against the exact metrics; all of them, with their own bounds."""
    count = -(-options.pixels // options.size**2)
    names = {"exact": options.exact_maps, "binned": options.exact_maps, "binned, all": count}
    sides: dict[str, Turn] = {}
    tables: dict[str, dict[str, Any]] = {}
    for name, maps in names.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            values, seconds, peak = pool.submit(count_drawn, options, maps, name == "exact").result()
        sides[name] = Turn(maps * options.size**2, seconds, values)
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
    measured = Measured({name: [turn] for name, turn in sides.items()}, [os.getloadavg()[0]])
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
        before, seconds = _resident_peak(), 0.0
        for number in range(count):
            turn, place = divmod(number, options.drawn)
            scores = maps[place] * np.float32(1.0007**turn)
            start = time.process_time()
            accumulator.update([scores], [masks[place]])
            seconds += time.process_time() - start
        start = time.process_time()
        values = accumulator.compute().as_dict()
        return values, seconds + time.process_time() - start, float(_resident_peak() - before)


# --- coreset: against the plain algorithm ----------------------------------------------------------------------------


@dataclass(frozen=True)
class CoresetBenchmark:
    """The greedy coreset against the plain algorithm and anomalib's, on the same projected features.

    Args:
        output: JSON file to write; path or URI.
        features: .npy file of N×D float32; null embeds the normal training images of `shards` with `model`.
        model: model folder of a memory method; path or URI.
        shards: shard set; path or URI.
        rows: how many features, drawn at random.
        count: how many of them to choose.
        projection: dimension in which they are compared; 0 for their own.
        seed: of the draw, the projection and the start rows.
        rounds: turns of each side.
        threads: threads of each side.
    """

    output: str
    features: str | None = None
    model: str | None = None
    shards: str | None = None
    rows: int = 40_000
    count: int = 4_000
    projection: int = 128
    seed: int = 0
    rounds: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "rows", "count", "rounds", "threads")
        if (self.features is None) == (self.model is None or self.shards is None):
            raise OptionError("give either features, or model and shards")
        if self.count > self.rows or self.projection < 0:
            raise OptionError("need count <= rows, and projection >= 0")


def measure_coreset(options: CoresetBenchmark) -> dict[str, Any]:
    """Choose the same coreset in three ways, and compare picks and cover radius."""
    features = _features(options)
    start_points = 10
    starts = np.random.default_rng(options.seed).choice(len(features), start_points, replace=False)  # as ours draws
    works: dict[str, Callable[[], Any]] = {
        OURS: lambda: greedy_coreset(features, options.count, options.seed, start_points).indices,
        "plain": lambda: plain_coreset(features, starts, options.count),
    }
    if find_spec("anomalib"):
        works["anomalib"] = anomalib_coreset(features, options.count, options.seed)
    with fixed_threads(options.threads):
        sides = {name: clocked(options.count, work) for name, work in works.items()}
        measured = interleave(sides, options.rounds)
        picks = {name: np.asarray(measured.result(name)) for name in works}
        same_rule = {"plain": picks[OURS]}
        if "anomalib" in picks:
            # anomalib starts from one random row, which is its first pick
            first = picks["anomalib"][0]
            initial = np.linalg.norm(features.astype(np.float64) - features[first], axis=1)
            same_rule["anomalib"] = np.r_[first, farthest_points(features, initial, options.count - 1).indices]
        table: dict[str, dict[str, Any]] = {
            name: {"cover radius": cover_radius(features, picks[name])} for name in works
        }
    for name, ours in same_rule.items():
        table[name]["picks we share by its start rule"] = f"{len(np.intersect1d(picks[name], ours))}/{options.count}"
    return _report(
        options,
        "picks",
        measured,
        {f"{OURS} ÷ {name}": measured.ratio(OURS, name) for name in works if name != OURS},
        tables={f"{options.count} of {len(features)} rows in {features.shape[1]} dimensions": table},
        notes=_absent(["anomalib"]),
    )


def _features(options: CoresetBenchmark) -> np.ndarray:
    """`rows` × `projection` float32."""
    if options.features is not None:
        everything = np.load(options.features, mmap_mode="r", allow_pickle=False)
    else:
        assert options.model is not None
        assert options.shards is not None
        everything = patch_features(_memory_model(options.model), ShardSet.open(options.shards), options.rows)
    if everything.ndim != 2 or len(everything) < options.rows:
        raise DataError(f"{options.rows} rows are wanted, there are features of shape {everything.shape}; lower --rows")
    drawn = np.random.default_rng(options.seed).choice(len(everything), options.rows, replace=False)
    features = np.asarray(everything[np.sort(drawn)], dtype=np.float32)
    if options.projection == 0:
        return features
    return features @ random_projection(features.shape[1], options.projection, seed=options.seed)


@torch.inference_mode()
def patch_features(model: Model, shards: ShardSet, rows: int) -> np.ndarray:
    """Kept patches of normal training images, M×D float32, from as many images as give at least `rows`."""
    method = model.method
    assert isinstance(method, MemoryMethod)
    kept: list[np.ndarray] = []
    for batch in input_batches(model, shards, Selection(("train",), (), (NORMAL,)), 1):
        embedding = method.embed_for_bank(batch)
        kept.append(embedding.patches[embedding.keep].float().numpy())
        if sum(len(patches) for patches in kept) >= rows:
            break
    return np.concatenate(kept)


def cover_radius(features: np.ndarray, picks: np.ndarray) -> float:
    """Largest distance of any row to its nearest pick, in float64."""
    rows = torch.from_numpy(features).double()
    chosen = rows[torch.from_numpy(np.asarray(picks))]
    return max(float(torch.cdist(block, chosen).amin(1).max()) for block in rows.split(2048))


# --- search: exact against inverted lists ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchBenchmark:
    """A fitted model's bank searched exactly and by inverted lists, with what the latter changes.

    Args:
        model: model folder of a memory method; path or URI.
        shards: shard set, whose test images are the queries; path or URI.
        output: JSON file to write; path or URI.
        images: how many.
        nprobe: lists that "ivf_flat" compares with each query.
        batch_size: images whose patches are searched at once.
        rounds: turns of each side.
        threads: threads of each side.
    """

    model: str
    shards: str
    output: str
    images: int = 64
    nprobe: int = 8
    batch_size: int = 8
    rounds: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        _check_positive(self, "images", "nprobe", "batch_size", "rounds", "threads")


@torch.inference_mode()
def measure_search(options: SearchBenchmark) -> dict[str, Any]:
    """Score the same patches with both kinds of bank, in turns."""
    model = _memory_model(options.model)
    method: Any = model.method
    batches = input_batches(model, ShardSet.open(options.shards), Selection(("test",)), options.batch_size)
    embeddings = [method.embed(batch) for batch in islice(batches, max(1, options.images // options.batch_size))]
    if not embeddings:
        raise DataError(f"{options.shards} has fewer than {options.batch_size} test images; lower --batch_size")
    queries = [embedding.patches[embedding.keep].numpy() for embedding in embeddings]
    vectors = method.require_bank().vectors()
    with fixed_threads(options.threads):
        banks = {
            "flat": MemoryBank.build(vectors),
            "ivf_flat": MemoryBank.build(vectors, kind="ivf_flat", nprobe=options.nprobe),
        }

        def searched(bank: MemoryBank) -> None:
            for some in queries:
                bank.search(some, method.config.neighbours)

        amount = sum(len(some) for some in queries)
        sides = {name: clocked(amount, partial(searched, bank)) for name, bank in banks.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
        scores = {}
        for name, method.bank in banks.items():
            scores[name] = torch.cat([method.score_patches(embedding).score for embedding in embeddings]).double()
        recall = banks["ivf_flat"].recall(np.concatenate(queries))
    change = (scores["ivf_flat"] - scores["flat"]).abs()
    found = {
        "images": len(change),
        "bank rows": len(vectors),
        "lists": banks["ivf_flat"].shards[0].index.nlist,
        "recall at 1": recall.at_1,
        "max |Δ image score|": float(change.max()),
        "relative": float((change / scores["flat"].abs()).max()),
    }
    return _report(
        options,
        "queries",
        measured,
        {"ivf_flat ÷ flat": measured.ratio("ivf_flat", "flat")},
        tables={"what ivf_flat changes": {f"nprobe {options.nprobe}": found}},
    )


# --- training: frozen features kept against encoded in every step ----------------------------------------------------


@dataclass(frozen=True)
class TrainingBenchmark:
    """Training steps on kept frozen features ÷ steps that run the frozen encoder on prepared images.

    Args:
        model: model folder of a trained method, whose options and weights the steps start from; path or URI.
        shards: shard set with normal training images of the model's categories; path or URI.
        output: JSON file to write; path or URI.
        images: images to train on, at least; whole parts are taken.
        steps: of a turn.
        rounds: turns of each side.
        threads: threads of each side.
        device: "cpu" or "cuda".
        precision: of the steps, "fp32" or "bf16".
    """

    model: str
    shards: str
    output: str
    images: int = 128
    steps: int = 10
    rounds: int = 3
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        _check_positive(self, "images", "steps", "rounds", "threads")


def measure_training(options: TrainingBenchmark) -> dict[str, Any]:
    """The same steps on the same images from either source; also what is kept, and what waiting for data takes."""
    shards = ShardSet.open(options.shards)
    model = load_model(options.model, options.device)
    method = model.method
    if not isinstance(method, TrainedMethod) or method.needs.prompts == "nearest" or method.needs.augmentation.active:
        raise OptionError(f"{options.model}: needs a trained method without augmentation or prompts by features")
    waiting: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory(prefix="unianom-benchmark-") as folder, fixed_threads(options.threads):
        sources, table, images = _sources(options, model, shards, Path(folder))

        def side(name: str) -> Side:
            trainer = _trainer(method, sources[name], images, options)

            def turn() -> Turn:
                start = time.perf_counter()
                told = list(trainer.steps(trainer.step + options.steps))
                if options.device == "cuda":
                    torch.cuda.synchronize()
                waiting[name] += [step["data"] / step["all"] for step in told]
                return Turn(options.steps, time.perf_counter() - start)

            return turn

        measured = interleave({name: side(name) for name in sources}, options.rounds, warm_up=True)
    for name, shares in waiting.items():
        table[name]["waiting for data"] = f"{100 * statistics.median(shares):.1f} %"
    return _report(
        options,
        "steps",
        measured,
        {f"{KEPT} ÷ {ENCODED}": measured.ratio(KEPT, ENCODED)},
        tables={f"{method.name} on {len(images)} images, batches of {method.config.training.batch_size}": table},
    )


KEPT, ENCODED = "features kept", "encoded every step"


def _sources(
    options: TrainingBenchmark, model: Model, shards: ShardSet, folder: Path
) -> tuple[dict[str, TrainingSet], dict[str, dict[str, Any]], TrainingImages]:
    """A training set that reads kept features and one that reads images; what each keeps; the images."""
    method = model.method
    assert isinstance(method, TrainedMethod)
    features, pixels = folder / "features", folder / PIXELS
    common: dict[str, Any] = {
        "shards": shards,
        "selection": learnable(model.categories, method.needs.labels),
        "policy": method.input,
        "limits": ImageLimits(),
        "half": True,
        "batch_size": 8,
        "device": options.device,
        "threads": options.threads,
    }
    preparers = {
        KEPT: PartPreparer(model=options.model, output=str(features), **common),
        ENCODED: PartPreparer(model=None, output=str(pixels), masks=method.needs.masks, **common),
    }
    table: dict[str, dict[str, Any]] = {}
    names: tuple[str, ...] = ()
    for name, preparer in preparers.items():
        start, rows, size = time.perf_counter(), 0, 0
        for part in shards.parts:
            record = preparer.run({"part": part})
            rows, size = rows + record["rows"], size + record["bytes"]
            names = tuple(record["names"]) or names if name == KEPT else names
            if rows >= options.images:
                break
        seconds = time.perf_counter() - start
        table[name] = {"kB kept an image": size / rows / 1000, "prepared, images/s": rows / seconds}
    everything = TrainingImages.choose(shards, model.categories, None, method.needs.labels)
    images = everything.of_parts(
        {n for n, part in enumerate(shards.parts) if (pixels / array_name(part, PIXELS)).exists()}
    )
    prepared = PreparedImages(Arrays(str(pixels), shards.parts, (PIXELS, MASKS), folder), images)
    kept = Arrays(str(features), shards.parts, names, folder)
    needs = method.needs
    companions = Companions(images, False, None) if needs.prompts or needs.synthetic else None
    sources = {
        name: TrainingSet(
            images,
            model.categories,
            needs,
            prepared if wants_pixels(needs, name == KEPT) else None,
            kept if name == KEPT else None,
            companions,
            synthesiser_of(method),
            seed=0,
        )
        for name in preparers
    }
    return sources, table, images


def _trainer(method: TrainedMethod, data: TrainingSet, images: TrainingImages, options: TrainingBenchmark) -> Trainer:
    order = Order(len(images), 0, method.config.training.batch_size)
    batches = Batches(data, order, 0, pin=options.device == "cuda", repeats=method.needs.repeats)
    return Trainer(method, batches, (options.rounds + 1) * options.steps, order.share, options.precision)


# --- inference: batch norm folded against left alone -----------------------------------------------------------------


@dataclass(frozen=True)
class InferenceBenchmark:
    """Predictions of a network with its batch norm folded into convolutions ÷ those of the network as it was trained.

    Args:
        model: model folder of a trained method; path or URI.
        output: JSON file to write; path or URI.
        images: random ones, predicted in a turn.
        batch_size: images in one forward pass.
        rounds: turns of each side.
        threads: threads of each side.
        device: "cpu" or "cuda".
    """

    model: str
    output: str
    images: int = 32
    batch_size: int = 8
    rounds: int = 5
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_positive(self, "images", "batch_size", "rounds", "threads")


def measure_inference(options: InferenceBenchmark) -> dict[str, Any]:
    """Images per second of both, and how far their scores and maps are apart."""
    trained, folded = (load_model(options.model, options.device) for _ in range(2))
    if not isinstance(trained.method, TrainedMethod):
        raise OptionError(f"{options.model} holds a {trained.method.name}; give a model of a trained method")
    folded.fold()
    side, count = trained.method.input.side, options.images
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, side, side, generator=generator).to(options.device)

    def predict(model: Model) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = [tuple(part.cpu() for part in model.method.predict(batch)) for batch in images.split(options.batch_size)]
        return [(anomaly_map, score) for anomaly_map, score in made]

    with fixed_threads(options.threads):
        sides = {
            "folded": clocked(count, lambda: predict(folded)),
            "as trained": clocked(count, lambda: predict(trained)),
        }
        measured = interleave(sides, options.rounds, warm_up=True)
    apart: dict[str, Any] = {}
    for place, name in enumerate(("map", "score")):
        one, other = (torch.cat([batch[place] for batch in measured.result(s)]) for s in ("folded", "as trained"))
        apart[f"largest difference, {name}"] = float((one - other).abs().max() / other.abs().max())
    ratios = {"folded ÷ as trained": measured.ratio("folded", "as trained")}
    return _report(options, "images", measured, ratios, tables={f"{trained.method.name}, relative": {"folded": apart}})


# --- similarity: UniNet's loss in blocks against whole matrices ------------------------------------------------------


@dataclass(frozen=True)
class SimilarityBenchmark:
    """UniNet's similarities (forward and backward pass) in blocks of rows ÷ with whole HW×HW matrices.

    Args:
        output: JSON file to write; path or URI.
        batch_size: images; published: 8.
        channels: of the level.
        side: height and width of the level; 64 of the finest one at 256 pixels.
        temperature: of the similarities.
        rounds: turns of each side.
        threads: threads of each side.
        device: "cpu" or "cuda".
    """

    output: str
    batch_size: int = 8
    channels: int = 256
    side: int = 64
    temperature: float = 0.1
    rounds: int = 3
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        _check_positive(self, "batch_size", "channels", "side", "rounds", "threads")


def measure_similarity(options: SimilarityBenchmark) -> dict[str, Any]:
    """Passes per second, memory at the peak beyond the maps themselves, and how far losses and gradients are apart."""
    steps = {
        name: partial(similarity_step, name, options.batch_size, options.channels, options.side, options.temperature)
        for name in (BLOCKS, WHOLE)
    }
    with fixed_threads(options.threads):
        sides = {name: clocked(1, partial(step, options.device)) for name, step in steps.items()}
        measured = interleave(sides, options.rounds, warm_up=True)
    table: dict[str, dict[str, Any]] = {}
    for name in steps:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a process's peak only ever rises
            peak = pool.submit(similarity_peak, steps[name], options.device, options.threads).result()
        table[name] = {"MB at the peak": peak / 1e6}
    (loss, gradient), (other_loss, other_gradient) = (measured.result(name) for name in (BLOCKS, WHOLE))
    table[BLOCKS]["loss apart, relative"] = abs(loss - other_loss) / abs(other_loss)
    table[BLOCKS]["gradient apart, relative"] = float(
        (gradient - other_gradient).abs().max() / other_gradient.abs().max()
    )
    name = f"{options.batch_size} maps of {options.channels}×{options.side}×{options.side}"
    return _report(
        options, "passes", measured, {f"{BLOCKS} ÷ {WHOLE}": measured.ratio(BLOCKS, WHOLE)}, tables={name: table}
    )


BLOCKS, WHOLE = "in blocks", "whole matrices"


def similarity_step(
    kind: str, count: int, channels: int, side: int, temperature: float, device: str
) -> tuple[float, torch.Tensor]:
    """One forward and backward pass; the loss, and the gradient of the student's maps."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, side, side)
    student, teacher = (torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(2))
    if kind == BLOCKS:
        logs = log_similarity(student, teacher, temperature)
    else:
        s, t = (torch.nn.functional.normalize(maps, dim=1).flatten(2).mT for maps in (student, teacher))
        similarity = (s @ t.mT / temperature).exp()
        logs = (similarity / (similarity.sum(2, keepdim=True) + EPSILON)).diagonal(dim1=1, dim2=2).log()
    loss = -logs.mean()
    loss.backward()
    assert student.grad is not None
    return float(loss.detach()), student.grad.cpu()


def similarity_peak(step: Callable[[str], Any], device: str, threads: int) -> float:
    """Bytes at the peak of a pass, of a process of its own on the CPU, beyond what it held before."""
    with fixed_threads(threads):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(device)
            return float(torch.cuda.max_memory_allocated())
        before = _resident_peak()
        step(device)
        return float(_resident_peak() - before)


def _resident_peak() -> int:
    """Bytes of memory that this process ever held; getrusage would count its parent's, too."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError as error:
        raise OptionError("memory on the CPU is measured on Linux alone; take --device cuda") from error
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# --- all of them -----------------------------------------------------------------------------------------------------


def _check_positive(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} must be at least 1")


BENCHMARKS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "pipe": (PipeBenchmark, measure_pipe),
    "ingest": (IngestBenchmark, measure_ingest),
    "metrics": (MetricsBenchmark, measure_metrics),
    "pixels": (PixelsBenchmark, measure_pixels),
    "coreset": (CoresetBenchmark, measure_coreset),
    "search": (SearchBenchmark, measure_search),
    "training": (TrainingBenchmark, measure_training),
    "inference": (InferenceBenchmark, measure_inference),
    "similarity": (SimilarityBenchmark, measure_similarity),
}
"""Options and measurement of each benchmark by its name on the command line."""


def measure(options: Any) -> dict[str, Any]:
    """Run the benchmark that these options belong to; returns what is written to its output.

    Raises:
        UnianomError: wrong options or inputs, or an output that is there already: figures are never replaced.
    """
    if files.exists(options.output):
        raise DataError(f"{options.output} is there already; choose another output, or remove it first")
    return next(run for cls, run in BENCHMARKS.values() if cls is type(options))(options)
