"""Binned metrics against the exact ones: the bounds hold, they are small, and nothing depends on who counted what."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.metrics.test_region import scenes
from unianom.errors import DataError, OptionError
from unianom.metrics import BinnedPixelAccumulator, pixel_metrics
from unianom.metrics.streaming import ANOMALOUS, REGION_UNIT, WEIGHT, bin_edges, score_bins

BOUNDED = ("auroc", "auroc_anomalous_only", "ap", "f1_max", "iou_max", "aupro")


def binned(maps, masks, bits=22, limit=0.3):
    accumulator = BinnedPixelAccumulator(limit, bits)
    accumulator.update(maps, masks)
    return accumulator


def check_bounds(maps, masks, bits, limit=0.3):
    """The exact value of every metric lies between the bounds; returns the largest error."""
    found, exact = binned(maps, masks, bits, limit).compute(), pixel_metrics(maps, masks, limit)
    errors = [0.0]
    for name in BOUNDED:
        metric, value = getattr(found, name), getattr(exact, name)
        if np.isnan(value):
            assert np.isnan(metric.value)
            continue
        assert metric.low <= value <= metric.high, name
        assert metric.low <= metric.value <= metric.high, name
        assert abs(value - metric.value) <= metric.error
        errors.append(metric.error)
    assert (found.n_maps, found.n_anomalous_maps, found.n_regions) == (
        exact.n_maps,
        exact.n_anomalous_maps,
        exact.n_regions,
    )
    assert found.soft_dice == pytest.approx(exact.soft_dice, nan_ok=True)
    assert found.soft_iou == pytest.approx(exact.soft_iou, nan_ok=True)
    return max(errors)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=30), st.integers(9, 24))
def test_bins_keep_the_order_of_scores_and_their_edges_flag_them(values, bits):
    scores = np.sort(np.array(values, np.float32))
    bins = score_bins(scores, bits)
    assert (np.diff(bins.astype(np.int64)) >= 0).all()
    edges = bin_edges(bins, bits)
    assert (scores >= edges).all()
    assert (score_bins(edges, bits) == bins).all()
    for edge, number in zip(edges, bins):
        assert ((scores >= edge) == (bins >= number)).all()


def test_a_bin_is_a_fixed_share_of_its_score():
    scores = np.geomspace(1e-6, 1e6, 50_000, dtype=np.float32)
    for signed in (scores, -scores[::-1]):
        edges = bin_edges(score_bins(signed, 22), 22)
        assert np.max((signed - edges) / np.abs(signed)) <= 2**-13 * 1.001
    assert score_bins(np.array([-0.0], np.float32)) == score_bins(np.array([0.0], np.float32))


@pytest.mark.parametrize("bits", [9, 12, 16, 22])
@pytest.mark.parametrize("levels", [2, 12, None])
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_exact_metrics_lie_within_the_bounds(bits, levels, limit):
    maps, masks = scenes(n=7, size=20, levels=levels, seed=3)
    check_bounds(maps, masks, bits, limit)


@settings(max_examples=50, deadline=None)
@given(
    arrays(
        np.float32, (3, 3, 3), elements=st.sampled_from([-3.0, -1.0, -0.99, 0.0, 1.0, 1.001, 1.002, 1.5, 2.0, 900.0])
    ),
    arrays(bool, (3, 3, 3)),
    st.sampled_from([9, 10, 14]),
)
def test_exact_metrics_lie_within_the_bounds_whatever_the_ties(maps, masks, bits):
    check_bounds(maps, masks, bits)


def test_more_bits_bound_more_tightly():
    maps, masks = scenes(n=12, size=64, levels=None, seed=4)
    errors = [check_bounds(maps, masks, bits) for bits in (10, 13, 16, 20, 22)]
    assert all(fine < coarse for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 1e-3


def test_small_error_at_the_default_of_maps_with_many_pixels():
    maps, masks = scenes(n=12, size=256, levels=None, seed=6)
    assert check_bounds(np.exp(0.4 * maps), masks, 22) < 2e-4


def test_constant_maps_are_chance_and_say_that_nothing_is_known():
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2] = True
    found = binned(np.full((2, 4, 4), 7.0, np.float32), masks).compute()
    assert (found.auroc.value, found.ap.value) == (0.5, pytest.approx(4 / 32))
    assert found.auroc.error == pytest.approx(0.5)


def test_undefined_without_both_kinds_of_pixels():
    maps = np.ones((1, 3, 3), np.float32)
    for mask in (np.zeros((1, 3, 3), bool), np.ones((1, 3, 3), bool)):
        found = binned(maps, mask).compute()
        assert np.isnan([getattr(found, name).value for name in BOUNDED]).all()
    empty = BinnedPixelAccumulator()
    assert np.isnan(empty.compute().auroc.value)
    assert len(empty.curves()["roc"].x) == 0


def test_every_region_weighs_the_same():
    maps, masks = scenes(n=9, size=30, levels=None, seed=7)
    accumulator = binned(maps, masks)
    _, counts = accumulator.table()
    assert counts[:, WEIGHT].sum() == accumulator.compute().n_regions * REGION_UNIT
    assert counts[:, ANOMALOUS].sum() == masks.sum()


def test_pro_is_off_by_less_than_a_unit_at_every_bin():
    rng = np.random.default_rng(8)
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 3:30, 3:34] = True  # 837 pixels, a number that does not divide 2**32
    scores = rng.random((1, 40, 40)).astype(np.float32)
    bins, counts = binned(scores, mask).table()
    reached = np.cumsum(counts[::-1, WEIGHT]) / REGION_UNIT
    share = [np.mean(score_bins(scores[mask]) >= number) for number in bins[::-1]]
    assert np.max(np.abs(reached - share)) < 1 / REGION_UNIT


def test_neither_batches_nor_workers_nor_their_order_matter():
    maps, masks = scenes(n=12, size=24, levels=None, seed=9)
    whole = binned(maps, masks).to_arrays()
    for order, cuts in ((range(12), [5]), (range(11, -1, -1), [1, 4, 9]), ([3, 0, 7, 1, 2, 4, 5, 6, 8, 11, 10, 9], [])):
        merged = BinnedPixelAccumulator()
        for own in np.split(np.array(list(order)), cuts):
            merged.merge(binned(maps[own], masks[own]))
        assert merged.compute() == binned(maps, masks).compute()
        found = merged.to_arrays()
        assert all((found[name] == whole[name]).all() for name in ("bins", "counts", "n"))


def test_folding_early_changes_nothing(monkeypatch):
    maps, masks = scenes(n=12, size=24, levels=None, seed=9)
    expected = binned(maps, masks).compute()
    monkeypatch.setattr("unianom.metrics.streaming._PENDING_PIXELS", 1000)
    assert binned(maps, masks).compute() == expected
    monkeypatch.setattr("unianom.metrics.streaming._PENDING_ROWS", 100)
    assert binned(maps, masks).compute() == expected


def test_comes_back_from_a_file():
    accumulator = binned(*scenes(n=5, size=20, levels=None, seed=2), bits=18, limit=0.1)
    buffer = io.BytesIO()
    np.savez(buffer, **accumulator.to_arrays())
    buffer.seek(0)
    again = BinnedPixelAccumulator.from_arrays(np.load(buffer, allow_pickle=False))
    assert again.compute() == accumulator.compute()
    again.update(*scenes(n=2, size=20, levels=None, seed=1))
    assert again.compute().n_maps == 7
    with pytest.raises(DataError, match="count the maps again"):
        BinnedPixelAccumulator.from_arrays({"bins": np.zeros(3)})


def test_curves_are_those_of_the_exact_metrics():
    maps, masks = scenes(n=8, size=40, levels=None, seed=5)
    accumulator = binned(maps, masks)
    curves = accumulator.curves(10**6)
    roc, pro = curves["roc"], curves["pro"]
    assert np.trapezoid(roc.y, roc.x) == pytest.approx(accumulator.compute().auroc.value, abs=1e-12)
    assert (pro.x[-1], pro.y[-1]) == (1, 1)
    inside = pro.x <= 0.3
    x = np.append(pro.x[inside], 0.3)
    y = np.append(pro.y[inside], np.interp(0.3, pro.x, pro.y))
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(accumulator.compute().aupro.value, abs=1e-9)
    assert all(len(curve.x) <= 20 for curve in accumulator.curves(20).values())


def test_names_carry_the_limit_and_the_error():
    found = binned(*scenes(n=5, size=20, levels=None, seed=2), limit=0.05).compute().as_dict()
    assert 0 <= found["aupro_0.05_error"] < 0.1
    assert "dsc" not in found
    assert "soft_dice" not in found


def test_errors_say_what_to_do():
    with pytest.raises(OptionError, match="bits=25"):
        BinnedPixelAccumulator(bits=25)
    with pytest.raises(OptionError, match="limit"):
        BinnedPixelAccumulator(aupro_limit=0)
    with pytest.raises(OptionError, match="use the same"):
        BinnedPixelAccumulator(bits=20).merge(BinnedPixelAccumulator(bits=18))
    with pytest.raises(DataError, match="NaN"):
        binned(np.full((1, 2, 2), np.nan, np.float32), np.zeros((1, 2, 2), bool))
