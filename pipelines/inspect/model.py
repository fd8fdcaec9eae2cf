"""A memory method fitted to the normal images of a folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipelines.inspect.options import InspectOptions
from pipelines.runtime.cli import console, parse
from pipelines.runtime.models import make_memory_method
from pipelines.training.options import TrainJobOptions, train_options
from pipelines.training.printing import print_fit
from pipelines.training.train import train
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.options import to_plain

COMPARISONS = 1_000_000_000
"""Distances that the choice of a coreset may take, the product of patches and vectors: about a minute of two cores.
More vectors than that allows hardly change what is found."""

MOST_VECTORS = 2_000
"""Vectors of a bank at most, since the time of scoring grows with them."""


def recipe_of(method: str) -> str:
    """Return the name of the recipe whose weights come from a Python package."""
    return f"offline/{method}"


@dataclass(frozen=True)
class Recipe:
    """A method as a recipe has it.

    Attributes:
        method: its name.
        options: of jobs/train.py, without shards and output.
        grid: height and width of its patches of an image.
    """

    method: str
    options: TrainJobOptions
    grid: tuple[int, int]


def read_recipes(options: InspectOptions) -> list[Recipe]:
    """Return the methods that are asked for, each made once, so that missing weights show.

    Raises:
        OptionError: no such recipe, or it does not fit its method.
        WeightsError: its weights are missing.
    """
    recipes = []
    names = options.recipes or tuple(recipe_of(method) for method in options.methods)
    for method, name in zip(options.methods, names, strict=True):
        given: TrainJobOptions = parse(train_options()[method], ["--config", name, "--shards", "", "--output", ""])
        recipes.append(Recipe(method, given, make_memory_method(method, given.method).grid))
    return recipes


def fit(recipe: Recipe, shards: ShardSet, output: str, options: InspectOptions) -> str:
    """Fit a method to the normal training images, or find it fitted; return the model folder.

    Args:
        recipe: the method.
        shards: images.
        output: model folder.
        options: target of the threshold, and workers.

    Raises:
        UnianomError: see `pipelines.training.train.train`.
    """
    images = shards.count(Selection(("train",), labels=(NORMAL,)))
    config = with_bounded_bank(recipe.options.method, recipe.grid, images)
    training = dataclasses.replace(
        recipe.options,
        shards=shards.uri,
        output=output,
        method=config,
        threshold=dataclasses.replace(recipe.options.threshold, target_fpr=options.target_fpr),
        overwrite=options.overwrite,
        limits=options.limits,
        runtime=options.runtime,
        tracking=options.tracking,
    )
    print_hidden(config, shards)
    for result in train(training):
        print_fit(result)
    return output


def with_bounded_bank(config: Any, grid: tuple[int, int], images: int) -> Any:
    """Return a memory method's options with a coreset that so many images, of so many patches, allow to be chosen in
    minutes."""
    patches = images * grid[0] * grid[1]
    most = min(MOST_VECTORS, max(500, COMPARISONS // patches))
    ratio = min(config.bank.coreset_ratio, most / patches)
    if ratio == config.bank.coreset_ratio:
        return config
    # written out in few digits, as it stands in the model and in what is printed
    bank = dataclasses.replace(config.bank, coreset_ratio=float(f"{ratio:.2g}"))
    console.print(f"  bank: {bank.coreset_ratio:g} of the patches, so that it is chosen in minutes")
    return dataclasses.replace(config, bank=bank)


def hidden_share(config: Any, height: int, width: int) -> float:
    """Return the share of an image of this size that the method's centre crop leaves out."""
    policy = config.input
    if policy.resize == "stretch":
        return 0.0
    scale = policy.size / min(height, width)
    return 1 - policy.cut**2 / ((height * scale) * (width * scale))


def print_hidden(config: Any, shards: ShardSet) -> None:
    """Say so where a centre crop hides part of the images, as published input policies do."""
    sizes = shards.table(columns=["height", "width"]).to_pylist()
    shares = [hidden_share(config, row["height"], row["width"]) for row in sizes]
    mean = sum(shares) / len(shares)
    if mean > 0:
        policy = to_plain(config.input)
        console.print(
            f"  note: the centre crop (size {policy['size']}, crop {policy['crop']}) hides {mean:.0%} of these images; "
            f"nothing is found there. --method.input.resize stretch in jobs/train.py, or input: {{resize: stretch}} in "
            f"the recipe, sees all of them"
        )
