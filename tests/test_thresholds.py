import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from unianom.errors import DataError, ModelError, OptionError
from unianom.thresholds import (
    DecisionRule,
    Threshold,
    fit_bands,
    fit_by_category,
    fit_rule,
    fit_supported,
    fit_threshold,
    normals_needed,
    smallest_supported_rate,
    supported_rate,
    threshold_of,
)


def risks(n, rate):
    """P(Binomial(n, rate) ≤ above) for above = 0 … n, summed term by term in exact integers and fractions."""
    p, q = rate.numerator, rate.denominator
    terms = (math.comb(n, k) * p**k * (q - p) ** (n - k) for k in range(n + 1))
    return [Fraction(total, q**n) for total in itertools.accumulate(terms)]


@pytest.mark.parametrize("confidence", [Fraction(1, 2), Fraction(9, 10), Fraction(95, 100), Fraction(99, 100)])
@pytest.mark.parametrize("rate", [Fraction(1, 100), Fraction(1, 20), Fraction(3, 10), Fraction(4, 5)])
@pytest.mark.parametrize("n", [1, 7, 60, 150, 459])
def test_rank_is_the_smallest_that_keeps_the_binomial_risk(n, rate, confidence):
    allowed = [above for above, risk in enumerate(risks(n, rate)) if risk <= 1 - confidence]
    scores = np.random.default_rng(n).permutation(n) * 1.0
    if not allowed:
        with pytest.raises(OptionError):
            fit_threshold(scores, float(rate), float(confidence))
        return
    threshold = fit_threshold(scores, float(rate), float(confidence))
    assert threshold.rank == n - max(allowed)
    assert threshold.value == threshold.rank - 1  # scores are 0 … n − 1
    assert threshold.observed_fpr == max(allowed) / n
    assert threshold.n_normals == n


def test_known_sample_sizes_of_tolerance_limits():
    # 59 for 95 % / 95 %, 299 for 99 % / 95 %, 459 for 99 % / 99 %: the classical one-sided table (Wilks).
    assert normals_needed(0.05, 0.95) == 59
    assert normals_needed(0.01, 0.95) == 299
    assert normals_needed(0.01, 0.99) == 459
    assert fit_threshold(np.arange(93), 0.05, 0.95).rank == 92  # second largest of 93


@pytest.mark.parametrize("n", [1, 2, 10, 58, 299, 1000, 12345])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_smallest_supported_rate_is_supported_and_nothing_below_it_is(n, confidence):
    rate = smallest_supported_rate(n, confidence)
    assert rate == pytest.approx(1 - (1 - confidence) ** (1 / n))
    assert normals_needed(rate, confidence) == n
    assert fit_threshold(np.arange(n), rate, confidence).rank == n
    with pytest.raises(OptionError):
        fit_threshold(np.arange(n), rate * 0.999, confidence)


def test_rule_of_three():
    assert smallest_supported_rate(3000) == pytest.approx(3 / 3000, rel=2e-3)


@settings(deadline=None)
@given(st.floats(1e-6, 0.99), st.floats(0.01, 0.999))
def test_normals_needed_is_the_smallest_number(rate, confidence):
    n = normals_needed(rate, confidence)
    assert smallest_supported_rate(n, confidence) <= rate * (1 + 1e-6)
    if n > 1:
        assert smallest_supported_rate(n - 1, confidence) > rate * (1 - 1e-6)


@pytest.mark.parametrize("distribution", ["normal", "heavy-tailed", "few values"])
def test_the_promise_holds_over_many_draws(distribution):
    rng = np.random.default_rng(20)
    n, target, confidence, draws = 120, 0.05, 0.9, 3000
    values = np.arange(1, 41)  # for "few values": true rate of "score > v" is known
    broken = 0
    for _ in range(draws):
        if distribution == "few values":
            value = fit_threshold(rng.integers(1, 41, n), target, confidence).value
            true_rate = (values > value).mean()
        elif distribution == "normal":
            value = fit_threshold(rng.normal(size=n), target, confidence).value
            true_rate = 0.5 * math.erfc(value / math.sqrt(2))
        else:
            value = fit_threshold(rng.pareto(1.5, n), target, confidence).value
            true_rate = (1 + value) ** -1.5
        broken += true_rate > target
    exact = float(risks(n, Fraction(1, 20))[n - fit_threshold(np.arange(n), target, confidence).rank])
    assert exact <= 1 - confidence
    spread = 4 * math.sqrt(exact * (1 - exact) / draws)
    if distribution == "few values":
        assert broken / draws <= exact + spread
    else:  # continuous: the risk is exactly the binomial one, so the bound is not loose either
        assert broken / draws == pytest.approx(exact, abs=spread)


def test_scores_equal_to_the_threshold_pass():
    scores = np.array([0.0] * 30 + [1.0] * 70)
    threshold = fit_threshold(scores, 0.1)
    assert threshold.value == 1
    assert threshold.observed_fpr == 0
    assert threshold.decide([[1.0, 1.0 + 1e-12], [0.5, 7.0]]).tolist() == [["pass", "fail"], ["pass", "fail"]]


def test_decisions_do_not_depend_on_the_precision_of_the_scores():
    scores = np.random.default_rng(0).random(100).astype(np.float32)
    threshold = fit_threshold(scores, 0.05)
    assert threshold.value in scores
    failed = threshold.decide(scores) == "fail"
    assert failed.mean() == threshold.observed_fpr
    assert (threshold.decide(scores.astype(np.float64)) == "fail").tolist() == failed.tolist()


def test_order_of_scores_does_not_matter():
    scores = np.random.default_rng(1).random(200)
    assert fit_threshold(scores, 0.03) == fit_threshold(scores[::-1].tolist(), 0.03)


def test_too_few_normals_says_what_would_do():
    with pytest.raises(OptionError) as caught:
        fit_threshold(np.arange(100), 0.001)
    message = str(caught.value)
    assert "100 normal scores cannot support a false-positive rate of 0.001 at 95 % confidence" in message
    assert "the lowest rate they support is 0.0296" in message
    assert "0.001 needs 2995 normal scores" in message
    assert fit_threshold(np.arange(100), 0.0296).rank == 100
    assert fit_threshold(np.arange(2995), 0.001).rank == 2995
    with pytest.raises(OptionError):
        fit_threshold(np.arange(2994), 0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_fpr": 0}, "target_fpr is 0"),
        ({"target_fpr": 1.0}, "target_fpr is 1.0"),
        ({"target_fpr": 0.1, "confidence": 1.0}, "confidence is 1.0"),
        ({"target_fpr": float("nan")}, "target_fpr is nan"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        fit_threshold(np.arange(100), **options)


def test_no_normals_support_no_rate():
    with pytest.raises(OptionError, match="n is 0"):
        smallest_supported_rate(0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    scores = np.arange(100.0)
    threshold = fit_threshold(scores, 0.05)
    scores[42] = value
    with pytest.raises(DataError, match=f"score 42 is {value}"):
        fit_threshold(scores, 0.05)
    with pytest.raises(DataError, match=f"score 42 is {value}"):
        threshold.decide(scores)


@pytest.mark.parametrize("scores", [[], [[1.0, 2.0]], 3.0])
def test_scores_of_a_wrong_shape_are_refused(scores):
    with pytest.raises(DataError, match="one score an image"):
        fit_threshold(scores, 0.5, 0.5)


def test_json_round_trip():
    threshold = fit_threshold(np.random.default_rng(0).random(100).astype(np.float32), 0.05)
    again = Threshold.from_dict(json.loads(json.dumps(threshold.to_dict(), allow_nan=False)))
    assert again == threshold
    assert again != replace(threshold, rank=1)


@pytest.mark.parametrize(
    ("n", "rate", "rank"),
    [
        (1, None, 1),
        (13, None, 13),  # 1 − 0.05^(1/13) is 20.6 %
        (14, 0.2, 14),
        (22, 0.2, 21),
        (31, 0.2, 29),
        (61, 0.1, 59),
        (124, 0.05, 122),
    ],
)
def test_what_is_not_asked_for_is_promised_as_far_as_the_scores_support_it(n, rate, rank):
    threshold = fit_supported(np.arange(n), source="leave_one_out")
    assert supported_rate(n) == (None if rate is None else pytest.approx(rate, rel=1e-12))
    assert (threshold.n_normals, threshold.rank, threshold.value) == (n, rank, rank - 1)
    assert threshold.source == "leave_one_out"
    assert threshold.promised == (rate is not None)
    if rate is None:
        assert threshold.promise().startswith(f"no promise, from too few scores: about 1 in {n + 1} normal images is")
    else:
        assert threshold.target_fpr == pytest.approx(rate, rel=1e-12)
        assert threshold.promise().startswith(f"at most {100 * rate:.3g} % of normal images fail, at 95 % confidence")
    assert Threshold.from_dict(json.loads(json.dumps(threshold.to_dict()))) == threshold


def test_what_is_asked_for_is_promised_or_refused():
    assert fit_supported(np.arange(31), 0.1) == fit_threshold(np.arange(31), 0.1)
    assert fit_supported(np.arange(7), 0.35).promised
    with pytest.raises(OptionError, match="31 normal scores cannot support"):
        fit_supported(np.arange(31), 0.05)
    with pytest.raises(DataError, match="at least one image"):
        fit_supported([])


def test_promises_in_words():
    one, many = fit_supported([3.0]), fit_supported(np.arange(1200))
    assert one.promise() == (
        "no promise, from too few scores: about 1 in 2 normal images is expected to fail, from 1 held-out normal image"
    )
    assert many.promise() == "at most 5 % of normal images fail, at 95 % confidence, from 1,200 held-out normal images"
    left_out = replace(one, promised=True, target_fpr=0.0921, n_normals=31, source="leave_one_out")
    assert left_out.promise() == (
        "at most 9.21 % of normal images fail, at 95 % confidence, from 31 normal images, each scored without its own "
        "vectors"
    )


def test_thresholds_of_before_are_read():
    """They had neither `promised` nor `source`, and were promised and of held-out images."""
    before = {"value": 58.0, "target_fpr": 0.05, "confidence": 0.95, "n_normals": 59, "rank": 59, "observed_fpr": 0.0}
    threshold = fit_threshold(np.arange(59), 0.05)
    assert Threshold.from_dict(before) == threshold
    assert threshold.to_dict() == before
    assert (threshold.promised, threshold.source) == (True, "held_out")


def test_categories_that_support_a_promise_have_thresholds_of_their_own():
    normals = {"bolt": np.arange(60), "nut": 10 + np.arange(20), "ring": np.arange(13), "disc": []}
    unasked = fit_by_category(normals, source="leave_one_out")
    assert unasked == {name: fit_supported(normals[name], source="leave_one_out") for name in ("bolt", "nut")}
    assert fit_by_category(normals, 0.1) == {"bolt": fit_threshold(normals["bolt"], 0.1)}
    model = {"threshold": {"value": 1.0}, "category_thresholds": {"bolt": {"value": 2.0}}}
    assert [threshold_of(model, name)["value"] for name in ("bolt", "ring", None)] == [2.0, 1.0, 1.0]
    assert threshold_of({"threshold": None}, "bolt") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "this one has confidence, extra"),
        ({"promised": "yes"}, "promised=yes from source=held_out"),
        ({"source": "test"}, "promised=True from source=test"),
        ({"value": "high"}, "not a number"),
        ({"rank": None}, "not a number"),
    ],
)
def test_damaged_content_is_named(change, message):
    content = fit_threshold(np.arange(100), 0.05).to_dict() | change
    with pytest.raises(ModelError, match=message):
        Threshold.from_dict(content)
    del content["value"]
    with pytest.raises(ModelError, match="a threshold has the keys"):
        Threshold.from_dict(content)


@settings(deadline=None, max_examples=40)
@given(st.integers(60, 400), st.floats(0.05, 0.3), st.floats(0.0, 0.4), st.integers(0, 10**6))
def test_bands_divide_scores_as_two_thresholds_do(n, target, more, seed):
    scores = np.random.default_rng(seed).normal(size=n)
    bands = fit_bands(scores, target, target + more)
    assert bands.fail == fit_threshold(scores, target)
    assert bands.review == fit_threshold(scores, target + more)
    judged = np.random.default_rng(seed + 1).normal(size=50)
    for score, decision, margin in zip(judged, bands.decide(judged), bands.margin(judged)):
        expected = "fail" if score > bands.fail.value else "review" if score > bands.review.value else "pass"
        assert decision == expected
        assert (margin > 0) == (decision == "fail")
        assert margin == pytest.approx((score - bands.fail.value) / scores.std())


def test_scores_at_a_threshold_belong_to_the_milder_band():
    bands = fit_bands(np.arange(200), 0.05, 0.2)
    assert list(bands.decide([bands.fail.value, bands.review.value])) == ["review", "pass"]
    assert bands.decide(bands.fail.value + 1e-9) == "fail"


def test_equal_scores_have_a_spread_of_one():
    bands = fit_bands(np.full(100, 3.0), 0.05, 0.2)
    assert bands.spread == 1
    assert bands.margin(5.0) == 2


def test_bands_of_few_scores_promise_what_they_can():
    bands = fit_bands(np.arange(31), None, 0.2)
    assert bands.fail == fit_supported(np.arange(31))
    assert bands.review == fit_threshold(np.arange(31), 0.2)
    assert fit_bands(np.arange(16), None, 0.17).review.value == 15  # 16 scores support 17.1 % at best
    few = fit_bands(np.arange(5), None, 0.2, source="leave_one_out")
    assert few.fail == few.review == fit_supported(np.arange(5), source="leave_one_out")
    assert list(few.decide([4, 4.1])) == ["pass", "fail"]


def test_a_review_rate_below_the_target_is_refused():
    with pytest.raises(OptionError, match=r"review_fpr=0.01 is below target_fpr=0.05"):
        fit_bands(np.arange(100), 0.05, 0.01)


def normals_of_three():
    rng = np.random.default_rng(3)
    return {"bolt": rng.normal(size=100), "nut": 10 + rng.normal(size=80), "ring": rng.normal(size=7)}


def test_one_rule_for_all_is_fitted_to_all_normals_together():
    normals = normals_of_three()
    rule = fit_rule(normals, "raw", 0.05, 0.2)
    assert rule.common == fit_bands(np.concatenate(list(normals.values())), 0.05, 0.2)
    assert rule.bands("bolt") == rule.bands("never seen") == rule.bands(None) == rule.common


def test_every_category_gets_the_bands_of_its_own_normals():
    normals = normals_of_three()
    del normals["ring"]
    rule = fit_rule(normals, "raw", 0.05, 0.2, per_category=True)
    assert rule.bands("nut") == fit_bands(normals["nut"], 0.05, 0.2)
    assert rule.decide(9.0, None, "nut") == "pass"
    assert rule.decide(9.0, None, "bolt") == "fail"
    for unknown in ("ring", None):
        with pytest.raises(DataError, match="judges bolt, nut only"):
            rule.decide(9.0, None, unknown)


def test_too_few_normals_are_named_with_the_rate_they_support_or_pooled_when_asked():
    normals = {**normals_of_three(), "disc": []}
    with pytest.raises(OptionError, match=r"which takes 59: disc has 0, ring has 7 \(which support 0.349 at best\)"):
        fit_rule(normals, "raw", 0.05, 0.2, per_category=True)
    fit_threshold(normals["ring"], 0.349)  # what was printed works
    rule = fit_rule(normals, "raw", 0.05, 0.2, per_category=True, pool_small=True)
    assert sorted(rule.categories) == ["bolt", "nut"]
    assert rule.bands("ring") == rule.bands("disc") == fit_bands(np.concatenate(list(normals.values())), 0.05, 0.2)


def test_a_rule_judges_the_kind_of_score_it_was_fitted_to():
    rule = fit_rule({"bolt": np.arange(100)}, "calibrated", 0.05, 0.2)
    assert rule.decide(-5.0, 99.5, "bolt") == "fail"
    assert rule.decide(99.5, -5.0, "bolt") == "pass"
    with pytest.raises(DataError, match="calibrated scores and there is none"):
        rule.decide(99.5, None, "bolt")


def test_rules_without_a_rate_promise_what_each_category_supports():
    normals = normals_of_three()
    rule = fit_rule(normals, "raw", None, 0.2, per_category=True, pool_small=True, source="leave_one_out")
    assert rule.bands("bolt") == fit_bands(normals["bolt"], None, 0.2, source="leave_one_out")
    everything = np.concatenate(list(normals.values()))
    assert rule.bands("ring") == fit_bands(everything, None, 0.2, source="leave_one_out")
    with pytest.raises(
        OptionError, match=r"a false-positive rate of 0\.2 at 95 % confidence, which takes 14: ring has 7"
    ):
        fit_rule(normals, "raw", None, 0.2, per_category=True)
    assert DecisionRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


@pytest.mark.parametrize("pool_small", [False, True])
def test_rules_survive_json(pool_small):
    normals = normals_of_three() if pool_small else {"nut": normals_of_three()["nut"]}
    rule = fit_rule(normals, "raw", 0.05, 0.2, per_category=True, pool_small=pool_small)
    again = DecisionRule.from_dict(json.loads(json.dumps(rule.to_dict(), allow_nan=False)))
    assert again == rule
    assert again.restricted(["nut"]).bands("nut") == rule.bands("nut")
    assert "bolt" not in again.restricted(["nut"]).categories


def test_damaged_rules_are_named():
    content = fit_rule({"bolt": np.arange(100)}, "raw", 0.05, 0.2).to_dict()
    with pytest.raises(ModelError, match="DecisionRule has the keys"):
        DecisionRule.from_dict({**content, "extra": 1})
    with pytest.raises(ModelError, match="not 'cooked'"):
        DecisionRule.from_dict({**content, "kind": "cooked"})
    with pytest.raises(ModelError, match="without any bands"):
        DecisionRule.from_dict({**content, "common": None})
    swapped = {**content["common"], "fail": content["common"]["review"], "review": content["common"]["fail"]}
    with pytest.raises(ModelError, match="at or below the threshold to fail"):
        DecisionRule.from_dict({**content, "common": swapped})


@pytest.mark.parametrize(
    ("n", "rate", "above"), [(30, 0.2, 2), (60, 0.2, 6), (61, 0.1, 2), (123, 0.1, 6), (124, 0.05, 2)]
)
def test_unasked_the_lowest_rate_is_promised_that_leaves_two_scores_above(n, rate, above):
    """As the binomial distribution has it: P(Binomial(124, 0.05) ≤ 2) is 0.049, of 123 it is 0.051."""
    threshold = fit_supported(np.arange(n))
    assert (threshold.target_fpr, threshold.promised) == (rate, True)
    assert binom.cdf(above, n, rate) <= 0.05 < binom.cdf(above + 1, n, rate)
    assert threshold.value == n - 1 - above


@pytest.mark.parametrize("kind", ["raw", "calibrated"])
@pytest.mark.parametrize("per_category", [False, True])
def test_many_images_are_judged_as_each_is(kind, per_category):
    rng = np.random.default_rng(0)
    normals = {"bolt": rng.normal(size=200), "nut": rng.normal(3, 2, size=200)}
    rule = fit_rule(normals, kind, 0.05, 0.2, per_category=per_category)
    names = rng.choice(["bolt", "nut"], 300).tolist()
    scores, calibrated = rng.normal(1, 3, (2, 300)).astype(np.float32)
    scores[:2] = calibrated[:2] = rule.bands("bolt").fail.value  # as float32, so maybe not equal
    names[:2] = ["bolt", "nut"]
    judged = rule.judge(scores, calibrated, names)
    assert set(judged.decision) == {"pass", "review", "fail"}
    for row, name in enumerate(names):
        pair = float(scores[row]), float(calibrated[row])
        bands, value = rule.bands(name), rule.value(*pair)
        assert judged.decision[row] == rule.decide(*pair, name)
        assert judged.score[row] == value
        assert (judged.fail_above[row], judged.review_above[row]) == (bands.fail.value, bands.review.value)
        assert judged.margin[row] == bands.margin(value)


def test_many_images_are_refused_as_one_is():
    rule = fit_rule({"bolt": np.arange(100.0)}, "calibrated", 0.05, 0.2, per_category=True)
    with pytest.raises(DataError, match="there is none; score with a calibrated model"):
        rule.judge([1.0], None, ["bolt"])
    with pytest.raises(DataError, match="no threshold for category 'nut'"):
        rule.judge([1.0, 1.0], [1.0, 1.0], ["bolt", "nut"])
    with pytest.raises(DataError, match="score 1 is nan"):
        rule.judge([1.0, 1.0], [1.0, np.nan], ["bolt", "bolt"])
    assert len(rule.judge([], [], []).decision) == 0
