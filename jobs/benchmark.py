"""Measure speed, as ratios to what else does the same work.

python jobs/benchmark.py pipe --model runs/uniformaly --shards shards/mvtec --output benchmarks/pipe.json
"""

from pipelines.benchmarks.options import BENCHMARKS, Benchmark
from pipelines.runtime.cli import run


def main(options: Benchmark) -> None:
    """Measure and print the ratios."""
    from pipelines.benchmarks.printing import print_report
    from pipelines.benchmarks.registry import measure

    print_report(measure(options))


if __name__ == "__main__":
    run(main, BENCHMARKS)
