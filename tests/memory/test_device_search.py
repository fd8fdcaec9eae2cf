"""The search on a device against the exact one, on the CPU as the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unianom.errors import OptionError
from unianom.memory import device_search
from unianom.memory.device_search import GROUP, DeviceBank, Products
from unianom.memory.index import MemoryBank

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative error of distances with products in float32."""


def rows_of(count: int, dimension: int = 40, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    """Rows around a few centres, as patches of a few materials are."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, dimension)) * 3
    rows = centres[generator.integers(0, 5, count)] + generator.normal(size=(count, dimension))
    return (rows + offset).astype(np.float32)


def search(vectors: np.ndarray, queries: np.ndarray, k: int, products: Products = "fp32") -> tuple:
    found = DeviceBank(vectors, CPU, products).search(torch.from_numpy(queries), k)
    return tuple(part.numpy() for part in found)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries and of 64 to 128 rows, so that few vectors make many."""
    monkeypatch.setattr(device_search, "QUERIES_AT_ONCE", 8)
    monkeypatch.setattr(device_search, "BLOCK_BYTES", 4 * 8 * 64)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_finds_what_the_exact_search_finds(k, offset):
    vectors, queries = rows_of(3001, offset=offset), rows_of(77, seed=1, offset=offset)
    expected, expected_rows = MemoryBank.build(vectors).search(queries, k)
    distances, rows = search(vectors, queries, k)
    assert rows.tolist() == expected_rows.tolist()
    np.testing.assert_allclose(distances, expected, rtol=TOLERANCE)
    assert distances.dtype == np.float32


def test_a_bank_far_from_the_origin_needs_its_mean_taken_off(monkeypatch):
    vectors, queries = rows_of(3001, offset=1000.0), rows_of(77, seed=1, offset=1000.0)
    expected = MemoryBank.build(vectors).search(queries, 1)[1]
    monkeypatch.setattr(DeviceBank, "_as_seen", lambda self, vectors: vectors)
    assert search(vectors, queries, 1)[1].tolist() != expected.tolist()


def test_equal_distances_come_in_the_order_of_rows():
    vectors = np.repeat(rows_of(50), 4, axis=0)[np.random.default_rng(0).permutation(200)]
    queries = np.concatenate([vectors[:30], rows_of(30, seed=1)])
    expected, expected_rows = MemoryBank.build(vectors).search(queries, 9)
    distances, rows = search(vectors, queries, 9)
    assert rows.tolist() == expected_rows.tolist()
    assert (distances[:30, :4] == 0).all()
    np.testing.assert_allclose(distances, expected, rtol=TOLERANCE)


def test_more_duplicates_than_are_proposed_still_have_the_right_distances():
    vectors = np.repeat(rows_of(10), 100, axis=0)
    queries = np.concatenate([vectors[::100], rows_of(20, seed=1)])
    expected, _ = MemoryBank.build(vectors).search(queries, 9)
    for products in ("fp32", "bf16"):
        np.testing.assert_allclose(search(vectors, queries, 9, products)[0], expected, rtol=TOLERANCE)


@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_blocks_change_nothing_but_rounding(products, small_blocks, monkeypatch):
    vectors, queries = rows_of(1000), rows_of(50, seed=1)
    in_blocks = search(vectors, queries, 3, products)
    monkeypatch.undo()
    whole = search(vectors, queries, 3, products)
    np.testing.assert_allclose(in_blocks[0], whole[0], rtol=TOLERANCE)
    assert in_blocks[1].tolist() == whole[1].tolist()
    one_by_one = [search(vectors, query[None], 3, products) for query in queries]
    assert np.concatenate([rows for _, rows in one_by_one]).tolist() == whole[1].tolist()


@pytest.mark.parametrize(("products", "thickness"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_without_spare_neighbours_distances_keep_to_the_stated_bound(products, thickness, monkeypatch):
    monkeypatch.setitem(device_search.SPARE, products, 0)
    generator = np.random.default_rng(3)
    # rows on a thin shell around each query: many are nearly as near as the nearest
    queries = generator.normal(size=(20, 64)).astype(np.float32)
    directions = generator.normal(size=(20, 200, 64))
    lengths = np.linalg.norm(directions, axis=2, keepdims=True) / (1 + thickness * generator.random((20, 200, 1)))
    shells = queries[:, None] + 0.5 * directions / lengths
    vectors = shells.reshape(-1, 64).astype(np.float32)
    exact = MemoryBank.build(vectors).search(queries, 1)[0].astype(np.float64)
    found = search(vectors, queries, 1, products)[0]
    centre = vectors.mean(0)
    lengths = np.linalg.norm(queries - centre, axis=1) + np.linalg.norm(vectors - centre, axis=1).max()
    e = 2.0**-24 * (64 + 20) * lengths[:, None] ** 2
    if products == "fp32":
        most = 2 * e
    else:
        r = 2.0**-8 * lengths[:, None] + np.sqrt(e)
        most = 4 * r * np.sqrt(exact) + 4 * r**2
    assert (found - exact <= most + 1e-6 * exact).all()
    assert (found > exact * (1 + 1e-6)).any()  # there was something to lose


def test_products_in_bfloat16_lose_nothing_among_distinct_rows():
    vectors, queries = rows_of(3000, dimension=200), rows_of(200, dimension=200, seed=1)
    expected, expected_rows = MemoryBank.build(vectors).search(queries, 3)
    distances, rows = search(vectors, queries, 3, "bf16")
    assert rows.tolist() == expected_rows.tolist()
    np.testing.assert_allclose(distances, expected, rtol=TOLERANCE)


def test_lower_precision_that_the_process_allows_is_not_used(monkeypatch):
    monkeypatch.setitem(device_search.SPARE, "fp32", 0)  # so that proposals must be right
    vectors, queries = rows_of(2000, dimension=256), rows_of(64, dimension=256, seed=1)
    expected = search(vectors, queries, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = search(vectors, queries, 5)
        setting = torch.backends.mkldnn.matmul.fp32_precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected))
    assert setting != "ieee"  # and is left as it was


def test_the_smallest_are_found_by_groups():
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 500, (20, 40 * GROUP)).astype(np.float32))
    found, place = device_search._smallest(values, 7)
    assert torch.equal(found.sort(1).values, values.sort(1).values[:, :7])
    assert torch.equal(values.gather(1, place), found)
    assert all(len(set(row)) == 7 for row in place.tolist())


@pytest.mark.parametrize("rows", [1, 5, GROUP, 100])
def test_all_rows_can_be_asked_for(rows):
    vectors, queries = rows_of(rows), rows_of(4, seed=1)
    expected = MemoryBank.build(vectors).search(queries, rows)[1]
    assert search(vectors, queries, rows)[1].tolist() == expected.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_a_query_that_is_not_finite_gets_no_finite_distance_and_others_theirs(value, products):
    vectors, queries = rows_of(GROUP + 1), rows_of(6, seed=1)
    expected = search(vectors, queries, 2, products)[0]
    queries[2, 5] = value
    distances, rows = search(vectors, queries, 2, products)
    assert not np.isfinite(distances[2]).any()
    assert (rows >= 0).all()
    assert (rows <= GROUP).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(distances[others], expected[others])


def test_rows_are_given_by_number():
    vectors = rows_of(70)
    rows = torch.tensor([[3, 69], [0, 3]])
    assert np.array_equal(DeviceBank(vectors, CPU).rows_at(rows).numpy(), vectors[rows.numpy()])


@pytest.mark.parametrize("k", [0, 11])
def test_refuses_more_neighbours_than_rows(k):
    with pytest.raises(OptionError, match=f"1 and the 10 rows of the bank, got {k}"):
        search(rows_of(10), rows_of(2), k)


def test_a_bank_that_does_not_fit_says_what_to_do(monkeypatch):
    def full(self, vectors):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceBank, "_proposing", full)
    with pytest.raises(OptionError, match=r"10 vectors of 40 values does not fit cpu.*search=exact.*coreset_ratio"):
        DeviceBank(rows_of(10), CPU)
