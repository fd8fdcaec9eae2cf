"""Bounded search against a full one: equal to the bit, whatever is proposed."""

import numpy as np
import pytest
import torch

from unianom.memory import bounded_search
from unianom.memory.bounded_search import search_largest
from unianom.memory.index import MemoryBank
from unianom.memory.origins import Origins
from unianom.memory.patch_distances import mean_distances
from unianom.memory.proposals import Proposals

D = 16


def _patches(images=6, patches=50, seed=1, spread=1.0):
    """Images whose patches lie near the bank, but for some."""
    rng = np.random.default_rng(seed)
    far = rng.random((images, patches, 1)) < 0.1
    values = _vectors(images * patches, seed + 1).reshape(images, patches, D) + 0.05 * rng.standard_normal((D,))
    values += far * rng.standard_normal((images, patches, D)) * spread
    return torch.from_numpy(values.astype(np.float32))


def _vectors(rows=2500, seed=0, offset=0.0, scale=1.0):
    """Vectors around 40 places that all seeds share."""
    places = 3 * np.random.default_rng(9).standard_normal((40, D))
    rng = np.random.default_rng(seed)
    chosen = places[rng.integers(0, len(places), rows)]
    return (offset + scale * (chosen + rng.standard_normal((rows, D)))).astype(np.float32)


def _full(bank, patches, keep, neighbours):
    distances = torch.zeros(*keep.shape, neighbours)
    rows = torch.zeros(*keep.shape, neighbours, dtype=torch.int64)
    found, ids = bank.search(patches[keep].numpy(), neighbours)
    distances[keep], rows[keep] = torch.from_numpy(found), torch.from_numpy(ids)
    return distances, rows


def _check(bank, patches, keep, neighbours, count):
    """Every patch of the wanted mean distance or more has its own distances and rows, and no other one reaches it."""
    distances, rows = search_largest(bank, patches, keep, neighbours, count)
    expected, expected_rows = _full(bank, patches, keep, neighbours)
    means = mean_distances(expected, neighbours)
    least = means.topk(count).values[:, -1:]
    wanted = means >= least
    assert torch.equal(distances[wanted], expected[wanted])
    assert torch.equal(rows[wanted], expected_rows[wanted])
    assert (mean_distances(distances, neighbours)[~wanted] < least.expand_as(means)[~wanted]).all()
    assert (distances >= expected).all()


@pytest.mark.parametrize("neighbours", [1, 2, 5])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_largest_distances_are_those_of_a_full_search(neighbours, shards):
    bank = MemoryBank.build(_vectors(), shards, proposals=True)
    patches = _patches()
    keep = torch.from_numpy(np.random.default_rng(4).random(patches.shape[:2]) < 0.8)
    keep[0] = True
    for count in (1, 3, 25, 50):
        for start, end in ((0, 6), (0, 1), (1, 3)):
            _check(bank, patches[start:end], keep[start:end], neighbours, count)


def test_images_of_which_no_patch_counts():
    bank = MemoryBank.build(_vectors(), proposals=True)
    patches, keep = _patches(), torch.zeros(6, 50, dtype=torch.bool)
    distances, rows = search_largest(bank, patches, keep, 2, 3)
    assert not distances.any()
    assert not rows.any()
    keep[2, :2] = True  # fewer than are wanted
    _check(bank, patches, keep, 1, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (4000 + np.random.default_rng(0).integers(-1, 2, (2500, D))).astype(np.float32),  # many exact ties
        lambda: np.repeat(_vectors(50), 50, axis=0),  # duplicates
        lambda: np.ones((2500, D), np.float32),  # one list
        lambda: _vectors(offset=300, scale=0.05),  # far from the origin, where FAISS's distances are wrong
        lambda: np.concatenate([_vectors(2499), np.full((1, D), 1e4, np.float32)]),
    ],
)
def test_ties_duplicates_and_rounding(make):
    vectors = make()
    bank = MemoryBank.build(vectors, 2, proposals=True)
    rng = np.random.default_rng(3)
    patches = vectors[rng.integers(0, len(vectors), (4, 30))]  # distances of zero
    patches[1:] += rng.integers(-1, 2, patches[1:].shape).astype(np.float32) * np.ptp(vectors[:100]) / 8
    keep = torch.ones(4, 30, dtype=torch.bool)
    for neighbours, count in ((1, 1), (3, 1), (1, 5), (2, 30)):
        _check(bank, torch.from_numpy(patches), keep, neighbours, count)


@pytest.mark.parametrize("few", [1, 3])
def test_nothing_depends_on_how_good_proposals_are(few, monkeypatch):
    monkeypatch.setattr(bounded_search, "MANY_PROBES", few)
    vectors, patches = _vectors(), _patches()
    bank = MemoryBank.build(vectors)
    rng = np.random.default_rng(0)
    keep = torch.ones(6, 50, dtype=torch.bool)
    for lists in (
        rng.integers(0, 7, 2500),  # at random
        np.zeros(2500),  # lists without rows
        np.arange(2500) % 3 == 0,
    ):
        bank.proposals = Proposals(rng.standard_normal((7, D)).astype(np.float32), lists.astype(np.int32), vectors)
        for neighbours, count in ((1, 1), (4, 5)):
            _check(bank, patches, keep, neighbours, count)


def test_most_patches_are_not_searched(monkeypatch):
    bank = MemoryBank.build(_vectors(), proposals=True)
    patches, keep = _patches(patches=400), torch.ones(6, 400, dtype=torch.bool)
    searched = []
    search = bank.search
    monkeypatch.setattr(bank, "search", lambda queries, k: searched.append(len(queries)) or search(queries, k))
    for count, most in ((1, 10), (20, 40)):
        searched.clear()
        search_largest(bank, patches, keep, 1, count)
        assert 6 * count <= sum(searched) <= 6 * most


def test_bounds_are_distances_to_rows_of_the_bank():
    vectors, queries = _vectors(), _vectors(40, seed=7)
    bank = MemoryBank.build(vectors, 3, proposals=True)
    exact = ((queries[:, None].astype(np.float64) - vectors[None]) ** 2).sum(2)
    bounds = bank.distance_bounds(queries, 3, 4)
    near = bank.proposals.near(queries, 3, 4)
    assert (np.sort(near, axis=1)[:, 1:] > np.sort(near, axis=1)[:, :-1]).all()
    own = np.sort(np.take_along_axis(exact, near, axis=1), axis=1)
    assert (bounds >= own.astype(np.float32)).all()
    assert np.allclose(bounds, own, rtol=1e-5)
    everything = bank.distance_bounds(queries, 3, 10_000)
    assert np.allclose(everything, np.sort(exact, axis=1)[:, :3], rtol=1e-2)  # all but for bfloat16's choice


def test_without_an_image_its_rows_are_not_proposed():
    vectors = _vectors()
    rows = np.random.default_rng(2).integers(0, 3, len(vectors)).astype(np.int32)
    bank = MemoryBank.build(vectors, 2, origins=Origins(("a", "b", "c"), rows), proposals=True)
    added = _vectors(20, seed=8)
    patches = torch.from_numpy(vectors[rows == 1][:120].reshape(3, 40, D))
    for extra in (None, added):
        left = bank.without_image(1, extra)
        assert (rows[left.proposals.near(patches[0].numpy(), 2, 5, rows == 1)] != 1).all()
        assert (left.distance_bounds(patches[0].numpy(), 1, 3) > 0).all()
        for neighbours, count in ((1, 1), (2, 4)):
            _check(left, patches, torch.ones(3, 40, dtype=torch.bool), neighbours, count)
