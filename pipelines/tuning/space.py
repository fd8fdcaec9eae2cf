"""The space that a campaign searches: the method's default, changed from YAML or command line.

Options are of two kinds. *Postprocess options* act after the network (k-ratio, weights of a decision, smoothing of
maps), so thousands of their settings are compared on kept raw outputs of a few images. *Trial options* change the
network, its training or the memory bank; each choice of them is a trial, finished by a search over the postprocess
options.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.tuning.default_spaces import SPACES
from pipelines.tuning.dimensions import Choice, Dimension, Domain, Halves, Range
from unianom.errors import OptionError
from unianom.options import to_plain, with_values


def space_of(name: str, config: Any, changes: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """Return the space that a campaign searches.

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
    """Return a dimension of a default space for this config."""
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
    """Return what is tried for an option whose value is `now`.

    Whole numbers for one that is a float become floats, so that equal values have one name.
    """
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
    """Turn lists into tuples, so that values can be told apart; groups of options stay dicts of another kind."""
    if isinstance(value, Mapping):
        return Group(value)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


class Group(dict[str, Any]):
    """Options of a group as one value, which can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(to_plain(dict(self)), sort_keys=True))


def read_value(config: Any, name: str) -> Any:
    """Return the value of a dotted option, as plain data with tuples for lists."""
    inside: Any = to_plain(config)
    for part in name.split("."):
        inside = inside[part]
    return _hashable(inside)


def split_space(
    space: Sequence[Dimension], postprocess_options: Sequence[str]
) -> tuple[tuple[Dimension, ...], tuple[Dimension, ...]]:
    """Return the trial options and the postprocess options of a space."""
    postprocess = tuple(dimension for dimension in space if dimension.name in postprocess_options)
    return tuple(dimension for dimension in space if dimension not in postprocess), postprocess


def grid(space: Sequence[Dimension]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the grids of all dimensions, the last one varying fastest."""
    for values in itertools.product(*(dimension.domain.grid() for dimension in space)):
        yield {dimension.name: value for dimension, value in zip(space, values, strict=True)}


def grid_size(space: Sequence[Dimension]) -> int:
    """Return how many combinations `grid` has."""
    return math.prod(len(dimension.domain.grid()) for dimension in space)


MOST_IN_VAIN = 1000
"""Settings drawn in a row that all were there, until no more are drawn."""


def draw(space: Sequence[Dimension], count: int, seed: int) -> list[dict[str, Any]]:
    """Draw distinct random settings, fewer than `count` where there are no more.

    Those of a smaller count are the first of a larger one.
    """
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
    """Return all combinations of single values where there are no more than `count`, else, and of ranges, as many
    random ones."""
    single = all(isinstance(dimension.domain, Choice) for dimension in space)
    return list(grid(space)) if single and grid_size(space) <= count else draw(space, count, seed)


def key_of(values: Mapping[str, Any]) -> str:
    """Return text that is the same for the same values."""
    return json.dumps(to_plain(dict(values)), sort_keys=True, ensure_ascii=False)
