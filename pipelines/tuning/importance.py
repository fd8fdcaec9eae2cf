"""How much the objective of a campaign hangs on each option.

Optuna's fANOVA does not do: its shares always sum to 1, so where all is noise some option gets most of it, and it takes
settings of one trial for independent. It is also slow on the thousands of settings that a campaign has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor

from pipelines.tuning.option_columns import columns_of

FEWEST, MOST_SETTINGS, FOLDS, TREES, SHUFFLES = 8, 2000, 5, 40, 10
"""Settings at least and at most, parts that are held out in turn, trees of a forest, shuffles of an option."""


def importance(
    values: Sequence[Mapping[str, Any]],
    objective: Sequence[float | None],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return how much the objective hangs on each option: what a random forest loses when the option is shuffled.

    Each setting is predicted by a forest that did not see it, so an option that is only noise gets about 0 and may get
    a little less. Shuffling an option that decides all by itself costs about 2, since it doubles the squared error
    that a constant would have.

    Args:
        values: of N settings.
        objective: N; settings with None or NaN are left out.
        seed: of the choice among more than 2,000 settings, of the forests and of the shuffling.
        groups: trial of each setting. Settings of one trial are then held out together; else an option that only
            tells trials apart would pass for whatever made them differ.

    Returns:
        Rows of option, importance (R² of the held-out settings minus that after shuffling, mean over ten shuffles) and
        sd (over the shuffles), most important first; nothing with fewer than 8 settings or only one objective. Options
        that do not vary are left out.
    """
    known = [number for number, value in enumerate(objective) if value is not None and math.isfinite(value)]
    generator = np.random.default_rng(seed)
    if len(known) > MOST_SETTINGS:
        known = sorted(generator.choice(known, MOST_SETTINGS, replace=False).tolist())
    y = np.array([objective[n] for n in known], np.float64)
    columns = columns_of([values[n] for n in known])
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if len(known) < FEWEST or not columns or len(np.unique(y)) == 1:
        return []
    blocks = [column.encoded() for column in columns]
    ends = np.cumsum([block.shape[1] for block in blocks])
    table = np.hstack(blocks)
    fold = _folds(generator, [groups[n] for n in known] if groups is not None else [str(n) for n in known])
    shuffled = np.array([generator.permutation(len(y)) for _ in range(SHUFFLES)])  # shuffles N
    plain = 0.0
    losses = np.zeros((len(columns), SHUFFLES))
    for number in np.unique(fold):
        held = np.flatnonzero(fold == number)
        forest = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=seed, n_jobs=1)
        forest.fit(table[fold != number], y[fold != number])
        plain += float(((forest.predict(table[held]) - y[held]) ** 2).sum())
        for place, (block, end) in enumerate(zip(blocks, ends, strict=True)):
            changed = np.tile(table[held], (SHUFFLES, 1))
            # all columns of an option move together; values come from all settings, as a fold may hold but one
            changed[:, end - block.shape[1] : end] = block[shuffled[:, held].ravel()]
            found = forest.predict(changed).reshape(SHUFFLES, len(held))
            losses[place] += ((found - y[held]) ** 2).sum(axis=1)
    drops = (losses - plain) / total
    rows = [
        {"option": column.option, "importance": float(drop.mean()), "sd": float(drop.std(ddof=1))}
        for column, drop in zip(columns, drops, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["importance"])


def _folds(generator: np.random.Generator, groups: Sequence[str]) -> NDArray[np.int64]:
    """Return the (N,) part in which each setting is held out; each its own group where all are of one group."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) == 1:
        names, member = np.arange(len(groups)).astype(str), np.arange(len(groups))
    return (generator.permutation(len(names)) % min(FOLDS, len(names)))[member]
