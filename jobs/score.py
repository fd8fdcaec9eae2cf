"""Score a shard set, or images from where they lie, with a model.

python jobs/score.py --model runs/uniformaly --shards shards/mvtec --output scores/mvtec
python jobs/score.py --model runs/uniformaly --images s3://line-3/2026-11 --output scores/november
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
    if result.stages:
        console.print(result.stages)


if __name__ == "__main__":
    run(main, ScoreOptions)
