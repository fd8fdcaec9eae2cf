"""`unianom inspect` on a drawn corpus: what `make demo` runs, offline and without a GPU."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from pipelines.inspect.inspect import inspect
from pipelines.inspect.model import recipe_of
from pipelines.inspect.options import InspectOptions
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, parse
from pipelines.runtime.options import DemoOptions
from pipelines.training.options import train_options
from unianom.data.drawing import DEFECTS, draw_corpus
from unianom.weights import find_package, locate_package


def run_demo(options: DemoOptions) -> None:
    """Draw a corpus, then inspect it with the methods whose weights are there, side by side.

    Raises:
        WeightsError: not even the weights of PatchCore are there.
    """
    start = time.monotonic()
    root = Path(options.output).absolute()
    methods = ("patchcore", "uniformaly") if _has_weights("uniformaly") else ("patchcore",)
    with outputs.open_output(str(root), "demo", {"seed": options.seed}, overwrite=options.overwrite):
        console.print("draw a corpus in MVTec AD layout", style="bold")
        corpus = root / "corpus"
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            list(pool.map(partial(draw_corpus, corpus, seed=options.seed), [(category,) for category in DEFECTS]))
        output = str(root / "inspected")
        console.print(f"\nunianom inspect {corpus} --output {output} --methods '[{', '.join(methods)}]'", style="bold")
        inspect(
            InspectOptions(
                str(corpus),
                output,
                methods,
                overwrite=options.overwrite,
                runtime=options.runtime,
                tracking=options.tracking,
            )
        )
    if len(methods) < 2:
        console.print("UniFormaly was left out: unianom weights uniformaly --config offline/uniformaly says how")
    console.print(f"\ndemo:       {time.monotonic() - start:.0f} s. The pictures are drawn; with your own:")
    console.print("            unianom inspect FOLDER")


def _has_weights(method: str) -> bool:
    """Return whether the package that carries the weights of a method's offline recipe, and what reads it, are here."""
    given = ["--config", recipe_of(method), "--shards", "", "--output", ""]
    package = find_package(parse(train_options()[method], given).method.backbone.name)
    if package is None or locate_package(package) is None:
        return False
    return all(find_spec(name) is not None for name in package.needs)
