"""Judge stored scores: pass, review or fail, and a queue for review.

python jobs/decide.py --scores scores/mvtec --normals scores/mvtec_train --shards shards/mvtec --output decisions/mvtec
"""

from pipelines.inference.options import DecideOptions
from pipelines.runtime.cli import run


def main(options: DecideOptions) -> None:
    """Decide and print what came of it."""
    from pipelines.inference.decide import decide
    from pipelines.reporting.decision_report import print_decisions

    result = decide(options)
    print_decisions(result.summary, result.decisions.uri, result.fresh, result.written)


if __name__ == "__main__":
    run(main, DecideOptions)
