"""A decision threshold from the scores of held-out normal images, with a guarantee on its false-positive rate.

"score > s_(r)", with s_(1) ≤ … ≤ s_(n) the sorted scores of n normal images that no part of the model has seen, is
a one-sided distribution-free tolerance limit (Wilks 1941): for scores drawn independently from one continuous
distribution the true rate of false positives follows Beta(n − r + 1, r), whatever that distribution is, so

    P(true rate > target) = P(Binomial(n, target) ≤ n − r).

The smallest r that keeps this at or below 1 − confidence is taken. If scores can tie, the rate can only be lower:
a score equal to the threshold passes, and the distribution function at s_(r) is then at least the uniform order
statistic it is in the continuous case. ("score ≥ threshold" would lose the guarantee.)

Unless a rate is asked for, it is the lowest of `RATES` that so many normals support by a threshold with at least
`SPARE` of their scores above it: a threshold at the very highest score is at the mercy of one odd image, and then
catches little. Where they support none of them in that way, it is the highest rate, and where not even that by their
highest score, the threshold at that score is marked as promising nothing: all that is known then is that of n + 1
exchangeable scores each is the highest with probability 1/(n + 1).

Scores of held-out normals are one source. The images of a memory bank itself are another (leave-one-out): each is
scored as if the bank did not hold its own vectors. What is promised then assumes:

- These images and those to be judged are exchangeable. Near-duplicates in the bank break that: they are scored as if
  they had been seen before.
- A score falls, or stays, where the bank gets more vectors. It does where it grows with the distances to the nearest
  ones. A new image is then compared with one image more than those of the bank were, so the mean rate above the r-th
  score is at most 1 − r/(n + 1), as of held-out scores. A coreset and PatchCore's re-weighting make this approximate:
  a coreset was chosen with the image present, and what is added for it (`unianom/memory/cover.py`) only restores the
  radius within which it covers other images; the re-weighting may go either way.
- Scores are independent, which the confidence needs. They share a bank, so they are not quite; in simulations broken
  promises were as frequent as of independent scores (tests/methods/test_leave_one_out.py).

Two such thresholds, for a low and a higher rate, make bands: fail above the one, review between both, pass below. A
`DecisionRule` has bands for all categories together, or for each; every promise is then kept with the confidence
asked for by itself, not all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unianom.errors import DataError, ModelError, OptionError

PASS, REVIEW, FAIL = "pass", "review", "fail"

ScoreKind = Literal["raw", "calibrated"]
"""Which score of an image is judged."""

Source = Literal["held_out", "leave_one_out"]
"""Where normal scores are from: of images that were not learned from, or of those of a memory bank, each scored without
its own vectors."""

RATES = (0.05, 0.1, 0.2)
"""False-positive rates that are promised unless one is asked for: the first, or with too few normals the next."""

SPARE = 2
"""Normal scores that lie above a threshold at least, for it to be chosen unasked."""

USUAL_FPR, HIGHEST_PROMISED = RATES[0], RATES[-1]

# Slack for rounding in logarithms, so that the smallest rate n normals support needs n normals and not n + 1.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Threshold:
    """A decision threshold and how it was chosen.

    Attributes:
        value: scores above it fail, scores at or below it pass.
        target_fpr: the false-positive rate promised, in (0, 1); that which was aimed at, where nothing is promised.
        confidence: probability, over the draw of the normals, that the promise holds.
        n_normals: number of normal scores it was chosen from.
        rank: `value` is the rank-th smallest of them, from 1.
        observed_fpr: share of them above `value`; lower than the target by the margin the confidence asks for.
        promised: whether the rate is promised; else `value` is the highest of too few scores.
        source: where the scores are from.
    """

    value: float
    target_fpr: float
    confidence: float
    n_normals: int
    rank: int
    observed_fpr: float
    promised: bool = True
    source: Source = "held_out"

    def decide(self, scores: ArrayLike) -> NDArray[np.str_]:
        """Return the decision for each score.

        Args:
            scores: image scores of any shape.

        Returns:
            "fail" where the score is above the threshold, else "pass"; the same shape.

        Raises:
            DataError: a score is NaN or infinite.
        """
        return np.where(_finite_scores(scores) > self.value, "fail", "pass")

    def promise(self) -> str:
        """Say what is promised of normal images, and from what; the end of a sentence."""
        return promise_in_words(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; `promised` and `source` only where they are not the usual ones."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if name not in _USUAL or value != _USUAL[name]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Threshold:
        """Make an instance from what `to_dict` gave.

        Raises:
            ModelError: keys are missing or unknown, or a value is not what it should be.
        """
        names = {field.name for field in fields(cls)}
        if set(content) | set(_USUAL) != names or not names - set(_USUAL) <= set(content):
            raise ModelError(
                f"a threshold has the keys {', '.join(sorted(names))} but this one has "
                f"{', '.join(sorted(content)) or 'none'}; fit it again with this version"
            )
        promised, source = (content.get(name, usual) for name, usual in _USUAL.items())
        if not isinstance(promised, bool) or source not in get_args(Source):
            raise ModelError(f"a threshold is promised={promised} from source={source}; fit it again")
        try:
            return cls(
                value=float(content["value"]),
                target_fpr=float(content["target_fpr"]),
                confidence=float(content["confidence"]),
                n_normals=int(content["n_normals"]),
                rank=int(content["rank"]),
                observed_fpr=float(content["observed_fpr"]),
                promised=promised,
                source=source,
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"a value of this threshold is not a number ({error}); fit it again") from error


_USUAL: dict[str, Any] = {"promised": True, "source": "held_out"}
"""Values that are not written, as thresholds of before have none."""


def promise_in_words(threshold: Mapping[str, Any]) -> str:
    """Say what a threshold promises of normal images, and from what; the end of a sentence.

    Args:
        threshold: content of `Threshold.to_dict`, also of an older version.
    """
    n = threshold["n_normals"]
    images = "1 normal image" if n == 1 else f"{n:,} normal images"
    if threshold.get("source", "held_out") == "leave_one_out":
        source = f"{images}, each scored without its own vectors"
    else:
        source = "1 held-out normal image" if n == 1 else f"{n:,} held-out normal images"
    if not threshold.get("promised", True):
        return f"no promise, from too few scores: about 1 in {n + 1} normal images is expected to fail, from {source}"
    return (
        f"at most {100 * threshold['target_fpr']:.3g} % of normal images fail, at {100 * threshold['confidence']:g} % "
        f"confidence, from {source}"
    )


def fit_threshold(scores: ArrayLike, target_fpr: float, confidence: float = 0.95) -> Threshold:
    """Choose the lowest threshold that keeps the false-positive rate at or below a target.

    With probability `confidence` over the draw of the normals, the true rate of "score > value" is at most
    `target_fpr`, whatever the distribution of scores. The normals must be independent of the model and of each
    other, and like the images to be judged: near-duplicates count as one image, not many.

    Args:
        scores: (n,) scores of held-out normal images.
        target_fpr: highest false-positive rate wanted, in (0, 1).
        confidence: in (0, 1).

    Raises:
        OptionError: a rate or confidence outside (0, 1), or n normals cannot support the rate.
        DataError: no scores, not one-dimensional, or a score is NaN or infinite.
    """
    _check_probability("target_fpr", target_fpr)
    _check_probability("confidence", confidence)
    values = _finite_scores(scores)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"normal scores have shape {values.shape}; give one score an image and at least one image")
    ordered, n = np.sort(values), len(values)
    needed = normals_needed(target_fpr, confidence)
    if n < needed:
        lowest = smallest_supported_rate(n, confidence)
        raise OptionError(
            f"{n} normal scores cannot support a false-positive rate of {target_fpr:g} "
            f"at {100 * confidence:g} % confidence: the lowest rate they support is {rounded_up(lowest):g}, "
            f"and {target_fpr:g} needs {needed} normal scores; "
            f"add normal images, or ask for a higher rate or a lower confidence"
        )
    rank = n - scores_above(n, target_fpr, confidence)
    value = float(ordered[rank - 1])
    return Threshold(
        value=value,
        target_fpr=target_fpr,
        confidence=confidence,
        n_normals=n,
        rank=rank,
        observed_fpr=float(np.count_nonzero(ordered > value) / n),
    )


def fit_supported(
    scores: ArrayLike, target_fpr: float | None = None, confidence: float = 0.95, source: Source = "held_out"
) -> Threshold:
    """Choose the threshold with the best promise that the scores support.

    Args:
        scores: (n,) scores of normal images, at least one.
        target_fpr: highest false-positive rate wanted; None takes that of `supported_rate`, or promises nothing.
        confidence: in (0, 1).
        source: where the scores are from.

    Raises:
        OptionError, DataError: as `fit_threshold`.
    """
    if target_fpr is not None:
        return replace(fit_threshold(scores, target_fpr, confidence), source=source)
    n = max(1, np.size(scores))
    rate = supported_rate(n, confidence)
    if rate is not None:
        return replace(fit_threshold(scores, rate, confidence), source=source)
    highest = fit_threshold(scores, smallest_supported_rate(n, confidence), confidence)
    return replace(highest, target_fpr=USUAL_FPR, promised=False, source=source)


def supported_rate(n: int, confidence: float = 0.95) -> float | None:
    """Return the false-positive rate that n normals promise unless another is asked for; see `RATES` and `SPARE`.

    Returns:
        The rate; None where n normals support not even the highest.

    Raises:
        OptionError: a confidence outside (0, 1).
    """
    for rate in RATES:
        if n >= normals_needed(rate, confidence) and scores_above(n, rate, confidence) >= SPARE:
            return rate
    return HIGHEST_PROMISED if n >= normals_needed(HIGHEST_PROMISED, confidence) else None


def scores_above(n: int, rate: float, confidence: float) -> int:
    """Return how many of n normal scores may lie above a threshold that promises a rate which n supports."""
    from scipy.special import bdtr  # the binomial distribution function; scipy.stats takes a second to import

    # the largest count whose cumulative probability does not exceed 1 − confidence lies in [low, high); none above is
    # always right, since n is large enough
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        if bdtr(middle, n, rate) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def fit_by_category(
    normals: Mapping[str, ArrayLike],
    target_fpr: float | None = None,
    confidence: float = 0.95,
    source: Source = "held_out",
) -> dict[str, Threshold]:
    """Choose the threshold of each category whose normals support a promise.

    Args:
        normals: (n,) scores of normal images by category.
        target_fpr, confidence, source: see `fit_supported`.
    """
    needed = normals_needed(target_fpr or HIGHEST_PROMISED, confidence)
    return {
        name: fit_supported(scores, target_fpr, confidence, source)
        for name, scores in sorted(normals.items())
        if np.size(scores) >= needed
    }


def threshold_of(model: Mapping[str, Any], category: str | None) -> dict[str, Any] | None:
    """Return the threshold by which a model judges images of a category, as plain data; None where it has none.

    Args:
        model: content of `model.json`, also of an older version.
        category: None for images of unknown category.
    """
    own = (model.get("category_thresholds") or {}).get(category)
    threshold: dict[str, Any] | None = model["threshold"] if own is None else own
    return threshold


def smallest_supported_rate(n: int, confidence: float = 0.95) -> float:
    """Return the lowest false-positive rate that n normals can vouch for: 1 − (1 − confidence)^(1/n), about 3/n at
    0.95.

    At it the threshold is the highest normal score.

    Raises:
        OptionError: n below 1 or a confidence outside (0, 1).
    """
    _check_probability("confidence", confidence)
    if n < 1:
        raise OptionError(f"n is {n}; a false-positive rate needs at least 1 normal score")
    return -math.expm1(math.log1p(-confidence) / n)


def normals_needed(rate: float, confidence: float = 0.95) -> int:
    """Return the smallest number of normals that can vouch for a false-positive rate: log(1 − confidence) / log(1 −
    rate).

    Raises:
        OptionError: a rate or confidence outside (0, 1).
    """
    _check_probability("rate", rate)
    _check_probability("confidence", confidence)
    return max(1, math.ceil((math.log1p(-confidence) + _ROUNDING) / math.log1p(-rate)))


@dataclass(frozen=True)
class Bands:
    """Two thresholds on one kind of score: what fails, what a person should look at, what passes.

    Attributes:
        fail: scores above it fail.
        review: scores above it that do not fail are to be reviewed; for a rate that is not below that of `fail`.
        spread: standard deviation of the normal scores both were fitted to; 1 where they are all the same.

    Raises:
        ModelError: the review threshold lies above the other, or the spread is not positive.
    """

    fail: Threshold
    review: Threshold
    spread: float

    def __post_init__(self) -> None:
        if self.review.value > self.fail.value or not 0 < self.spread < math.inf:
            raise ModelError(
                f"bands need a review threshold ({self.review.value:g}) at or below the threshold to fail "
                f"({self.fail.value:g}) and a positive spread ({self.spread:g}); fit them again"
            )

    def decide(self, scores: ArrayLike) -> NDArray[np.str_]:
        """Decide "pass", "review" or "fail" for each score; the same shape.

        Raises:
            DataError: a score is NaN or infinite.
        """
        values = _finite_scores(scores)
        return np.where(values > self.fail.value, FAIL, np.where(values > self.review.value, REVIEW, PASS))

    def margin(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return how far each score lies above the threshold to fail, in standard deviations of normal scores; the same
        shape."""
        return (np.asarray(scores, dtype=np.float64) - self.fail.value) / self.spread

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {"fail": self.fail.to_dict(), "review": self.review.to_dict(), "spread": self.spread}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Bands:
        """Make an instance from what `to_dict` gave.

        Raises:
            ModelError: keys are missing or unknown, or a value is not what it should be.
        """
        _check_keys(cls, content)
        try:
            spread = float(content["spread"])
        except (TypeError, ValueError) as error:
            raise ModelError(f"the spread of these bands is not a number ({error}); fit them again") from error
        return cls(Threshold.from_dict(content["fail"]), Threshold.from_dict(content["review"]), spread)


class Judgement(NamedTuple):
    """What a rule says of n images.

    Attributes:
        score: (n,) float64; the score that was judged, raw or calibrated.
        fail_above, review_above: (n,) float64; the thresholds of the image's category.
        decision: (n,) str objects, "pass", "review" or "fail".
        margin: (n,) float64; how far the score lies above `fail_above`, in standard deviations of normal scores.
    """

    score: NDArray[np.float64]
    fail_above: NDArray[np.float64]
    review_above: NDArray[np.float64]
    decision: NDArray[np.object_]
    margin: NDArray[np.float64]


def number_names(names: Sequence[str | None]) -> tuple[list[str | None], NDArray[np.intp]]:
    """Return the different names among n, in the order they come, and for each of the n its number among them."""
    numbers: dict[str | None, int] = {}
    places = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.intp)
    return list(numbers), places


@dataclass(frozen=True)
class DecisionRule:
    """How image scores become decisions.

    Attributes:
        kind: whether raw or calibrated scores are judged.
        common: bands for every category that has none of its own; None where an image cannot be judged without them.
        categories: bands by category; empty where one pair of thresholds judges all.

    Raises:
        ModelError: an unknown kind, or no bands at all.
    """

    kind: ScoreKind
    common: Bands | None
    categories: dict[str, Bands]

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScoreKind):
            raise ModelError(f"a decision rule judges raw or calibrated scores, not '{self.kind}'; fit it again")
        if self.common is None and not self.categories:
            raise ModelError("a decision rule without any bands decides nothing; fit it again")

    def bands(self, category: str | None) -> Bands:
        """Return the bands that judge a category; None for an image whose category is not known.

        Raises:
            DataError: neither bands of this category nor common ones.
        """
        found = self.common if category is None else self.categories.get(category, self.common)
        if found is None:
            named = "an image of unknown category" if category is None else f"category '{category}'"
            raise DataError(
                f"no threshold for {named}: this rule judges {', '.join(sorted(self.categories))} only; fit a rule for "
                f"all categories together, or score normal images of that category and fit the rule again"
            )
        return found

    def knows(self, category: str | None) -> bool:
        """Return whether there are bands for a category, or for images of unknown category (None)."""
        return self.common is not None or category in self.categories

    def value(self, score: float, calibrated_score: float | None) -> float:
        """Return the score that is judged.

        Raises:
            DataError: it is the calibrated one and there is none.
        """
        if self.kind == "raw":
            return score
        if calibrated_score is None:
            raise DataError("this rule judges calibrated scores and there is none; score with a calibrated model")
        return calibrated_score

    def decide(self, score: float, calibrated_score: float | None, category: str | None) -> str:
        """Decide "pass", "review" or "fail" for one image.

        Raises:
            DataError: no bands for the category, or no score of the right kind, or it is NaN or infinite.
        """
        return str(self.bands(category).decide(self.value(score, calibrated_score)))

    def judge(
        self, scores: ArrayLike, calibrated_scores: ArrayLike | None, categories: Sequence[str | None]
    ) -> Judgement:
        """Judge n images at once, each as `decide` does.

        Args:
            scores: (n,).
            calibrated_scores: (n,); None where there are none.
            categories: n names; None for an image whose category is not known.

        Raises:
            DataError: as `decide`.
        """
        judged = scores if self.kind == "raw" else calibrated_scores
        if judged is None:
            raise DataError("this rule judges calibrated scores and there is none; score with a calibrated model")
        values = _finite_scores(judged)
        names, places = number_names(categories)
        bands = [self.bands(name) for name in names]
        fail, review, spread = (
            np.array([limit(own) for own in bands], np.float64)[places]
            for limit in (lambda b: b.fail.value, lambda b: b.review.value, lambda b: b.spread)
        )
        decisions = np.where(values > fail, FAIL, np.where(values > review, REVIEW, PASS)).astype(object)
        return Judgement(values, fail, review, decisions, (values - fail) / spread)

    def restricted(self, categories: Collection[str]) -> DecisionRule:
        """Return the same rule without what other categories have of their own.

        Raises:
            ModelError: nothing is left.
        """
        return DecisionRule(self.kind, self.common, {c: b for c, b in self.categories.items() if c in categories})

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "kind": self.kind,
            "common": None if self.common is None else self.common.to_dict(),
            "categories": {name: bands.to_dict() for name, bands in sorted(self.categories.items())},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DecisionRule:
        """Make an instance from what `to_dict` gave.

        Raises:
            ModelError: keys are missing or unknown, or a value is not what it should be.
        """
        _check_keys(cls, content)
        common = content["common"]
        return cls(
            kind=content["kind"],
            common=None if common is None else Bands.from_dict(common),
            categories={name: Bands.from_dict(bands) for name, bands in content["categories"].items()},
        )


def fit_bands(
    scores: ArrayLike,
    target_fpr: float | None,
    review_fpr: float,
    confidence: float = 0.95,
    source: Source = "held_out",
) -> Bands:
    """Choose both thresholds from the same normal scores.

    Args:
        scores: (n,) scores of normal images.
        target_fpr: highest share of normal images that may fail; None as of `fit_supported`, and where the scores do
            not support `review_fpr` either, nothing comes to review.
        review_fpr: highest share of normal images that may fail or come to review; at least `target_fpr`.
        confidence: of each promise.
        source: where the scores are from.

    Raises:
        OptionError, DataError: as `fit_threshold`, or review_fpr is below target_fpr.
    """
    if target_fpr is not None and review_fpr < target_fpr:
        raise OptionError(
            f"review_fpr={review_fpr:g} is below target_fpr={target_fpr:g}; it counts the images that fail, too, so "
            f"give at least as much"
        )
    fail = fit_supported(scores, target_fpr, confidence, source)
    review = fail
    if fail.promised and review_fpr > fail.target_fpr:
        review = fit_supported(scores, review_fpr, confidence, source)
    spread = float(np.std(np.sort(np.asarray(scores, dtype=np.float64))))  # sorted: rounding depends on the order
    return Bands(fail, review, spread or 1.0)


def fit_rule(
    normals: Mapping[str, ArrayLike],
    kind: ScoreKind,
    target_fpr: float | None,
    review_fpr: float,
    confidence: float = 0.95,
    per_category: bool = False,
    pool_small: bool = False,
    source: Source = "held_out",
) -> DecisionRule:
    """Choose the thresholds of a rule.

    Args:
        normals: (n,) scores of normal images by category.
        kind: which scores these are.
        target_fpr, review_fpr, confidence, source: see `fit_bands`.
        per_category: thresholds for each category instead of one pair for all.
        pool_small: judge categories with too few normals by thresholds from the normals of all categories, which
            promise a rate over the mixture of these normals and none for such a category alone.

    Raises:
        OptionError: a category has too few normals and `pool_small` is not set; or as `fit_bands`.
        DataError: as `fit_bands`.
    """
    rate = target_fpr or HIGHEST_PROMISED
    needed = normals_needed(rate, confidence)
    counts = {name: np.size(scores) for name, scores in normals.items()}
    small = {name: count for name, count in counts.items() if count < needed}
    everything = np.concatenate([np.asarray(scores, np.float64) for scores in normals.values()] or [np.zeros(0)])
    if not per_category:
        return DecisionRule(kind, fit_bands(everything, target_fpr, review_fpr, confidence, source), {})
    if small and not pool_small:
        raise OptionError(
            f"too few normal images for a false-positive rate of {rate:g} at {100 * confidence:g} % "
            f"confidence, which takes {needed}: {_shortages(small, confidence)}; ask for a higher rate or a lower "
            f"confidence, or judge these by the normals of all categories together (too_few=pooled)"
        )
    own = {
        name: fit_bands(scores, target_fpr, review_fpr, confidence, source)
        for name, scores in normals.items()
        if name not in small
    }
    common = fit_bands(everything, target_fpr, review_fpr, confidence, source) if small else None
    return DecisionRule(kind, common, own)


def _shortages(counts: Mapping[str, int], confidence: float) -> str:
    """Return which categories have too few normals, and what rate they could support."""
    words = []
    for name, count in sorted(counts.items()):
        best = f" (which support {rounded_up(smallest_supported_rate(count, confidence)):g} at best)" if count else ""
        words.append(f"{name} has {count}{best}")
    return ", ".join(words)


def _check_keys(cls: type, content: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(cls)}
    if set(content) != names:
        raise ModelError(
            f"{cls.__name__} has the keys {', '.join(sorted(names))} but this one has "
            f"{', '.join(sorted(content)) or 'none'}; fit it again with this version"
        )


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise OptionError(f"{name} is {value}; it must lie between 0 and 1")


def _finite_scores(scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    broken = np.flatnonzero(~np.isfinite(values))
    if len(broken):
        raise DataError(
            f"score {broken[0]} is {values.flat[broken[0]]}; "
            f"leave out images that could not be scored, or mend the model that gave it"
        )
    return values


def rounded_up(rate: float) -> float:
    """Return a rate with three significant digits that is not below it, so that asking for what was printed works."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / step) * step
