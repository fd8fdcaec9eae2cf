"""What each benchmark of jobs/benchmark.py takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unianom import files
from unianom.data.layouts import LAYOUTS
from unianom.errors import OptionError
from unianom.options import AS_WRITTEN
from unianom.written import plain_options


def check_positive(options: Any, *names: str) -> None:
    """Refuse options that are not null and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} must be at least 1")


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
        check_positive(self, "rows", "count", "rounds", "threads")
        if (self.features is None) == (self.model is None or self.shards is None):
            raise OptionError("give either features, or model and shards")
        if self.count > self.rows or self.projection < 0:
            raise OptionError("need count <= rows, and projection >= 0")


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
        check_positive(self, "images", "nprobe", "batch_size", "rounds", "threads")


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
        check_positive(self, "maps", "size", "rounds", "threads")


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
        check_positive(self, "pixels", "size", "drawn", "exact_maps")


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
        check_positive(self, "rounds", "workers")
        if self.layout not in LAYOUTS:
            raise OptionError(f"no layout '{self.layout}'; known: {', '.join(LAYOUTS)}")
        object.__setattr__(self, "layout_options", plain_options(self.layout_options, LAYOUTS[self.layout].options))
        if not files.is_local(self.source):
            raise OptionError(f"source={self.source}: Pillow opens files of this machine only; give a local folder")


@dataclass(frozen=True)
class TrainingBenchmark:
    """Training steps on kept frozen features ÷ steps that run the frozen encoder on prepared images.

    Args:
        model: model folder of a trained method, whose options and weights the steps start from; path or URI.
        shards: shard set with normal training images of the model's categories; path or URI.
        output: JSON file to write; path or URI.
        images: images to train on, at least; whole parts are taken.
        steps: of a timing.
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
        check_positive(self, "images", "steps", "rounds", "threads")


# --- inference: batch norm folded against left alone -----------------------------------------------------------------


@dataclass(frozen=True)
class InferenceBenchmark:
    """Predictions of a network with its batch norm folded into convolutions ÷ those of the network as it was trained.

    Args:
        model: model folder of a trained method; path or URI.
        output: JSON file to write; path or URI.
        images: random ones, predicted in a timing.
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
        check_positive(self, "images", "batch_size", "rounds", "threads")


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
        check_positive(self, "batch_size", "channels", "side", "rounds", "threads")


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
        check_positive(self, "rounds", "batch_size", "workers")


BENCHMARKS: dict[str, type] = {
    "pipe": PipeBenchmark,
    "ingest": IngestBenchmark,
    "metrics": MetricsBenchmark,
    "pixels": PixelsBenchmark,
    "coreset": CoresetBenchmark,
    "search": SearchBenchmark,
    "training": TrainingBenchmark,
    "inference": InferenceBenchmark,
    "similarity": SimilarityBenchmark,
}
"""The options of each benchmark by its name on the command line."""
