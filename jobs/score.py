"""Score a shard set with a model.

python jobs/score.py --model runs/uniformaly --shards shards/mvtec --output scores/mvtec
"""

from pipelines.inference.options import ScoreOptions
from pipelines.runtime.cli import console, run


def main(options: ScoreOptions) -> None:
    """Score and print what came of it."""
    from pipelines.inference.score import score

    result = score(options)
    statuses = ", ".join(f"{count} {status}" for status, count in result.scores.manifest["statuses"].items())
    done = "written" if result.fresh else "were complete already"
    console.print(f"scores {done}: {result.scores.uri} ({statuses})")


if __name__ == "__main__":
    run(main, ScoreOptions)
