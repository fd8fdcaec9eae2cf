"""A decision threshold from the scores of held-out normal images, with a guarantee on its false-positive rate.

"score > s_(r)", with s_(1) ≤ … ≤ s_(n) the sorted scores of n normal images that no part of the model has seen, is
a one-sided distribution-free tolerance limit (Wilks 1941): for scores drawn independently from one continuous
distribution the true rate of false positives follows Beta(n − r + 1, r), whatever that distribution is, so

    P(true rate > target) = P(Binomial(n, target) ≤ n − r).

The smallest r that keeps this at or below 1 − confidence is taken. If scores can tie, the rate can only be lower:
a score equal to the threshold passes, and the distribution function at s_(r) is then at least the uniform order
statistic it is in the continuous case. ("score ≥ threshold" would lose the guarantee.)

Two such thresholds, for a low and a higher rate, make bands: fail above the one, review between both, pass below. A
`DecisionRule` has bands for all categories together, or for each; every promise is then kept with the confidence
asked for by itself, not all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unianom.errors import DataError, ModelError, OptionError

PASS, REVIEW, FAIL = "pass", "review", "fail"

ScoreKind = Literal["raw", "calibrated"]
"""Which score of an image is judged."""

# Slack for rounding in logarithms, so that the smallest rate n normals support needs n normals and not n + 1.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Threshold:
    """A decision threshold and how it was chosen.

    Attributes:
        value: scores above it fail, scores at or below it pass.
        target_fpr: the false-positive rate promised, in (0, 1).
        confidence: probability, over the draw of the normals, that the promise holds.
        n_normals: number of normal scores it was chosen from.
        rank: `value` is the rank-th smallest of them, from 1.
        observed_fpr: share of them above `value`; lower than the target by the margin the confidence asks for.
    """

    value: float
    target_fpr: float
    confidence: float
    n_normals: int
    rank: int
    observed_fpr: float

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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Threshold:
        """Make an instance from what `to_dict` gave.

        Raises:
            ModelError: keys are missing or unknown, or a value is not a number.
        """
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise ModelError(
                f"a threshold has the keys {', '.join(sorted(names))} but this one has "
                f"{', '.join(sorted(content)) or 'none'}; fit it again with this version"
            )
        try:
            return cls(
                value=float(content["value"]),
                target_fpr=float(content["target_fpr"]),
                confidence=float(content["confidence"]),
                n_normals=int(content["n_normals"]),
                rank=int(content["rank"]),
                observed_fpr=float(content["observed_fpr"]),
            )
        except (TypeError, ValueError) as error:
            raise ModelError(f"a value of this threshold is not a number ({error}); fit it again") from error


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
            f"at {100 * confidence:g} % confidence: the lowest rate they support is {_rounded_up(lowest):g}, "
            f"and {target_fpr:g} needs {needed} normal scores; "
            f"add normal images, or ask for a higher rate or a lower confidence"
        )
    from scipy.stats import binom  # takes longer to import than all else here

    # How many normals may lie above the threshold: binom.ppf is the first count whose cumulative probability
    # reaches 1 − confidence, so the largest count that does not exceed it is that one or the one before. None above
    # is always right, since n is large enough.
    risk = 1 - confidence
    above = int(binom.ppf(risk, n, target_fpr))
    if above > 0 and binom.cdf(above, n, target_fpr) > risk:
        above -= 1
    rank = n - above
    value = float(ordered[rank - 1])
    return Threshold(
        value=value,
        target_fpr=target_fpr,
        confidence=confidence,
        n_normals=n,
        rank=rank,
        observed_fpr=float(np.count_nonzero(ordered > value) / n),
    )


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


def fit_bands(scores: ArrayLike, target_fpr: float, review_fpr: float, confidence: float = 0.95) -> Bands:
    """Choose both thresholds from the same normal scores.

    Args:
        scores: (n,) scores of held-out normal images.
        target_fpr: highest share of normal images that may fail.
        review_fpr: highest share of normal images that may fail or come to review; at least `target_fpr`.
        confidence: of each promise.

    Raises:
        OptionError, DataError: as `fit_threshold`, or review_fpr is below target_fpr.
    """
    if review_fpr < target_fpr:
        raise OptionError(
            f"review_fpr={review_fpr:g} is below target_fpr={target_fpr:g}; it counts the images that fail, too, so "
            f"give at least as much"
        )
    fail = fit_threshold(scores, target_fpr, confidence)
    spread = float(np.std(np.sort(np.asarray(scores, dtype=np.float64))))  # sorted: rounding depends on the order
    return Bands(fail, fit_threshold(scores, review_fpr, confidence), spread or 1.0)


def fit_rule(
    normals: Mapping[str, ArrayLike],
    kind: ScoreKind,
    target_fpr: float,
    review_fpr: float,
    confidence: float = 0.95,
    per_category: bool = False,
    pool_small: bool = False,
) -> DecisionRule:
    """Choose the thresholds of a rule.

    Args:
        normals: (n,) scores of held-out normal images by category.
        kind: which scores these are.
        target_fpr, review_fpr, confidence: see `fit_bands`.
        per_category: thresholds for each category instead of one pair for all.
        pool_small: judge categories with too few normals by thresholds from the normals of all categories, which
            promise a rate over the mixture of these normals and none for such a category alone.

    Raises:
        OptionError: a category has too few normals and `pool_small` is not set; or as `fit_bands`.
        DataError: as `fit_bands`.
    """
    needed = normals_needed(target_fpr, confidence)
    counts = {name: np.size(scores) for name, scores in normals.items()}
    small = {name: count for name, count in counts.items() if count < needed}
    everything = np.concatenate([np.asarray(scores, np.float64) for scores in normals.values()] or [np.zeros(0)])
    if not per_category:
        return DecisionRule(kind, fit_bands(everything, target_fpr, review_fpr, confidence), {})
    if small and not pool_small:
        raise OptionError(
            f"too few held-out normal images for a false-positive rate of {target_fpr:g} at {100 * confidence:g} % "
            f"confidence, which takes {needed}: {_shortages(small, confidence)}; ask for a higher rate or a lower "
            f"confidence, or judge these by the normals of all categories together (too_few=pooled)"
        )
    own = {
        name: fit_bands(scores, target_fpr, review_fpr, confidence)
        for name, scores in normals.items()
        if name not in small
    }
    return DecisionRule(kind, fit_bands(everything, target_fpr, review_fpr, confidence) if small else None, own)


def _shortages(counts: Mapping[str, int], confidence: float) -> str:
    """Return which categories have too few normals, and what rate they could support."""
    words = []
    for name, count in sorted(counts.items()):
        best = f" (which support {_rounded_up(smallest_supported_rate(count, confidence)):g} at best)" if count else ""
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


def _rounded_up(rate: float) -> float:
    """Return a rate with three significant digits that is not below it, so that asking for what was printed works."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / step) * step
