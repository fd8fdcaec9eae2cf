"""Search the options of a method, without test data.

python jobs/tune.py uniformaly --shards shards/mvtec --output campaigns/uniformaly
"""

from pipelines.runtime.cli import console, run
from pipelines.tuning.options import TuneOptions, tune_options


def main(options: TuneOptions) -> None:
    """Run a campaign and print what came of it."""
    from pipelines.tuning.printing import print_campaign, print_diagnosis
    from pipelines.tuning.tune import tune

    result = tune(options)
    for name, content in result.contents.items():
        if len(result.contents) > 1:
            console.print(name, style="bold")
        print_campaign(content)
    if result.diagnosis is not None:
        print_diagnosis(result.diagnosis)
    done = "ended" if result.fresh else "had ended already"
    console.print(f"campaign {done}: {result.folder}; recipe for jobs/train.py: {result.recipe}")


if __name__ == "__main__":
    run(main, tune_options())
