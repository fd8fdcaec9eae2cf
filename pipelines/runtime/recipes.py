"""The recipes that come with the jobs, found by name wherever the package is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "jobs" / "recipes"


def recipe_names() -> list[str]:
    """Return the names of all recipes: their paths below jobs/recipes, without ".yaml"."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def find_recipe(name: str) -> Path | None:
    """Return the file of a recipe, named as by `recipe_names` or as in a checkout; None if there is none."""
    name = _bare(name)
    return FOLDER / f"{name}.yaml" if name in recipe_names() else None


def nearest_recipes(name: str) -> list[str]:
    """Return up to three recipes whose names begin with one or resemble it."""
    name, names = _bare(name), recipe_names()
    beginning = [known for known in names if name and known.rpartition("/")[2].startswith(name)]
    near = difflib.get_close_matches(name, names, 3)
    leaves = {known.rpartition("/")[2]: known for known in names}
    near += [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition("/")[2], leaves, 3)]
    return list(dict.fromkeys([*beginning, *near]))[:3]


def _bare(name: str) -> str:
    return name.removeprefix("./").removeprefix("jobs/recipes/").removesuffix(".yaml")
