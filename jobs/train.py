"""Fit a method to the normal images of a shard set.

python jobs/train.py uniformaly --shards shards/mvtec --output runs/uniformaly
"""

from pipelines.runtime.cli import console, run
from pipelines.training.options import TrainJobOptions, train_options


def main(options: TrainJobOptions) -> None:
    """Train and print what came of it."""
    from pipelines.training.train import train

    for result in train(options):
        done = "fitted" if result.fresh else "was fitted already"
        console.print(f"model {done}: {result.folder} ({', '.join(result.categories)}: {result.summary})")
        for line in result.threshold_lines():
            console.print(line)
        if result.notice:
            console.print(result.notice)


if __name__ == "__main__":
    run(main, train_options())
