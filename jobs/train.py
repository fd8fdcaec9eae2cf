"""Fit a method to the normal images of a shard set.

python jobs/train.py uniformaly --shards shards/mvtec --output runs/uniformaly
"""

from pipelines.runtime.cli import run
from pipelines.training.options import TrainJobOptions, train_options


def main(options: TrainJobOptions) -> None:
    """Train and print what came of it."""
    from pipelines.training.printing import print_fit
    from pipelines.training.train import train

    for result in train(options):
        print_fit(result)


if __name__ == "__main__":
    run(main, train_options())
