"""Seeded splits that depend on the names of the samples and on nothing else.

Every name is hashed together with the seed and the lowest hashes are drawn. The order in which samples are listed,
the machine and the library versions make no difference, and a name keeps its rank when others come or go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from unianom.errors import DataError, OptionError
from unianom.temporary_database import temporary_database


def hash_order(names: Iterable[str], seed: int) -> list[str]:
    """Return the names in a random order fixed by `seed`: ascending `draw_order`."""
    return sorted(names, key=lambda name: draw_order(name, seed))


def draw_order(name: str, seed: int) -> bytes:
    """Return the SHA-256 of "seed:name", by which names are ordered to be drawn."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def held_out_count(names: int, fraction: float) -> int:
    """Return how many of the names of a group `hold_out` draws."""
    count = round(fraction * names)
    return min(max(count, 1), names - 1) if 0 < fraction < 1 else count


def hold_out(sample_ids: Sequence[str], groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Draw the same share of every group, e.g. normal training images of each category for validation.

    Args:
        sample_ids: names to draw from, all different.
        groups: group of each name, e.g. its category.
        fraction: share to draw, 0…1.
        seed: another seed gives another draw.

    Returns:
        Of each group of n names round(fraction · n), but for 0 < fraction < 1 at least one of two or more, and
        never all of them.

    Raises:
        OptionError: `fraction` is outside 0…1.
        DataError: a name occurs twice.
        ValueError: `sample_ids` and `groups` differ in length.
    """
    if not 0 <= fraction <= 1:
        raise OptionError(f"the share to hold out must lie between 0 and 1, not {fraction}")
    drawn: set[str] = set()
    for names in _by_group(sample_ids, groups).values():
        drawn.update(hash_order(names, seed)[: held_out_count(len(names), fraction)])
    return drawn


def held_out_limits(names: Iterable[tuple[str, str]], fraction: float, seed: int) -> dict[str, bytes]:
    """Return the `draw_order` up to which `hold_out` draws the names of each group; the names are not held in memory.

    Args:
        names: to draw from, all different, each with its group.
        fraction, seed: see `hold_out`.

    Returns:
        By group; those of which nothing is drawn are left out.
    """
    limits: dict[str, bytes] = {}
    with temporary_database() as database:
        database.execute("create table names (member, place)")
        rows = ((group, draw_order(name, seed)) for name, group in names)
        database.executemany("insert into names values (?, ?)", rows)
        database.execute("create index by_place on names (member, place)")
        for group, count in database.execute("select member, count(*) from names group by member"):
            if drawn := held_out_count(count, fraction):
                limits[group] = database.execute(
                    "select place from names where member = ? order by place limit 1 offset ?", [group, drawn - 1]
                ).fetchone()[0]
    return limits


def few_shot(sample_ids: Sequence[str], groups: Sequence[str], shots: int, seed: int) -> set[str]:
    """Draw `shots` names of every group: the low-shot protocol draws k normal training images of each category.

    With one seed the draws are nested: those of k shots are among those of k + 1.

    Raises:
        OptionError: `shots` is below 1.
        DataError: a group has fewer names than `shots`, or a name occurs twice.
        ValueError: `sample_ids` and `groups` differ in length.
    """
    if shots < 1:
        raise OptionError(f"shots must be at least 1, not {shots}")
    drawn: set[str] = set()
    for group, names in _by_group(sample_ids, groups).items():
        if len(names) < shots:
            raise DataError(f"cannot draw {shots} shots of '{group}': it has only {len(names)} samples to draw from")
        drawn.update(hash_order(names, seed)[:shots])
    return drawn


def _by_group(sample_ids: Sequence[str], groups: Sequence[str]) -> dict[str, list[str]]:
    members: dict[str, list[str]] = {}
    seen: set[str] = set()
    for sample_id, group in zip(sample_ids, groups, strict=True):
        if sample_id in seen:
            raise DataError(f"sample_id '{sample_id}' occurs twice; a split needs unique names")
        seen.add(sample_id)
        members.setdefault(group, []).append(sample_id)
    return members
