"""Evaluate a score set against labels and masks.

python jobs/evaluate.py --scores scores/mvtec --shards shards/mvtec --output evaluations/mvtec
"""

from pipelines.evaluation.options import EvaluateOptions
from pipelines.runtime.cli import run


def main(options: EvaluateOptions) -> None:
    """Evaluate and print the tables."""
    from pipelines.evaluation.evaluate import evaluate
    from pipelines.reporting.evaluation_report import print_evaluation

    print_evaluation(evaluate(options))


if __name__ == "__main__":
    run(main, EvaluateOptions)
