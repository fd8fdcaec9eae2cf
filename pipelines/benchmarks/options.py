"""What each benchmark of jobs/benchmark.py takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Interval

from pipelines.benchmarks.sizing_options import SizingBenchmark
from unianom import files
from unianom.data.image.options import Side
from unianom.data.layouts import LAYOUTS
from unianom.data.maps import MapsKept
from unianom.errors import OptionError
from unianom.options import AS_WRITTEN, AtLeastOne, AtLeastZero, Options, Positive, PositiveShare, named
from unianom.written import plain_options


class Benchmark(Protocol):
    """What the options of all benchmarks have."""

    @property
    def output(self) -> str:
        """JSON file to write; path or URI."""


@dataclass(frozen=True)
class CoresetBenchmark(Options):
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
    rows: AtLeastOne = 40_000
    count: AtLeastOne = 4_000
    projection: AtLeastZero = 128
    seed: int = 0
    rounds: AtLeastOne = 1
    threads: AtLeastOne = 1

    def check(self) -> None:
        _ = self.source
        if self.count > self.rows:
            raise OptionError("need count <= rows")

    @property
    def source(self) -> str | tuple[str, str]:
        """File of features, or model and shard set.

        Raises:
            OptionError: neither is given, or both.
        """
        embedded = None if self.model is None or self.shards is None else (self.model, self.shards)
        if self.features is not None and embedded is None:
            return self.features
        if self.features is None and embedded is not None:
            return embedded
        raise OptionError("give either features, or model and shards")


@dataclass(frozen=True)
class SearchBenchmark(Options):
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
    images: AtLeastOne = 64
    nprobe: AtLeastOne = 8
    batch_size: AtLeastOne = 8
    rounds: AtLeastOne = 5
    threads: AtLeastOne = 1


@dataclass(frozen=True)
class ScoresBenchmark(Options):
    """Image scores by bounded search against plain FAISS, a full search and anomalib's: CPU time, and equality.

    Args:
        model: model folder of a memory method; path or URI.
        shards: shard set, whose test images are scored; path or URI.
        output: JSON file to write; path or URI.
        bank_rows: vectors of a bank drawn from normal training images; null takes the model's own bank.
        share: of an image's patches whose mean is a score, besides the largest.
        images: how many.
        batch_size: images whose patches are searched at once.
        seed: of the draw.
        rounds: turns of each side.
        threads: threads of each side.
    """

    model: str
    shards: str
    output: str
    bank_rows: AtLeastOne | None = None
    share: PositiveShare = 0.05
    images: AtLeastOne = 32
    batch_size: AtLeastOne = 8
    seed: int = 0
    rounds: AtLeastOne = 3
    threads: AtLeastOne = 1


@dataclass(frozen=True)
class MetricsBenchmark(Options):
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
    maps: AtLeastOne = 200
    size: AtLeastOne = 256
    rounds: AtLeastOne = 5
    threads: AtLeastOne = 1


@dataclass(frozen=True)
class PixelsBenchmark(Options):
    """Binned pixel metrics of very many pixels: time, memory, and how far off they are where the exact ones are known.

    Args:
        output: JSON file to write; path or URI.
        pixels: how many, at least.
        size: height and width of a map.
        drawn: maps that are drawn; beyond, each is taken again with its scores scaled by another factor.
        exact_maps: maps that are also counted exactly.
    """

    output: str
    pixels: AtLeastOne = 1_000_000_000
    size: AtLeastOne = 256
    drawn: AtLeastOne = 200
    exact_maps: AtLeastOne = 200


@dataclass(frozen=True)
class IngestBenchmark(Options):
    """R_ingest: images ingested per second ÷ those that a pool of processes opens with Pillow.

    Args:
        layout: name of the source's layout.
        source: root folder on this machine.
        output: JSON file to write; path or URI.
        layout_options: options of the layout, by name.
        workers: actors, and processes of the pool; null takes one a core.
        rounds: turns of each side.
    """

    layout: str = field(metadata=named(LAYOUTS))
    source: str
    output: str
    layout_options: dict[str, Any] = field(default_factory=dict, metadata=AS_WRITTEN)
    workers: AtLeastOne | None = None
    rounds: AtLeastOne = 5

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = super().resolve(given)
        layout, own = given.get("layout"), given.get("layout_options")
        if layout not in LAYOUTS or not isinstance(own, dict):
            return given
        return {**given, "layout_options": plain_options(own, LAYOUTS[layout].options)}

    def check(self) -> None:
        if self.layout not in LAYOUTS:
            raise OptionError(f"no layout '{self.layout}'; known: {', '.join(LAYOUTS)}")
        if not files.is_local(self.source):
            raise OptionError(f"source={self.source}: Pillow opens files of this machine only; give a local folder")


@dataclass(frozen=True)
class TrainingBenchmark(Options):
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
    images: AtLeastOne = 128
    steps: AtLeastOne = 10
    rounds: AtLeastOne = 3
    threads: AtLeastOne = 1
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class EncoderBenchmark(Options):
    """The frozen encoder of a model by every engine for CPUs ÷ by PyTorch, in CPU seconds.

    Args:
        model: model folder; path or URI.
        output: JSON file to write; path or URI.
        images: random ones, in a timing.
        batch_size: images in one forward pass.
        rounds: turns of each engine.
        threads: threads of each engine.
    """

    model: str
    output: str
    images: AtLeastOne = 32
    batch_size: AtLeastOne = 8
    rounds: AtLeastOne = 5
    threads: AtLeastOne = 1


@dataclass(frozen=True)
class InferenceBenchmark(Options):
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
    images: AtLeastOne = 32
    batch_size: AtLeastOne = 8
    rounds: AtLeastOne = 5
    threads: AtLeastOne = 1
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class SimilarityBenchmark(Options):
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
    batch_size: AtLeastOne = 8
    channels: AtLeastOne = 256
    side: AtLeastOne = 64
    temperature: Positive = 0.1
    rounds: AtLeastOne = 3
    threads: AtLeastOne = 1
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class PipeBenchmark(Options):
    """R_pipe: images scored end to end per second ÷ (workers × those of the bare backbone on one thread).

    Args:
        model: model folder of a memory method; path or URI.
        shards: shard set, all splits are scored; path or URI.
        output: JSON file to write; path or URI.
        workers: actors of one thread each; null takes one a core.
        rounds: turns of each side.
        maps: which anomaly maps are kept.
        batch_size: images in one forward pass, on all sides.
        engine: what computes the encoder of the scoring; the bare backbone stays with PyTorch.
    """

    model: str
    shards: str
    output: str
    workers: AtLeastOne | None = None
    rounds: AtLeastOne = 3
    maps: MapsKept = "none"
    batch_size: AtLeastOne = 8
    engine: Literal["pytorch", "openvino", "openvino_bf16"] = "pytorch"


@dataclass(frozen=True)
class HostBenchmark(Options):
    """What an image costs the host while it is scored: CPU time of each stage beside the network, which costs nothing.

    Args:
        shards: shard set, all splits are scored; path or URI.
        output: JSON file to write; path or URI.
        resize: as of the option `method.input` of jobs/train.py, which says how images become input.
        size: as there.
        crop: as there.
        batch_size: images in one batch.
        threads: threads that decode and encode.
        rounds: turns of each side.
    """

    shards: str
    output: str
    resize: Literal["short_side", "stretch"] = "short_side"
    size: Side = 256
    crop: Side | None = 224
    batch_size: AtLeastOne = 8
    threads: AtLeastOne = 1
    rounds: AtLeastOne = 5


@dataclass(frozen=True)
class ServingBenchmark(Options):
    """A server under load: latencies, images per second ÷ those without a server, a full queue, a model replaced.

    Args:
        model: model folder of a memory method, on this machine.
        shards: shard set, whose first images are sent; path or URI.
        output: JSON file to write; path or URI.
        clients: that send images at the same time.
        overload_clients: the same, where there are too many.
        seconds: of a turn.
        rounds: turns of each side.
        max_batch_size: images in one forward pass, on all sides.
        engine: what computes the encoder of the server; the bare backbone stays with PyTorch.
        port: that the server listens on.
    """

    model: str
    shards: str
    output: str
    clients: AtLeastOne = 16
    overload_clients: AtLeastOne = 64
    seconds: Positive = 10.0
    rounds: AtLeastOne = 3
    max_batch_size: AtLeastOne = 8
    engine: Literal["pytorch", "openvino", "openvino_bf16"] = "pytorch"
    port: Annotated[int, Interval(ge=1, le=65535)] = 8009

    def check(self) -> None:
        if not files.is_local(self.model):
            raise OptionError(f"model={self.model}: a copy of it is served; give a folder of this machine")


BENCHMARKS: dict[str, type] = {
    "pipe": PipeBenchmark,
    "host": HostBenchmark,
    "ingest": IngestBenchmark,
    "metrics": MetricsBenchmark,
    "pixels": PixelsBenchmark,
    "coreset": CoresetBenchmark,
    "search": SearchBenchmark,
    "scores": ScoresBenchmark,
    "training": TrainingBenchmark,
    "inference": InferenceBenchmark,
    "encoder": EncoderBenchmark,
    "similarity": SimilarityBenchmark,
    "sizing": SizingBenchmark,
    "serving": ServingBenchmark,
}
"""The options of each benchmark by its name on the command line."""
