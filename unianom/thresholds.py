"""A decision threshold from the scores of held-out normal images, with a guarantee on its false-positive rate.

"score > s_(r)", with s_(1) ≤ … ≤ s_(n) the sorted scores of n normal images that no part of the model has seen, is
a one-sided distribution-free tolerance limit (Wilks 1941): for scores drawn independently from one continuous
distribution the true rate of false positives follows Beta(n − r + 1, r), whatever that distribution is, so

    P(true rate > target) = P(Binomial(n, target) ≤ n − r).

The smallest r that keeps this at or below 1 − confidence is taken. If scores can tie, the rate can only be lower:
a score equal to the threshold passes, and the distribution function at s_(r) is then at least the uniform order
statistic it is in the continuous case. ("score ≥ threshold" would lose the guarantee.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from unianom.errors import DataError, ModelError, OptionError

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
        """Decision for each score.

        Args:
            scores: image scores of any shape.

        Returns:
            "fail" where the score is above the threshold, else "pass"; the same shape.

        Raises:
            DataError: a score is NaN or infinite.
        """
        return np.where(_finite_scores(scores) > self.value, "fail", "pass")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Threshold:
        """The inverse of `to_dict`.

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
    """Lowest false-positive rate that n normals can vouch for: 1 − (1 − confidence)^(1/n), about 3/n at 0.95.

    At it the threshold is the highest normal score.

    Raises:
        OptionError: n below 1 or a confidence outside (0, 1).
    """
    _check_probability("confidence", confidence)
    if n < 1:
        raise OptionError(f"n is {n}; a false-positive rate needs at least 1 normal score")
    return -math.expm1(math.log1p(-confidence) / n)


def normals_needed(rate: float, confidence: float = 0.95) -> int:
    """Smallest number of normals that can vouch for a false-positive rate: log(1 − confidence) / log(1 − rate).

    Raises:
        OptionError: a rate or confidence outside (0, 1).
    """
    _check_probability("rate", rate)
    _check_probability("confidence", confidence)
    return max(1, math.ceil((math.log1p(-confidence) + _ROUNDING) / math.log1p(-rate)))


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
    """A rate with three significant digits that is not below it, so that asking for what was printed works."""
    step = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / step) * step
