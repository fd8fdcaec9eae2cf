"""Make a model's scores comparable across categories.

python jobs/calibrate.py --model runs/uniformaly --shards shards/mvtec
"""

from pipelines.runtime.cli import console, run
from pipelines.training.options import CalibrateOptions


def main(options: CalibrateOptions) -> None:
    """Calibrate and print what came of it."""
    from pipelines.training.calibrate import calibrate

    for result in calibrate(options):
        done = "calibrated" if result.fresh else "was calibrated already"
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        console.print(f"model {done}: {result.folder} ({', '.join(result.categories)}; {figures})")


if __name__ == "__main__":
    run(main, CalibrateOptions)
