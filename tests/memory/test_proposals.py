"""Proposals: how they are built, saved and read."""

import json

import faiss
import numpy as np
import pytest

from unianom import files
from unianom.errors import ModelError
from unianom.memory.index import LEAST_ROWS, MemoryBank
from unianom.memory.proposals import PROPOSALS, Proposals, _means


def _vectors(rows=3000, dimension=12, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, dimension)).astype(np.float32)


def test_the_same_lists_on_any_number_of_threads():
    vectors, threads = _vectors(), faiss.omp_get_max_threads()
    try:
        built = []
        for count in (1, 3):
            faiss.omp_set_num_threads(count)
            built.append(Proposals.build(vectors, 5))
    finally:
        faiss.omp_set_num_threads(threads)
    assert np.array_equal(built[0].centroids, built[1].centroids)
    assert np.array_equal(built[0].lists, built[1].lists)
    assert not np.array_equal(built[0].centroids, Proposals.build(vectors, 6).centroids)


def test_rows_are_in_the_list_of_the_nearest_centroid():
    vectors = _vectors()
    made = Proposals.build(vectors, 0)
    assert made.centroids.shape == (219, 12)  # 4·√3000
    distances = ((vectors[:, None].astype(np.float64) - made.centroids[None]) ** 2).sum(2)
    assert np.array_equal(made.lists, distances.argmin(1))


def test_means_of_groups_and_what_empty_ones_keep():
    vectors = np.array([[1, 2], [3, 4], [5, 9]], np.float32)
    means = _means(vectors, np.array([2, 0, 2]), np.full((4, 2), 7, np.float32))
    assert means.tolist() == [[3, 4], [7, 7], [3, 5.5], [7, 7]]


def test_which_banks_have_proposals():
    vectors = _vectors(LEAST_ROWS)
    assert MemoryBank.build(vectors).proposals is None
    assert MemoryBank.build(vectors[1:], proposals=True).proposals is None
    assert MemoryBank.build(vectors, kind="ivf_flat", proposals=True).proposals is None
    bank = MemoryBank.build(vectors, proposals=True)
    assert bank.proposals is not None
    with pytest.raises(ModelError, match="has no proposals"):
        MemoryBank.build(vectors).distance_bounds(vectors[:3], 1, 1)


@pytest.mark.parametrize("shards", [1, 3])
def test_proposals_are_saved_with_the_bank(shards, tmp_path):
    uri, vectors, queries = str(tmp_path), _vectors(), _vectors(50, seed=1)
    bank = MemoryBank.build(vectors, shards, proposals=True)
    bank.save(uri)
    loaded = MemoryBank.load(uri)
    assert np.array_equal(loaded.distance_bounds(queries, 3, 4), bank.distance_bounds(queries, 3, 4))
    size = (tmp_path / PROPOSALS).stat().st_size
    assert size < 219 * 12 * 4 + 3000 * 4 + 500  # no vector of the bank is in it
    before = (tmp_path / PROPOSALS).read_bytes()
    loaded.save(uri)
    assert (tmp_path / PROPOSALS).read_bytes() == before
    MemoryBank.build(vectors).save(uri)  # a bank of before, over a newer one
    assert not (tmp_path / PROPOSALS).exists()
    assert "proposals" not in json.loads((tmp_path / "manifest.json").read_text())
    assert MemoryBank.load(uri).proposals is None


def test_damaged_proposals_are_named(tmp_path):
    vectors = _vectors()
    bank = MemoryBank.build(vectors, proposals=True)
    bank.save(str(tmp_path))
    good = (tmp_path / PROPOSALS).read_bytes()
    (tmp_path / PROPOSALS).write_bytes(good[:-1] + b"\xff")
    with pytest.raises(ModelError, match=r"proposals.safetensors is damaged"):
        MemoryBank.load(str(tmp_path))
    (tmp_path / PROPOSALS).unlink()
    with pytest.raises(ModelError, match=r"proposals.safetensors is missing"):
        MemoryBank.load(str(tmp_path))
    for content, message in ((good[:-1] + b"\xff", "does not spread the 3000 rows"), (b"{}", "cannot be read")):
        (tmp_path / PROPOSALS).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            Proposals.load(str(tmp_path), files.sha256_of(content), vectors)
    bank.save(str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"proposals": "proposals.safetensors"}))
    with pytest.raises(ModelError, match="not valid"):
        MemoryBank.load(str(tmp_path))
