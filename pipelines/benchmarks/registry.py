"""How fast the project is, as ratios to what it stands on and to what else does the same work.

Figures of one machine mean little on another, so every figure here is a ratio: both sides work on the same input in
the same process tree with fixed threads, in turns (A B A B …), so that whatever else the machine does hits both. A
ratio is the median of the ratios of the rounds; the load average is recorded with every round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.benchmarks.encoder import measure_encoder
from pipelines.benchmarks.host import measure_host
from pipelines.benchmarks.image_scores import measure_scores
from pipelines.benchmarks.inference import measure_inference
from pipelines.benchmarks.ingest import measure_ingest
from pipelines.benchmarks.memory_bank import measure_coreset, measure_search
from pipelines.benchmarks.metrics import measure_metrics
from pipelines.benchmarks.options import (
    Benchmark,
    CoresetBenchmark,
    EncoderBenchmark,
    HostBenchmark,
    InferenceBenchmark,
    IngestBenchmark,
    MetricsBenchmark,
    PipeBenchmark,
    PixelsBenchmark,
    ScoresBenchmark,
    SearchBenchmark,
    ServingBenchmark,
    SimilarityBenchmark,
    TrainingBenchmark,
)
from pipelines.benchmarks.pixels import measure_pixels
from pipelines.benchmarks.scoring import measure_pipe
from pipelines.benchmarks.serving import measure_serving
from pipelines.benchmarks.similarity import measure_similarity
from pipelines.benchmarks.sizing import measure_sizing
from pipelines.benchmarks.sizing_options import SizingBenchmark
from pipelines.benchmarks.training import measure_training
from unianom import files
from unianom.errors import DataError

MEASURES: dict[type, Callable[[Any], dict[str, Any]]] = {
    PipeBenchmark: measure_pipe,
    HostBenchmark: measure_host,
    IngestBenchmark: measure_ingest,
    MetricsBenchmark: measure_metrics,
    PixelsBenchmark: measure_pixels,
    CoresetBenchmark: measure_coreset,
    SearchBenchmark: measure_search,
    ScoresBenchmark: measure_scores,
    TrainingBenchmark: measure_training,
    InferenceBenchmark: measure_inference,
    EncoderBenchmark: measure_encoder,
    SimilarityBenchmark: measure_similarity,
    SizingBenchmark: measure_sizing,
    ServingBenchmark: measure_serving,
}
"""The function that measures each benchmark."""


def measure(options: Benchmark) -> dict[str, Any]:
    """Run the benchmark that these options belong to; return what is written to its output.

    Raises:
        UnianomError: wrong options or inputs, or an output that is there already: figures are never replaced.
    """
    if files.exists(options.output):
        raise DataError(f"{options.output} is there already; choose another output, or remove it first")
    return MEASURES[type(options)](options)
