"""Fit banks to few normal images, drawn several times (low-shot).

python jobs/low_shot.py uniformaly --shards shards/mvtec --output results/low_shot
"""

from pipelines.evaluation.options import LowShotOptions, protocol_options
from pipelines.runtime.cli import run


def main(options: LowShotOptions) -> None:
    """Run the draws and print their tables."""
    from pipelines.evaluation.low_shot import low_shot
    from pipelines.reporting.low_shot_report import print_low_shot

    result = low_shot(options)
    print_low_shot(result.content, result.folder, result.fresh)


if __name__ == "__main__":
    run(main, protocol_options(LowShotOptions))
