"""Fit a method to normal images, in shards or where they lie.

python jobs/train.py uniformaly --shards shards/mvtec --output runs/uniformaly
python jobs/train.py patchcore --images s3://line-3/good --output runs/line-3
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
