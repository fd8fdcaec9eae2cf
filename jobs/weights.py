"""List the weights that recipes take, and where to get them.

python jobs/weights.py patchcore --config jobs/recipes/offline/patchcore.yaml
python jobs/weights.py recipes
"""

import json
from pathlib import Path

from pipelines.runtime.cli import console, run
from pipelines.training.options import RecipeWeightsOptions, TrainJobOptions, weights_options


def main(options: RecipeWeightsOptions | TrainJobOptions) -> None:
    """Print what is needed."""
    from pipelines.training.needed_weights import as_json, needed_weights, print_weights

    needed = needed_weights(options, str(Path(__file__).parent / "recipes"))
    if options.json:
        console.print(json.dumps(as_json(needed), indent=2))
    else:
        print_weights(needed)


if __name__ == "__main__":
    run(main, weights_options())
