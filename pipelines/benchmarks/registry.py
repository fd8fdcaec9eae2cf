"""How fast the project is, as ratios to what it stands on and to what else does the same work.

Figures of one machine mean little on another, so every figure here is a ratio: both sides work on the same input in
the same process tree with fixed threads, in turns (A B A B …), so that whatever else the machine does hits both. A
ratio is the median of the ratios of the rounds; the load average is recorded with every round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.benchmarks.ingest import IngestBenchmark, measure_ingest
from pipelines.benchmarks.memory_bank import CoresetBenchmark, SearchBenchmark, measure_coreset, measure_search
from pipelines.benchmarks.metrics import (
    MetricsBenchmark,
    PixelsBenchmark,
    measure_metrics,
    measure_pixels,
)
from pipelines.benchmarks.scoring import PipeBenchmark, measure_pipe
from pipelines.benchmarks.training import (
    InferenceBenchmark,
    SimilarityBenchmark,
    TrainingBenchmark,
    measure_inference,
    measure_similarity,
    measure_training,
)
from unianom import files
from unianom.errors import DataError

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
