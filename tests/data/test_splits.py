"""Seeded splits against hand-computed hashes, plain counts and reordered input."""

import hashlib
import random

import pytest

from unianom.data.splits import draw_order, few_shot, hash_order, held_out_limits, hold_out
from unianom.errors import DataError, OptionError

IDS = [f"set/{group}/{number:03}.png" for group, size in (("a", 10), ("b", 25), ("c", 2)) for number in range(size)]
GROUPS = [name.split("/")[1] for name in IDS]


def sizes(drawn):
    return {group: sum(f"/{group}/" in name for name in drawn) for group in "abc"}


def test_order_is_that_of_the_published_hash():
    names = ["x", "y", "z", "w"]
    digests = {name: hashlib.sha256(b"7:" + name.encode()).hexdigest() for name in names}
    assert hash_order(names, 7) == sorted(names, key=digests.get)
    # Golden: a change of the hash would silently change every split anyone has published.
    assert hash_order(["a", "b", "c", "d", "e"], 0) == ["d", "a", "c", "b", "e"]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, {"a": 0, "b": 0, "c": 0}),
        (0.01, {"a": 1, "b": 1, "c": 1}),
        (0.2, {"a": 2, "b": 5, "c": 1}),
        (0.33, {"a": 3, "b": 8, "c": 1}),
        (0.99, {"a": 9, "b": 24, "c": 1}),
        (1.0, {"a": 10, "b": 25, "c": 2}),
    ],
)
def test_hold_out_draws_the_rounded_share_of_each_group(fraction, expected):
    assert sizes(hold_out(IDS, GROUPS, fraction, 0)) == expected


def test_hold_out_leaves_a_single_sample_alone():
    assert hold_out(["only"], ["g"], 0.9, 0) == set()


@pytest.mark.parametrize("draw", [lambda i, g, s: hold_out(i, g, 0.3, s), lambda i, g, s: few_shot(i, g, 2, s)])
def test_draws_depend_on_seed_and_names_only(draw):
    expected = draw(IDS, GROUPS, 3)
    pairs = list(zip(IDS, GROUPS, strict=True))
    random.Random(0).shuffle(pairs)
    assert draw([name for name, _ in pairs], [group for _, group in pairs], 3) == expected
    assert draw(IDS, GROUPS, 4) != expected
    # A group's draw is its own affair.
    alone = [name for name in IDS if "/b/" in name]
    assert draw(alone, ["b"] * len(alone), 3) == {name for name in expected if "/b/" in name}


def test_draws_are_nested():
    assert hold_out(IDS, GROUPS, 0.2, 1) < hold_out(IDS, GROUPS, 0.5, 1)
    assert few_shot(IDS, GROUPS, 1, 1) < few_shot(IDS, GROUPS, 2, 1)


def test_every_sample_is_drawn_by_some_seed_about_equally_often():
    names, draws = [f"n{i}" for i in range(20)], 2000
    counts = dict.fromkeys(names, 0)
    for seed in range(draws):
        for name in few_shot(names, ["g"] * 20, 5, seed):
            counts[name] += 1
    # Binomial(2000, 1/4): standard deviation 19.4, so five of them either way.
    assert all(abs(count - draws / 4) < 97 for count in counts.values())


def test_few_shot_draws_k_of_each_group():
    assert sizes(few_shot(IDS, GROUPS, 2, 0)) == {"a": 2, "b": 2, "c": 2}


def test_errors():
    with pytest.raises(DataError, match="cannot draw 3 shots of 'c': it has only 2"):
        few_shot(IDS, GROUPS, 3, 0)
    with pytest.raises(OptionError, match="at least 1"):
        few_shot(IDS, GROUPS, 0, 0)
    with pytest.raises(OptionError, match="between 0 and 1"):
        hold_out(IDS, GROUPS, 1.2, 0)
    with pytest.raises(DataError, match="'x' occurs twice"):
        hold_out(["x", "x"], ["g", "g"], 0.5, 0)
    with pytest.raises(ValueError):
        hold_out(["x"], ["g", "g"], 0.5, 0)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("seed", [0, 5])
def test_limits_draw_what_a_draw_in_memory_does(fraction, seed):
    ids, groups = [*IDS, "set/d/alone.png"], [*GROUPS, "d"]
    limits = held_out_limits(zip(ids, groups), fraction, seed)
    drawn = {name for name, group in zip(ids, groups) if draw_order(name, seed) <= limits.get(group, b"")}
    assert drawn == hold_out(ids, groups, fraction, seed)
    assert held_out_limits([], fraction, seed) == {}
