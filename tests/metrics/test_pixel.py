import copy
import math
import pickle

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.metrics.test_region import scenes
from unianom.errors import DataError, OptionError
from unianom.metrics import PixelAccumulator, aupro, pixel_metrics


def overlaps_by_loops(maps, masks, threshold):
    """Mean Dice and IoU over maps, straight from set sizes."""
    dice, iou = [], []
    for m, mask in zip(maps, masks):
        predicted = m >= threshold
        if mask.any():
            both = (predicted & mask).sum()
            dice.append(2 * both / (predicted.sum() + mask.sum()))
            iou.append(both / (predicted | mask).sum())
        else:
            dice.append(0.0 if predicted.any() else 1.0)
            iou.append(dice[-1])
    return np.mean(dice), np.mean(iou)


def check_against_scikit_learn(maps, masks):
    metrics = pixel_metrics(maps, masks)
    truth, scores = masks.ravel(), maps.ravel()
    assert metrics.auroc == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert metrics.ap == pytest.approx(sklearn.metrics.average_precision_score(truth, scores), abs=1e-12)

    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(truth, scores)
    precision, recall = precision[:-1], recall[:-1]  # the appended end point has no threshold
    f1 = 2 * precision * recall / (precision + recall + 1e-7)
    assert metrics.f1_max == pytest.approx(f1.max(), abs=1e-12)
    assert f1[thresholds == metrics.f1_threshold] == pytest.approx(f1.max(), abs=1e-12)
    jaccard = [sklearn.metrics.jaccard_score(truth, scores >= t) for t in (metrics.f1_threshold, *thresholds[::37])]
    assert metrics.iou_max == pytest.approx(jaccard[0], abs=1e-6)
    assert metrics.iou_max >= max(jaccard) - 1e-12

    total = precision + recall
    assert total[thresholds == metrics.dsc_threshold] == pytest.approx(total.max(), abs=1e-12)
    assert (metrics.dsc, metrics.iou) == pytest.approx(overlaps_by_loops(maps, masks, metrics.dsc_threshold))

    touched = masks.any(axis=(1, 2))
    if masks[touched].all():
        assert math.isnan(metrics.auroc_anomalous_only)
    else:
        within = sklearn.metrics.roc_auc_score(masks[touched].ravel(), maps[touched].ravel())
        assert metrics.auroc_anomalous_only == pytest.approx(within, abs=1e-12)
    assert metrics.aupro == aupro(maps, masks)
    assert (metrics.n_maps, metrics.n_anomalous_maps) == (len(maps), touched.sum())


@pytest.mark.parametrize("levels", [1, 3, 12, 200, None])
def test_agrees_with_scikit_learn_and_plain_loops(levels):
    check_against_scikit_learn(*scenes(n=8, size=20, levels=levels, seed=5))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (3, 3, 3), elements=st.integers(-3, 3).map(float)), arrays(bool, (3, 3, 3)))
def test_agrees_with_scikit_learn_whatever_the_ties(maps, masks):
    if masks.any() and not masks.all():
        check_against_scikit_learn(maps, masks)


def test_hand_computed():
    # Anomalous map: region of 4 with scores 9 8 7 1, normal pixels 6 0; normal map: 2 0 0 0 0 0.
    maps = np.array([[[9, 8, 6], [7, 1, 0]], [[2, 0, 0], [0, 0, 0]]], np.float32)
    masks = np.array([[[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]], bool)
    metrics = pixel_metrics(maps, masks)
    assert metrics.auroc == pytest.approx(30 / 32)  # 9, 8 and 7 win 8 pairs each, 1 wins 6
    assert metrics.auroc_anomalous_only == pytest.approx(7 / 8)
    assert metrics.ap == pytest.approx((1 + 1 + 1 + 4 / 6) / 4)
    assert metrics.f1_max == pytest.approx(6 / 7, abs=1e-6)  # at 7: precision 1, recall 3/4
    assert metrics.f1_threshold == 7
    assert metrics.iou_max == pytest.approx(3 / 4)
    assert metrics.dsc_threshold == 7  # 1 + 3/4 against 4/6 + 1
    assert metrics.dsc == pytest.approx((6 / 7 + 1) / 2)
    assert metrics.iou == pytest.approx((3 / 4 + 1) / 2)
    assert (metrics.n_maps, metrics.n_anomalous_maps, metrics.n_regions) == (2, 1, 1)


def test_dsc_of_a_normal_map_is_zero_as_soon_as_a_pixel_is_flagged():
    maps = np.array([[[5, 1]], [[5, 0]], [[4, 0]]], np.float32)
    masks = np.array([[[1, 0]], [[0, 0]], [[0, 0]]], bool)
    metrics = pixel_metrics(maps, masks)
    assert metrics.dsc_threshold == 5
    assert metrics.dsc == pytest.approx((1 + 0 + 1) / 3)


def soft_overlaps_by_loops(maps, masks):
    """Mean soft Dice and soft IoU over maps with an anomalous pixel, pixel by pixel."""
    dice, iou = [], []
    for m, mask in zip(maps, masks):
        if not mask.any():
            continue
        low, high = float(m.min()), float(m.max())
        both = flagged = anomalous = 0.0
        for value, truth in zip(m.ravel().tolist(), mask.ravel().tolist()):
            scaled = (value - low) / (high - low) if high > low else 0.0
            both, flagged, anomalous = both + scaled * truth, flagged + scaled, anomalous + truth
        dice.append((2 * both + 1) / (flagged + anomalous + 1))
        iou.append((both + 1) / (flagged + anomalous - both + 1))
    return np.mean(dice), np.mean(iou)


def test_soft_overlaps_by_hand():
    # Scaled: 0 1/2 / 1 1/4, of which 1/2 and 1 are anomalous; the normal map takes no part.
    maps = np.array([[[10, 12], [14, 11]], [[900, 0], [0, 0]]], np.float32)
    masks = np.array([[[0, 1], [1, 0]], [[0, 0], [0, 0]]], bool)
    metrics = pixel_metrics(maps, masks)
    assert metrics.soft_dice == pytest.approx((2 * 1.5 + 1) / (1.75 + 2 + 1), abs=1e-12)
    assert metrics.soft_iou == pytest.approx((1.5 + 1) / (1.75 + 2 - 1.5 + 1), abs=1e-12)
    perfect = pixel_metrics(masks.astype(np.float32), masks)
    assert (perfect.soft_dice, perfect.soft_iou) == (1, 1)


@pytest.mark.parametrize("levels", [1, 3, None])
def test_soft_overlaps_agree_with_plain_loops_whatever_the_scale_of_each_map(levels):
    maps, masks = scenes(n=8, size=20, levels=levels, seed=5)
    masks[3] = True  # no normal pixel in this one
    metrics = pixel_metrics(maps, masks)
    assert (metrics.soft_dice, metrics.soft_iou) == pytest.approx(soft_overlaps_by_loops(maps, masks), abs=1e-9)
    rescaled = maps * np.arange(1, 9, dtype=np.float32).reshape(8, 1, 1) - 5
    assert pixel_metrics(rescaled, masks).soft_dice == pytest.approx(metrics.soft_dice, abs=1e-5)


def test_constant_maps_say_nothing_and_do_not_fail():
    maps, masks = np.full((4, 5, 5), 0.3), np.zeros((4, 5, 5), bool)
    masks[0, :2] = True
    metrics = pixel_metrics(maps, masks)
    assert metrics.auroc == metrics.auroc_anomalous_only == 0.5
    assert metrics.ap == 0.1
    assert metrics.f1_max == pytest.approx(2 * 0.1 / 1.1, abs=1e-6)
    assert metrics.dsc == pytest.approx(2 * 10 / 35 / 4)  # everything flagged: nothing left of the normal maps
    assert metrics.soft_dice == metrics.soft_iou == 1 / 11  # nothing flagged of 10 pixels


def test_minus_zero_ties_with_zero():
    maps, masks = np.array([[[0.0, -0.0]]], np.float32), np.array([[[True, False]]])
    assert pixel_metrics(maps, masks).auroc == pixel_metrics(-maps, masks).auroc == 0.5


@pytest.mark.parametrize("fill", [False, True])
def test_one_kind_of_pixel_leaves_all_but_the_counts_undefined(fill):
    values = pixel_metrics(np.arange(18.0).reshape(2, 3, 3), np.full((2, 3, 3), fill)).as_dict()
    assert {k for k, v in values.items() if not math.isnan(v)} == {"n_maps", "n_anomalous_maps", "n_regions"}
    assert math.isnan(pixel_metrics(np.zeros((1, 2, 2)), np.full((1, 2, 2), fill)).soft_dice)


def test_nothing_at_all_is_undefined_too():
    metrics = PixelAccumulator().compute()
    assert metrics.n_maps == 0
    assert math.isnan(metrics.auroc)


@pytest.mark.parametrize("variant", ["exact", "legacy_global_200", "legacy_per_image"])
@pytest.mark.parametrize("levels", [6, None])
def test_merging_in_any_order_gives_the_very_same_numbers(levels, variant):
    maps, masks = scenes(n=12, size=18, levels=levels, seed=9)
    expected = pixel_metrics(maps, masks, aupro_variant=variant)
    rng = np.random.default_rng(0)
    for n_parts in (1, 3, 12):
        whole = PixelAccumulator(aupro_variant=variant)
        for batch in np.array_split(rng.permutation(12), n_parts):
            part = PixelAccumulator(aupro_variant=variant)
            part.update(maps[batch], masks[batch])
            whole.merge(part)
        assert whole.compute() == expected


def test_an_accumulator_survives_the_way_between_workers():
    maps, masks = scenes(n=4, size=10, levels=None, seed=1)
    accumulator = PixelAccumulator(aupro_limit=0.1)
    accumulator.update(maps, masks)
    assert pickle.loads(pickle.dumps(accumulator)).compute() == accumulator.compute()


def test_update_may_follow_compute():
    maps, masks = scenes(n=6, size=10, levels=None, seed=1)
    accumulator = PixelAccumulator()
    accumulator.update(maps[:3], masks[:3])
    first = accumulator.compute()
    assert first == accumulator.compute() == pixel_metrics(maps[:3], masks[:3])
    accumulator.update(maps[3:], masks[3:])
    assert accumulator.compute() == pixel_metrics(maps, masks)


def test_what_was_given_is_neither_kept_nor_changed():
    maps, masks = scenes(n=4, size=10, levels=None, seed=1)
    given = copy.deepcopy((maps, masks))
    accumulator = PixelAccumulator()
    accumulator.update(maps, masks)
    before = accumulator.compute()
    assert np.array_equal(maps, given[0])
    assert np.array_equal(masks, given[1])
    maps[:] = 0
    masks[:] = False
    assert accumulator.compute() == before


def test_maps_of_different_sizes():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=shape).astype(np.float32) for shape in ((4, 6), (10, 3), (1, 1))]
    masks = [m > 0.8 for m in maps]
    maps = [m + rng.normal(size=m.shape).astype(np.float32) for m in maps]
    metrics = pixel_metrics(maps, masks)
    truth, scores = (np.concatenate([a.ravel() for a in group]) for group in (masks, maps))
    assert metrics.auroc == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert metrics.dsc == pytest.approx(overlaps_by_loops(maps, masks, metrics.dsc_threshold)[0])


def test_a_bad_batch_adds_nothing():
    maps, masks = scenes(n=4, size=10, levels=None, seed=1)
    accumulator = PixelAccumulator()
    accumulator.update(maps, masks)
    before = accumulator.compute()
    broken = maps.copy()
    broken[3, 0, 0] = np.nan
    with pytest.raises(DataError, match="anomaly map 3 of this batch"):
        accumulator.update(broken, masks)
    assert accumulator.compute() == before


def test_accumulators_with_different_options_do_not_merge():
    with pytest.raises(OptionError, match=r"\(0\.3, 'exact'\) and \(0\.05, 'exact'\)"):
        PixelAccumulator().merge(PixelAccumulator(aupro_limit=0.05))


def test_names_in_tables():
    maps, masks = scenes(n=4, size=10, levels=None, seed=1)
    assert list(pixel_metrics(maps, masks).as_dict()) == [
        "pixel_auroc",
        "pixel_auroc_anomalous_only",
        "pixel_ap",
        "pixel_f1_max",
        "pixel_f1_threshold",
        "pixel_iou_max",
        "dsc",
        "iou",
        "dsc_threshold",
        "aupro",
        "n_maps",
        "n_anomalous_maps",
        "n_regions",
    ]
    other = pixel_metrics(maps, masks, aupro_limit=0.05, aupro_variant="legacy_global_200").as_dict()
    assert other["aupro_legacy_global_200_0.05"] == aupro(maps, masks, 0.05, "legacy_global_200")
    assert "aupro" not in other
    soft = pixel_metrics(maps, masks).as_dict(soft=True)
    assert [name for name in soft if name not in pixel_metrics(maps, masks).as_dict()] == ["soft_dice", "soft_iou"]


def test_curves_enclose_the_areas():
    maps, masks = scenes(n=8, size=20, levels=40, seed=3)
    accumulator = PixelAccumulator(aupro_limit=1.0)
    accumulator.update(maps, masks)
    metrics, curves = accumulator.compute(), accumulator.curves(max_points=100_000)
    assert np.trapezoid(curves["roc"].y, curves["roc"].x) == pytest.approx(metrics.auroc, abs=1e-12)
    assert np.trapezoid(curves["pro"].y, curves["pro"].x) == pytest.approx(metrics.aupro, abs=1e-12)
    assert np.sum(np.diff(curves["pr"].x) * curves["pr"].y[1:]) == pytest.approx(metrics.ap, abs=1e-12)
    for curve in accumulator.curves(max_points=60).values():
        assert len(curve.x) == len(curve.y) <= 60
        assert curve.y.max() <= 1


def test_thinned_curves_keep_their_area():
    maps, masks = scenes(n=8, size=40, levels=None, seed=3)
    accumulator = PixelAccumulator(aupro_limit=1.0)
    accumulator.update(maps, masks)
    curve = accumulator.curves(max_points=500)["pro"]
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(accumulator.compute().aupro, abs=2 / 499)


def test_curves_without_anomalous_pixels_are_empty():
    accumulator = PixelAccumulator()
    accumulator.update(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), bool))
    assert all(len(curve.x) == 0 for curve in accumulator.curves().values())
