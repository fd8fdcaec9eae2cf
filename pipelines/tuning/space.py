"""What a campaign searches: for every method a documented space of options, to be changed from YAML or command line.

Options are of two kinds. *Reading options* act after the network (k-ratio, weights of a decision, smoothing of maps),
so thousands of their settings are compared on kept raw outputs of a few images. *Trial options* change the network, its
training or the memory bank; each choice of them is a trial, finished by a search over the reading options.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unianom.errors import OptionError
from unianom.options import to_plain, with_values

CADA = "cada"
"""Name of calibrating on the command line of jobs/tune.py."""


@dataclass(frozen=True)
class Choice:
    """One of some values.

    Attributes:
        values: numbers, text, booleans, None, lists, or groups of options as dicts.
    """

    values: tuple[Any, ...]

    def sample(self, rng: np.random.Generator) -> Any:
        """One of them."""
        return self.values[int(rng.integers(len(self.values)))]

    def grid(self) -> list[Any]:
        """All of them."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A number between two.

    Attributes:
        low, high: both included.
        log: whether its logarithm is drawn evenly.
        integer: whether it is whole.
        steps: how many values a grid has.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False
    steps: int = 5

    def __post_init__(self) -> None:
        ordered = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
        if not ordered or not isinstance(self.steps, int) or self.steps < 2:
            raise OptionError(f"a range needs low < high and steps >= 2, got {self.low}, {self.high}, {self.steps}")
        if self.integer and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise OptionError(f"a range of whole numbers needs whole limits, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise OptionError(f"a logarithmic range must be above zero, got {self.low}")

    def sample(self, rng: np.random.Generator) -> float:
        """One value, drawn evenly, rounded to four digits."""
        return self._at(rng.random())

    def grid(self) -> list[Any]:
        """`steps` values from low to high."""
        return list(dict.fromkeys(self._at(step / (self.steps - 1)) for step in range(self.steps)))

    def _at(self, share: float) -> float:
        if self.log:
            value = self.low * (self.high / self.low) ** share
        else:
            value = self.low + (self.high - self.low) * share
        return self.rounded(value)

    def rounded(self, value: float) -> float:
        """Whole, or of four digits, so that a recipe can be read; never outside the range."""
        if self.integer:
            return round(value)  # whole limits keep it inside
        return min(max(float(f"{value:.4g}"), self.low), self.high)


@dataclass(frozen=True)
class Halves:
    """A list as the campaign is given it, its first and its second half: layers of whatever encoder."""

    def of(self, given: Sequence[Any]) -> Choice:
        """What that is of a list."""
        middle = (len(given) + 1) // 2
        found = (tuple(given), tuple(given[:middle]), tuple(given[middle:]))
        return Choice(tuple(dict.fromkeys(half for half in found if half)))


Domain = Choice | Range


@dataclass(frozen=True)
class Dimension:
    """One option and what is tried for it.

    Attributes:
        name: of the option, dotted, such as "bank.coreset_ratio"; or of a group, whose values are then dicts.
        domain: what is tried; `Halves` only in default spaces, where the given list is not known.
        why: what it does, in a few words.
    """

    name: str
    domain: Any
    why: str = ""


def _rate(low: float, high: float, why: str = "step size of the optimiser") -> Dimension:
    return Dimension("training.learning_rate", Range(low, high, log=True), why)


DISTANCE_MAPS = (
    Dimension("map.fuse", Choice(("sum", "mean")), "how the levels' maps are joined"),
    Dimension("map.blur", Choice(("gaussian", "box", "none")), "smoothing of the map"),
    Dimension("map.score_share", Choice((0.0, 0.001, 0.003, 0.01, 0.03, 0.1)), "pixels whose mean is the score"),
)

SPACES: dict[str, tuple[Dimension, ...]] = {
    "uninet": (
        _rate(1e-3, 1e-2, "of student and bottleneck"),
        Dimension("training.encoder_learning_rate", Range(1e-7, 1e-5, log=True), "of the target teacher"),
        Dimension("temperature", Choice((0.1, 0.3, 1.0, 2.0)), "T, of the similarities"),
        Dimension("margin", Choice((0.5, 1.0, 2.0)), "τ, of the margin loss"),
        Dimension("balance", Range(0.5, 0.9), "λ, of distillation against similarity loss"),
        Dimension("alpha", Choice((0.001, 0.003, 0.01, 0.03, 0.1)), "upper limit of the decision's share of pixels"),
        Dimension("beta", Choice((3e-5, 3e-4, 3e-3, 3e-2)), "lower limit of that share"),
        Dimension("score_blur", Choice((0.0, 2.0, 4.0, 6.0)), "smoothing before the score"),
    ),
    "onenip": (
        _rate(3e-5, 1e-3),
        Dimension("segmentation_weight", Range(0.1, 2.0, log=True), "λ, of the Dice loss"),
        Dimension("taps", Choice(((2, 4, 8, 16), (4, 8, 16), (8, 16))), "layers of the encoder"),
        Dimension("alpha", Choice(tuple(n / 10 for n in range(11))), "α, the refiner's share in the map"),
        Dimension("score_pool", Choice((1, 4, 8, 16, 32)), "mean filter before the maximum"),
    ),
    "unias": (
        _rate(3e-5, 1e-3),
        Dimension("loss_weight", Range(0.3, 3.0, log=True), "of the sum of all losses"),
        Dimension("levels", Choice(((), (4,), (3, 4), (2, 3, 4), (1, 2, 3))), "levels whose maps are multiplied"),
        Dimension("fuse_at", Choice(("input", "finest")), "size at which they are"),
        Dimension("level_blur", Choice((False, True)), "smoothing of each before"),
        Dimension("reduce", Choice(("max", "std")), "from map to score"),
    ),
    "uniad": (
        _rate(3e-5, 1e-3),
        Dimension("neighbours", Choice((0, 3, 5, 7)), "square that attention does not see"),
        Dimension("map_form", Choice(("norm", "squared")), "from errors to map"),
        Dimension("reduce", Choice(("max", "mean", "std")), "from map to score"),
        Dimension("score_pool", Choice((1, 4, 8, 16, 32)), "mean filter before the maximum"),
    ),
    "revdist": (_rate(1e-3, 1e-2), *DISTANCE_MAPS),
    "recontrast": (_rate(5e-4, 5e-3), *DISTANCE_MAPS),
    "uniformaly": (
        Dimension("blocks", Halves(), "layers of the encoder"),
        Dimension("mask_threshold", Choice((0.0, 0.05, 0.1, 0.2)), "attention above which back-patch masking keeps"),
        Dimension("mask_kernel", Choice((1, 5, 7)), "smoothing of the attention before"),
        Dimension("bank.coreset_ratio", Choice((0.01, 0.05, 0.1)), "share of the patches in the bank"),
        Dimension("k_ratio", Choice((0.005, 0.01, 0.02, 0.05, 0.1, 0.2)), "patches whose mean is the score"),
        Dimension("neighbours", Choice((1, 3, 5)), "bank vectors averaged in a distance"),
        Dimension("blur_sigma", Choice((2.0, 4.0, 6.0, 8.0)), "smoothing of the map"),
    ),
    "patchcore": (
        Dimension("taps", Halves(), "layers of the encoder"),
        Dimension("bank.coreset_ratio", Choice((0.01, 0.05, 0.1)), "share of the patches in the bank"),
        Dimension("patch_size", Choice((1, 3, 5)), "cells that a patch is averaged over"),
        Dimension("neighbours", Choice((1, 3, 5, 9)), "bank vectors averaged in a distance"),
        Dimension("reweight", Choice((False, True)), "score weighed by the neighbourhood of the nearest vector"),
        Dimension("reweight_neighbours", Choice((3, 5, 9)), "how large that is"),
        Dimension("blur_sigma", Choice((2.0, 4.0, 6.0, 8.0)), "smoothing of the map"),
    ),
    "cada": (
        Dimension("alpha", Choice((None, 0.01, 0.1, 1.0, 10.0)), "α, of the smooth L1 loss; null from the data"),
        Dimension("statistics", Choice(("mean_max", "mean_std")), "what counts as the top of a map"),
        Dimension("head.dropout", Choice((0.0, 0.1, 0.25, 0.5)), "in the head"),
        Dimension("learning_rate", Range(5e-3, 1e-1, log=True), "of the head"),
        Dimension("score_share", Choice((0.0, 0.001, 0.003, 0.01, 0.03, 0.1)), "pixels whose mean is the score"),
    ),
}
"""The default space of methods, and of calibrating a model ("cada"); a method without one is searched as asked for."""


def space_of(name: str, config: Any, changes: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """The space that a campaign searches.

    Args:
        name: method.
        config: its options where nothing is searched; options that its default space names need not be there.
        changes: by option what to try in place of the default: a list of values, a range as {low, high} with log,
            integer and steps, null to leave the option alone, or one value to fix it at.

    Raises:
        OptionError: no such option, or a value that it refuses; names it. An option that is searched twice, alone and
            in a group.
    """
    plain = to_plain(config)
    dimensions = {dimension.name: _resolved(dimension, config) for dimension in SPACES.get(name, ())}
    for option, given in changes.items():
        _known(option, plain)
        if option == "preset":  # what it fills in is filled in already
            raise OptionError("space.preset: a preset is chosen for a whole campaign; give --method.preset")
        if given is None:
            dimensions.pop(option, None)
            continue
        why = dimensions[option].why if option in dimensions else ""
        dimensions[option] = Dimension(option, _domain(option, given, read_value(config, option)), why)
    for dimension in dimensions.values():
        for value in dimension.domain.grid():
            with_values(config, {dimension.name: value}, alone=True)
            inside = _leaves(value, f"{dimension.name}.") if isinstance(value, Mapping) else ()
            twice = sorted(dimensions.keys() & {option for option, _ in inside})
            if twice:
                raise OptionError(
                    f"space.{dimension.name}: {twice[0]} is searched alone, too; leave it out here, or give it null"
                )
    return tuple(dimensions.values())


def _resolved(dimension: Dimension, config: Any) -> Dimension:
    """A dimension of a default space for this config."""
    if not isinstance(dimension.domain, Halves):
        return dimension
    return replace(dimension, domain=dimension.domain.of(read_value(config, dimension.name)))


def _known(option: str, plain: Mapping[str, Any]) -> None:
    """Refuse an option that a config does not have."""
    inside: Any = plain
    for part in option.split("."):
        if not isinstance(inside, Mapping) or part not in inside:
            names = [name for name, _ in _leaves(plain)]
            near = difflib.get_close_matches(option, names, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise OptionError(f"space: there is no option '{option}'{hint}")
        inside = inside[part]


def _leaves(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in plain.items():
        yield prefix + key, value
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")


def _domain(option: str, given: Any, now: Any) -> Domain:
    """What is tried for an option whose value is `now`. Whole numbers for one that is a float become floats, so that
    equal values have one name."""
    if isinstance(given, Mapping) and {"low", "high"} <= set(given):
        unknown = sorted(set(given) - {"low", "high", "log", "integer", "steps"})
        if unknown:
            raise OptionError(f"space.{option}: a range has low, high, log, integer and steps, not {unknown[0]}")
        try:
            return Range(**given)
        except (TypeError, OptionError) as error:
            raise OptionError(f"space.{option}: {error}") from error
    if isinstance(given, list | tuple):
        if not given:
            raise OptionError(f"space.{option}: an empty list; name values, or null to leave the option alone")
        return Choice(tuple(dict.fromkeys(_like(value, now) for value in given)))
    return Choice((_like(given, now),))


def _like(value: Any, now: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and isinstance(now, float) else _hashable(value)


def _hashable(value: Any) -> Any:
    """Lists as tuples, so that values can be told apart; groups of options stay dicts of another kind."""
    if isinstance(value, Mapping):
        return Group(value)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


class Group(dict[str, Any]):
    """Options of a group as one value, which can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(to_plain(dict(self)), sort_keys=True))


def read_value(config: Any, name: str) -> Any:
    """The value of a dotted option, as plain data with tuples for lists."""
    inside: Any = to_plain(config)
    for part in name.split("."):
        inside = inside[part]
    return _hashable(inside)


def split_space(
    space: Sequence[Dimension], postprocess_options: Sequence[str]
) -> tuple[tuple[Dimension, ...], tuple[Dimension, ...]]:
    """Trial options and reading options of a space."""
    reading = tuple(dimension for dimension in space if dimension.name in postprocess_options)
    return tuple(dimension for dimension in space if dimension not in reading), reading


def grid(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Every combination of the grids of all dimensions, the last one varying fastest."""
    for values in itertools.product(*(dimension.domain.grid() for dimension in space)):
        yield {dimension.name: value for dimension, value in zip(space, values, strict=True)}


def grid_size(space: Sequence[Dimension]) -> int:
    """How many combinations `grid` has."""
    return math.prod(len(dimension.domain.grid()) for dimension in space)


MOST_IN_VAIN = 1000
"""Settings drawn in a row that all were there, until no more are drawn."""


def draw(space: Sequence[Dimension], count: int, seed: int) -> list[dict[str, Any]]:
    """Distinct random settings, fewer than `count` where there are no more; those of a smaller count are the first."""
    finite = all(isinstance(dimension.domain, Choice) for dimension in space)
    most = min(count, grid_size(space)) if finite else count
    rng = np.random.default_rng(seed)
    drawn: dict[str, dict[str, Any]] = {}
    in_vain = 0
    # rounded, a range has so many values only; how many is not known, but that new ones do not come any more is
    while len(drawn) < most and (finite or in_vain < MOST_IN_VAIN):
        values = {dimension.name: dimension.domain.sample(rng) for dimension in space}
        in_vain = in_vain + 1 if (key := key_of(values)) in drawn else 0
        drawn.setdefault(key, values)
    return list(drawn.values())


def settings_of(space: Sequence[Dimension], count: int, seed: int) -> list[dict[str, Any]]:
    """All combinations of single values where there are no more than `count`, else, and of ranges, as many random
    ones."""
    single = all(isinstance(dimension.domain, Choice) for dimension in space)
    return list(grid(space)) if single and grid_size(space) <= count else draw(space, count, seed)


def key_of(values: Mapping[str, Any]) -> str:
    """Text that is the same for the same values."""
    return json.dumps(to_plain(dict(values)), sort_keys=True, ensure_ascii=False)
