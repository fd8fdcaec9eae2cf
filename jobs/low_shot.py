"""Low-shot anomaly detection: banks of few normal images, drawn several times, on images that are embedded once.

python jobs/low_shot.py uniformaly --shards shards/mvtec --output results/low_shot
"""

from pipelines.evaluation.bank_protocol import protocol_options
from pipelines.evaluation.low_shot import LowShotOptions, low_shot, print_low_shot
from pipelines.runtime.cli import run


def main(options: object) -> None:
    """Run the draws and print their tables."""
    print_low_shot(low_shot(options))


if __name__ == "__main__":
    run(main, protocol_options(LowShotOptions))
