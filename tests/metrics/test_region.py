import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from unianom.errors import DataError, OptionError
from unianom.metrics import PixelAccumulator, aupro


def regions_by_flood_fill(mask):
    """Sets of pixels connected through their eight neighbours, by hand."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    regions = []
    while left:
        region, todo = set(), [left.pop()]
        while todo:
            r, c = todo.pop()
            region.add((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        regions.append(region)
    return regions


def aupro_by_definition(maps, masks, limit):
    """AUPRO from its definition: loops over thresholds, regions and pixels, in exact fractions."""
    regions = [(m, region) for m, mask in zip(maps, masks) for region in regions_by_flood_fill(mask)]
    normal = [float(v) for m, mask in zip(maps, masks) for v in m[~mask]]
    points = [(Fraction(0), Fraction(0))]
    for t in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        fpr = Fraction(sum(v >= t for v in normal), len(normal))
        overlaps = [Fraction(sum(float(m[p]) >= t for p in region), len(region)) for m, region in regions]
        points.append((fpr, sum(overlaps) / len(overlaps)))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        area += (end - x0) * (y0 + y_end) / 2
    return float(area / limit)


def scenes(n, size, levels, seed):
    """Maps with scores quantised to `levels` values (None: not at all) and masks with a few blobs or none."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(n, size, size)), (0, 1.5, 1.5)) > 0.25
    masks[::3] = False
    maps = rng.normal(size=masks.shape) + 1.2 * masks
    if levels is not None:
        maps = np.floor((maps - maps.min()) / np.ptp(maps) * levels)
    return maps.astype(np.float32), masks


@pytest.mark.parametrize("limit", [Fraction(3, 10), Fraction(1, 20), Fraction(1)])
@pytest.mark.parametrize("levels", [2, 5, 30, None])
def test_exact_is_the_definition(levels, limit):
    maps, masks = scenes(n=5, size=14, levels=levels, seed=7)
    expected = aupro_by_definition(maps, masks, limit)
    assert aupro(maps, masks, limit=float(limit)) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (2, 4, 4), elements=st.integers(0, 4).map(float)),
    arrays(bool, (2, 4, 4)),
    st.integers(1, 20),
)
def test_exact_is_the_definition_whatever_the_ties(maps, masks, twentieths):
    value = aupro(maps, masks, limit=twentieths / 20)
    if not masks.any() or masks.all():
        assert math.isnan(value)
    else:
        assert value == pytest.approx(aupro_by_definition(maps, masks, Fraction(twentieths, 20)), abs=1e-12)


def test_hand_computed_with_a_diagonal_cut_by_the_limit():
    # Normal scores 3, 1, 1, 1, 0; region one {4}, region two {1, 1}. FPR, PRO: (0, 1/2) from 4, (1/5, 1/2) from 3,
    # then a diagonal to (4/5, 1) where 1 ties. At 0.3 PRO is 1/2 + 1/2 * (0.1 / 0.6).
    maps = np.array([[[4, 3, 1, 1, 1, 1, 1, 0]]], np.float32)
    masks = np.array([[[1, 0, 1, 1, 0, 0, 0, 0]]], bool)
    at_limit = 0.5 + 0.5 * 0.1 / 0.6
    assert aupro(maps, masks) == pytest.approx((0.2 * 0.5 + 0.1 * (0.5 + at_limit) / 2) / 0.3, abs=1e-12)


def test_regions_count_alike_whatever_their_size():
    maps = np.zeros((1, 10, 10), np.float32)
    masks = np.zeros((1, 10, 10), bool)
    masks[0, 0, 0] = masks[0, 4:8, 4:8] = True
    maps[0, 0, 0] = 2
    # The single pixel is found at once; the large region ties with all normal pixels: from (0, 1/2) to (1, 1).
    assert aupro(maps, masks, limit=1.0) == pytest.approx(0.75)


def test_pixels_that_touch_at_a_corner_are_one_region():
    maps = np.zeros((1, 8, 8), np.float32)
    masks = np.zeros((1, 8, 8), bool)
    masks[0, 1, 1] = masks[0, 2, 2] = masks[0, 3, 1] = True  # joined by corners
    masks[0, 6, 6] = True
    accumulator = PixelAccumulator()
    accumulator.update(maps, masks)
    assert accumulator.compute().n_regions == 2


def test_regions_of_different_images_are_never_joined():
    masks = np.zeros((3, 4, 4), bool)
    masks[:, 1:3, 1:3] = True
    accumulator = PixelAccumulator()
    accumulator.update(np.zeros((3, 4, 4)), masks)
    assert accumulator.compute().n_regions == 3


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_perfect_maps_give_exactly_one(limit):
    _, masks = scenes(n=6, size=20, levels=None, seed=2)
    assert aupro(masks.astype(np.float32), masks, limit=limit) == 1


def test_reversed_maps_give_zero():
    _, masks = scenes(n=6, size=20, levels=None, seed=2)
    assert aupro(~masks, masks) == 0


def test_a_constant_map_gives_the_diagonal():
    _, masks = scenes(n=3, size=12, levels=None, seed=4)
    assert aupro(np.full(masks.shape, 0.7), masks) == pytest.approx(0.15)


def swept_by_loops(maps, masks, limit):
    """200 thresholds, FPR below the limit kept and rescaled by its own maximum: plain loops."""
    low, high = float(maps.min()), float(maps.max())
    points = []
    for i in range(200):
        t = np.float32(low + (high - low) * i / 200)
        overlaps = []
        for m, mask in zip(maps, masks):
            labels, count = ndimage.label(mask, np.ones((3, 3)))
            overlaps += [(m[labels == k] > t).mean() for k in range(1, count + 1)]
        fpr = (maps[~masks] > t).mean()
        if fpr < limit:
            points.append((fpr, np.mean(overlaps)))
    fpr, pro = np.array(sorted(points)).T
    return np.trapezoid(pro, fpr / fpr.max())


def test_legacy_variants_are_the_sweeps():
    maps, masks = scenes(n=6, size=24, levels=None, seed=11)
    got = aupro(maps, masks, variant="legacy_global_200")
    assert got == pytest.approx(swept_by_loops(maps, masks, 0.3), abs=1e-9)
    per_image = [swept_by_loops(maps[i : i + 1], masks[i : i + 1], 0.3) for i in range(6) if masks[i].any()]
    assert len(per_image) == 4
    assert aupro(maps, masks, variant="legacy_per_image") == pytest.approx(np.mean(per_image), abs=1e-9)
    assert got != pytest.approx(aupro(maps, masks), abs=1e-3)


def test_a_sweep_without_two_false_positive_rates_is_undefined():
    _, masks = scenes(n=3, size=12, levels=None, seed=4)
    assert math.isnan(aupro(np.ones(masks.shape), masks, variant="legacy_global_200"))


@pytest.mark.parametrize("variant", ["exact", "legacy_global_200", "legacy_per_image"])
@pytest.mark.parametrize("fill", [False, True])
def test_no_region_or_no_normal_pixel_is_undefined(variant, fill):
    maps = np.arange(18.0).reshape(2, 3, 3)
    assert math.isnan(aupro(maps, np.full(maps.shape, fill), variant=variant))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fast"}, "unknown AUPRO variant 'fast'; choose one of exact, legacy_global_200"),
        ({"limit": 0}, "AUPRO limit is 0"),
        ({"limit": 1.5}, "AUPRO limit is 1.5"),
        ({"limit": float("nan")}, "AUPRO limit is nan"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        aupro(np.zeros((1, 2, 2)), np.ones((1, 2, 2), bool), **options)
    limit, variant = options.get("limit", 0.3), options.get("variant", "exact")
    with pytest.raises(OptionError, match=message):
        PixelAccumulator(limit, variant)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_the_map(value):
    maps = np.zeros((3, 4, 4))
    maps[2, 1, 1] = value
    with pytest.raises(DataError, match="anomaly map 2 of this batch holds NaN or infinite values"):
        aupro(maps, np.zeros((3, 4, 4), bool))


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.zeros((2, 4, 4)), np.zeros((3, 4, 4), bool), "2 anomaly maps but 3 masks"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 5), bool), r"mask 0 of this batch has shape \(4, 5\)"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4), np.uint8), "mask 0 of this batch is uint8, not bool"),
        (np.zeros((2, 1, 4, 4)), np.zeros((2, 1, 4, 4), bool), r"anomaly map 0 of this batch has shape \(1, 4, 4\)"),
        (np.zeros((1, 0, 4)), np.zeros((1, 0, 4), bool), "must be height × width"),
    ],
)
def test_maps_and_masks_that_do_not_fit_are_named(maps, masks, message):
    with pytest.raises(DataError, match=message):
        aupro(maps, masks)
