"""What a hyper-parameter campaign shows of itself: which options matter, what was gained, tables and figures.

    settings, trials ─▶ importance, front, rank correlation, gain by category ─▶ tables, figures, section

Plain functions on plain data, which know neither Ray nor MLflow. A *setting* is what was measured once: a mapping of
`trial`, `values` (by dotted option name), `objective` (larger is better; may be None), `metrics` and `by_category`
(objective of each category). A *trial* is what was run: `trial`, `status` (done, stopped, failed, crashed), `error`,
`values`, `reports` (`progress` in percent and `objective`), `objective` of its best setting, `seconds`, `latency_ms`
and `memory_mb`. Values are numbers, text, booleans, None or lists of these.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.ensemble import RandomForestRegressor

from pipelines.runtime.cli import console, print_table
from unianom import visual

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

STATUSES = ("done", "stopped", "failed", "crashed")
"""How a trial may end."""

UNDEFINED = "–"

_LOG_SPAN = 30
"""An axis is logarithmic above this ratio of its largest to its smallest value."""

_FEWEST, _MOST_SETTINGS, _FOLDS, _TREES, _SHUFFLES, _MOST_LEVELS = 8, 2000, 5, 40, 10, 32

_RESAMPLES = 1000

_LINES, _BEST_SHARE, _OPTION_AXES, _PANELS, _STRIPS, _BARS, _TOP = 500, 0.1, 9, 12, 8, 20, 5
"""Lines of parallel coordinates, share of them in colour, axes of options, panels, strips of a panel, bars, and
settings in tables: what is drawn at most."""

_MARKED, _PLAIN, _INK, _FAINT, _GRID = "#dd6b33", "#3f83c9", "#3a4150", "#9aa3b0", "#dde1e7"
_RISING = LinearSegmentedColormap.from_list("rising", ["#7fc4b4", "#3f83c9", "#2b3a8c"])
"""Colours of the best lines, the darkest for the best; none is near the grey of the rest or the orange of the chosen
one."""


# -- options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """What one option was in each of N settings.

    Attributes:
        option: its dotted name.
        numbers: (N,) float64, NaN where the value is None or absent; empty if the option is no number.
        levels: the different values in words, in order; empty if the option is a number.
        index: (N,) int64 place among the levels; empty if the option is a number.
    """

    option: str
    numbers: Floats
    levels: tuple[str, ...]
    index: NDArray[np.int64]

    @property
    def varies(self) -> bool:
        """Whether there are two different values."""
        if self.levels:
            return len(self.levels) > 1
        return len(np.unique(self.numbers)) > 1  # NaN counts as one value

    @property
    def log(self) -> bool:
        """Whether its axis is logarithmic."""
        return not self.levels and _spans(self.numbers)

    def encoded(self) -> Floats:
        """(N, K) numbers for a forest: the value itself and whether there is none, or one column a level."""
        if not self.levels:
            absent = np.isnan(self.numbers)
            filled = np.where(absent, np.nanmedian(self.numbers), self.numbers)
            return np.column_stack([filled, absent]) if absent.any() else filled[:, None]
        count = np.bincount(self.index, minlength=len(self.levels))
        common = np.sort(np.argsort(-count, kind="stable")[:_MOST_LEVELS])  # rare ones are all zeros
        return (self.index[:, None] == common).astype(np.float64)


def columns_of(values: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The options that vary, in the order in which they first come; an absent one counts as None."""
    names = dict.fromkeys(name for row in values for name in row)
    return [column for name in names if (column := _column(name, [row.get(name) for row in values])).varies]


def _column(option: str, values: Sequence[Any]) -> Column:
    known = [value for value in values if value is not None]
    if known and all(map(_is_number, known)):
        numbers = np.array([math.nan if value is None else float(value) for value in values])
        return Column(option, numbers, (), np.zeros(0, np.int64))
    levels = {in_words(value): value for value in values}
    ordered = sorted(levels, key=lambda word: (0, levels[word], "") if _is_number(levels[word]) else (1, 0, word))
    place = {word: number for number, word in enumerate(ordered)}
    return Column(option, np.zeros(0), tuple(ordered), np.array([place[in_words(value)] for value in values], np.int64))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def in_words(value: Any) -> str:
    """A value as a command line takes it, numbers to six digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(in_words, value)) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _spans(values: Floats) -> bool:
    known = np.unique(values[np.isfinite(values)])
    if not len(known) or known[0] <= 0 or known[-1] <= _LOG_SPAN * known[0]:
        return False
    # many evenly drawn values come near 0 by chance; their middle would lie at the far end of a logarithmic axis
    middle = float(np.quantile(known, 0.5, method="lower"))
    return bool(_scaled(middle, known[0], known[-1], log=True) < 0.75)


def short_names(options: Sequence[str]) -> dict[str, str]:
    """For each dotted name as many of its last parts as tell it from the others."""
    short = {}
    for option in options:
        parts = option.split(".")
        tails = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        others = [f".{other}" for other in options if other != option]
        short[option] = next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), option)
    return short


def _objectives(rows: Sequence[Mapping[str, Any]], key: str = "objective") -> Floats:
    """(N,) with NaN where there is none."""
    return np.array([math.nan if row.get(key) is None else row[key] for row in rows], np.float64)


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those with an objective."""
    return [row for row, known in zip(rows, np.isfinite(_objectives(rows)), strict=True) if known]


# -- what the numbers say ----------------------------------------------------------------------------------------------


def importance(
    values: Sequence[Mapping[str, Any]],
    objective: Sequence[float | None],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """How much the objective hangs on each option: what a random forest loses when the option is shuffled.

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
    if len(known) > _MOST_SETTINGS:
        known = sorted(generator.choice(known, _MOST_SETTINGS, replace=False).tolist())
    y = np.array([objective[n] for n in known], np.float64)
    columns = columns_of([values[n] for n in known])
    total = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if len(known) < _FEWEST or not columns or len(np.unique(y)) == 1:
        return []
    blocks = [column.encoded() for column in columns]
    ends = np.cumsum([block.shape[1] for block in blocks])
    table = np.hstack(blocks)
    fold = _folds(generator, [groups[n] for n in known] if groups is not None else [str(n) for n in known])
    shuffled = np.array([generator.permutation(len(y)) for _ in range(_SHUFFLES)])  # shuffles N
    plain = 0.0
    losses = np.zeros((len(columns), _SHUFFLES))
    for number in np.unique(fold):
        held = np.flatnonzero(fold == number)
        forest = RandomForestRegressor(_TREES, min_samples_leaf=2, random_state=seed, n_jobs=1)
        forest.fit(table[fold != number], y[fold != number])
        plain += float(((forest.predict(table[held]) - y[held]) ** 2).sum())
        for place, (block, end) in enumerate(zip(blocks, ends, strict=True)):
            changed = np.tile(table[held], (_SHUFFLES, 1))
            # all columns of an option move together; values come from all settings, as a fold may hold but one
            changed[:, end - block.shape[1] : end] = block[shuffled[:, held].ravel()]
            found = forest.predict(changed).reshape(_SHUFFLES, len(held))
            losses[place] += ((found - y[held]) ** 2).sum(axis=1)
    drops = (losses - plain) / total
    rows = [
        {"option": column.option, "importance": float(drop.mean()), "sd": float(drop.std(ddof=1))}
        for column, drop in zip(columns, drops, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["importance"])


def _folds(generator: np.random.Generator, groups: Sequence[str]) -> NDArray[np.int64]:
    """(N,) number of the part in which each setting is held out; by setting where all are of one group."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) == 1:
        names, member = np.arange(len(groups)).astype(str), np.arange(len(groups))
    return (generator.permutation(len(names)) % min(_FOLDS, len(names)))[member]


def pareto_front(values: ArrayLike, larger_is_better: Sequence[bool]) -> Flags:
    """Rows that no other row beats: none is as good in every column and better in one.

    Args:
        values: (N, K).
        larger_is_better: K; of each column.

    Returns:
        (N,) bool. Equal rows are on the front together; a row with NaN never is, and beats none.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.shape[1] != len(larger_is_better):
        raise ValueError(f"values of shape {table.shape} do not fit {len(larger_is_better)} directions")
    table = np.where(np.asarray(larger_is_better, bool), table, -table)
    front = np.asarray(~np.isnan(table).any(axis=1))
    known = table[front]
    front[front] = [not ((known >= row).all(axis=1) & (known > row).any(axis=1)).any() for row in known]
    return front


def rank_correlation(validation_set: ArrayLike, test: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """How far validation images rank settings as the test set does.

    Args:
        validation_set: (N,) objective of each setting without test data; None and NaN are left out.
        test: (N,) its objective on the test set.
        seed: of the bootstrap.

    Returns:
        n (pairs), spearman (ρ), kendall (τ-b), both None where undefined, and spearman_interval: low and high of the
        percentile bootstrap at 95 % over 1,000 resamples of the pairs, None below 4 pairs.
    """
    pairs = np.stack([np.asarray(validation_set, np.float64), np.asarray(test, np.float64)])
    pairs = pairs[:, np.isfinite(pairs).all(axis=0)]
    n = pairs.shape[1]
    found: dict[str, Any] = {"n": n, "spearman": None, "kendall": None, "spearman_interval": None}
    if n < 2 or (np.ptp(pairs, axis=1) == 0).any():
        return found
    found["spearman"] = float(_spearman(pairs[None])[0])
    found["kendall"] = float(stats.kendalltau(*pairs).statistic)
    if n >= 4:
        drawn = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
        drawn_rho = _spearman(pairs[:, drawn].transpose(1, 0, 2))
        low, high = np.nanquantile(drawn_rho, (0.025, 0.975))  # NaN: a resample of one value only
        found["spearman_interval"] = [float(low), float(high)]
    return found


def _spearman(pairs: Floats) -> Floats:
    """(R,) ρ of R×2×N values; NaN where a side is constant."""
    ranks = stats.rankdata(pairs, axis=2)
    ranks = ranks - ranks.mean(axis=2, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=2).prod(axis=1))
    with np.errstate(invalid="ignore"):
        return (ranks[:, 0] * ranks[:, 1]).sum(axis=1) / scale


def category_gain(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each category would gain by a setting of its own.

    Args:
        settings: those without a category of the others cannot be the common one.

    Returns:
        Rows of category ("mean" last), common (objective there of the setting with the largest mean over the
        categories), own (of the category's own best setting), gain (own − common), and trial and values of the own
        best setting, in the last row of the common one; nothing if no setting holds all categories.
    """
    known = [
        {name: float(y) for name, y in (setting.get("by_category") or {}).items() if y is not None and math.isfinite(y)}
        for setting in settings
    ]
    names = sorted({name for found in known for name in found})
    whole = [number for number, found in enumerate(known) if len(found) == len(names)]
    if not names or not whole:
        return []
    common = max(whole, key=lambda number: math.fsum(known[number].values()))
    rows = []
    for name in names:
        own = max((number for number, found in enumerate(known) if name in found), key=lambda n: known[n][name])
        rows.append(_gain(name, known[common][name], known[own][name], settings[own]))
    means = [math.fsum(row[key] for row in rows) / len(rows) for key in ("common", "own")]
    return [*rows, _gain("mean", means[0], means[1], settings[common])]


def _gain(name: str, common: float, own: float, setting: Mapping[str, Any]) -> dict[str, Any]:
    values = {"trial": setting.get("trial"), "values": dict(setting.get("values") or {})}
    return {"category": name, "common": common, "own": own, "gain": own - common, **values}


# -- tables ------------------------------------------------------------------------------------------------------------


def trial_rows(trials: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each trial, with a column for each option."""
    keys = ("objective", "seconds", "latency_ms", "memory_mb")
    return [
        {
            "trial": trial["trial"],
            "status": trial["status"],
            "progress": max((report["progress"] for report in trial.get("reports") or ()), default=None),
            **{key: trial.get(key) for key in keys},
            **{option: _cell(value) for option, value in trial["values"].items()},
            "error": trial.get("error"),
        }
        for trial in trials
    ]


def setting_rows(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A flat row for each setting, with a column for each option, metric and category (`CATEGORY/objective`)."""
    return [
        {
            "trial": setting["trial"],
            "objective": setting["objective"],
            **{option: _cell(value) for option, value in setting["values"].items()},
            **(setting.get("metrics") or {}),
            **{f"{name}/objective": value for name, value in (setting.get("by_category") or {}).items()},
        }
        for setting in settings
    ]


def _cell(value: Any) -> Any:
    """A value for CSV, where an empty cell says that a trial has no such option: text and numbers stay, others are
    JSON."""
    return value if isinstance(value, str) or _is_number(value) else json.dumps(value)


# -- figures -----------------------------------------------------------------------------------------------------------


def _nothing(title: str, words: str) -> Figure:
    """A figure that says why it is empty."""
    figure = Figure(figsize=(4.6, 1.2), layout="constrained")
    axes = figure.add_subplot()
    visual.quiet(axes, title, "", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=8, color=_FAINT)
    return figure


def _caption(figure: Figure, words: str) -> None:
    """Small type below a figure with constrained layout."""
    words = textwrap.fill(words, int(18 * figure.get_figwidth()))
    figure.supxlabel(words, fontsize=7, color=_INK, x=0.01, ha="left", parse_math=False)


def _wrap(word: str, width: int, lines: int = 2) -> str:
    """Break a name or a value after spaces and punctuation, and cut out its middle where it is still too long."""
    if len(word) > width * lines:
        head = width * lines // 2 - 1
        word = f"{word[:head]}…{word[-head:]}"
    found = [""]
    for part in re.findall(r"[^\s_.,/-]*[\s_.,/-]?", word):
        if found[-1] and len(found[-1]) + len(part.rstrip()) > width and len(found) < lines:
            found.append("")
        found[-1] += part
    return "\n".join(line.strip() for line in found)


def _floor(values: Floats) -> float:
    """Where the axis of an objective starts: at the least value, or higher where a few failures would flatten what is
    worth seeing."""
    low, most, high = np.quantile(values, (0, 0.1, 1))
    return float(low if most == high else max(low, most - 1.5 * (high - most)))


def _limit(axes: Axes, floor: float, high: float) -> None:
    margin = 0.05 * (high - floor) or 0.01 * max(abs(high), 0.1)
    axes.set_ylim(floor - margin, high + margin)


def _below(values: Floats, floor: float) -> str:
    """What a caption says of values that are drawn on the lower edge."""
    count = int((values < floor).sum())
    return f"; {_count(count, 'lower value')} at the lower edge" if count else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _log_axis(axes: Axes, values: Floats) -> None:
    """A logarithmic x axis with a few plain numbers on it."""
    axes.set_xscale("log")
    decades = math.log10(values.max() / values.min())
    steps = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float, digits: int = 3) -> str:
    """A number to some digits, whole ones below a million as they are, without needless zeros in an exponent."""
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].replace("+", ""), f"{value:.{digits}g}")


def _most_telling(columns: Sequence[Column], objective: Floats, most: int) -> list[Column]:
    """At most so many options: those whose levels, or eighths by count, differ most in objective, less what they would
    by chance."""

    def between(column: Column) -> float:
        part = column.index if column.levels else _eighths(column.numbers)
        groups = [objective[part == n] for n in np.unique(part)]
        found = sum(len(group) * (group.mean() - objective.mean()) ** 2 for group in groups)
        by_chance = (len(groups) - 1) / max(len(objective) - 1, 1) * len(objective) * objective.var()
        return float(found - by_chance)

    kept = np.argsort([-between(column) for column in columns], kind="stable")[:most]
    return [columns[place] for place in np.sort(kept)]


def _eighths(numbers: Floats) -> NDArray[np.int64]:
    """(N,) 1 to 8, from the lowest to the highest eighth by count; 0 where there is no number."""
    edges = np.nanquantile(numbers, np.linspace(0, 1, 9)[1:-1])
    return np.where(np.isnan(numbers), 0, np.searchsorted(edges, numbers) + 1)


def parallel_coordinates(settings: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None = None) -> Figure:
    """Each setting as a line across its options to its objective, the best tenth in colour above the grey rest.

    Args:
        settings: at most 500 lines are drawn; of the grey ones a seeded choice.
        best: the setting that was chosen, drawn in orange; may be another than that of the largest objective.
    """
    title = "Settings, from their options to the objective"
    settings = _measured(settings)
    # the chosen one takes its place on the axes with the others
    every = [*settings, *([best] if best is not None and _measured([best]) else [])]
    y = _objectives(every)
    columns = columns_of([setting["values"] for setting in every])
    if not columns:
        return _nothing(title, "no option varies")
    shown = _most_telling(columns, y, _OPTION_AXES)
    names = short_names([column.option for column in columns])
    n = len(settings)
    generator = np.random.default_rng(0)
    order = np.argsort(-y[:n], kind="stable")
    top = order[: min(math.ceil(_BEST_SHARE * n), round(_BEST_SHARE * _LINES))]
    rest = order[len(top) :]
    if len(rest) > _LINES - len(top):
        rest = generator.choice(rest, _LINES - len(top), replace=False)

    figure = Figure(figsize=(max(1.3 * (len(shown) + 1) + 0.5, 4.2), 4.0), layout="constrained")
    axes = figure.add_subplot()
    heights = []
    for place, column in enumerate(shown):
        height, ticks = _coordinate(column)
        if column.levels:  # lines of one level lie beside each other
            height = height + generator.uniform(-0.012, 0.012, len(height))
        heights.append(height)
        _draw_coordinate(axes, place, _wrap(names[column.option], 15, 3), ticks)
    floor, high = _floor(y), float(y.max())
    heights.append((np.maximum(y, floor) - floor) / (high - floor) if high > floor else np.full(len(y), 0.5))
    _draw_coordinate(axes, len(shown), "objective", _number_ticks(y[y >= floor], floor, high, log=False))
    points = np.stack([np.broadcast_to(np.arange(len(heights)), (len(y), len(heights))), np.array(heights).T], axis=2)

    alpha = 0.8 if len(rest) < 50 else 0.35
    axes.add_collection(LineCollection(list(points[rest]), colors=_FAINT, linewidths=0.5, alpha=alpha, zorder=1))
    rising = top[::-1]  # the best on top
    colours = _RISING(np.linspace(0, 1, len(rising)) if len(rising) > 1 else np.ones(1))
    axes.add_collection(LineCollection(list(points[rising]), colors=colours, linewidths=1.1, alpha=0.85, zorder=2))
    if len(every) > n:
        axes.plot(*points[-1].T, color=_MARKED, linewidth=2.2, zorder=3, label="chosen")
    axes.set_xlim(-0.75, len(shown) + 0.15)
    axes.set_ylim(-0.06, 1.2)
    axes.set_title(title, fontsize=9, loc="left", fontweight="bold", color=_INK)
    axes.set_axis_off()
    first = "best" if len(top) == 1 else f"best {len(top):,}"
    words = f"in colour: the {first} of {_count(n, 'setting')}; grey: {_count(len(rest), 'other')}"
    if len(rest) < n - len(top):
        words += f", drawn at random from {n - len(top):,}"
    if len(shown) < len(columns):
        words += f"; the {len(shown)} of {len(columns)} options that tell most"
    words += "; orange: the chosen one" if len(every) > n else ""
    _caption(figure, words + _below(y[:n], floor))
    return figure


Ticks = list[tuple[float, str]]


def _coordinate(column: Column) -> tuple[Floats, Ticks]:
    """Heights of an option's values on its axis from 0 to 1, and what is written beside it where."""
    if column.levels:
        heights = np.linspace(0, 1, len(column.levels))
        step = math.ceil(len(heights) / 10)
        ticks = [(height, word) for height, word in zip(heights, column.levels, strict=True)]
        return heights[column.index], ticks[::step]
    known = column.numbers[np.isfinite(column.numbers)]
    low, high = known.min(), known.max()
    at = _scaled(column.numbers, low, high, column.log)
    ticks = _number_ticks(known, low, high, column.log)
    if len(known) < len(column.numbers):  # None has a place of its own below the numbers
        at = np.where(np.isfinite(at), 0.14 + 0.86 * at, 0)
        ticks = [(0, in_words(None)), *((0.14 + 0.86 * height, word) for height, word in ticks)]
    return at, ticks


def _scaled(values: ArrayLike, low: float, high: float, log: bool) -> Floats:
    table = np.asarray(values, np.float64)
    if high == low:
        return np.where(np.isnan(table), table, 0.5)
    return np.log(table / low) / math.log(high / low) if log else (table - low) / (high - low)


def _number_ticks(values: Floats, low: float, high: float, log: bool) -> Ticks:
    """The values themselves where they are few and apart, else round numbers."""
    ticks = np.unique(values)
    if len(ticks) > 6 or (len(ticks) > 1 and np.diff(_scaled(ticks, low, high, log)).min() < 0.07):
        if log:
            steps = (1, 2, 5) if high < 100 * low else (1,)
            ticks = np.asarray(LogLocator(subs=steps, numticks=6).tick_values(low, high))
        else:
            ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        ticks = ticks[(ticks >= low) & (ticks <= high)]
    heights = _scaled(ticks, low, high, log)
    return [(float(height), _short(float(tick), 4)) for height, tick in zip(heights, ticks, strict=True)]


def _draw_coordinate(axes: Axes, place: int, name: str, ticks: Ticks) -> None:
    axes.plot([place, place], [0, 1], color=_INK, linewidth=0.8, zorder=4)
    axes.text(place, 1.05, name, fontsize=7.5, color=_INK, ha="center", va="bottom", parse_math=False)
    for height, word in ticks:
        axes.plot([place - 0.02, place], [height, height], color=_INK, linewidth=0.8, zorder=4)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
        style: dict[str, Any] = {"fontsize": 6.5, "ha": "right", "va": "center", "bbox": box, "linespacing": 0.95}
        axes.text(place - 0.04, height, _wrap(word, 16), color=_INK, zorder=5, parse_math=False, **style)


def importance_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of `importance`, with one standard deviation to either side; the first 20 options."""
    title = "Importance of the options"
    if not rows:
        return _nothing(title, "too few settings to tell, or all equally good")
    shown = list(rows)[:_BARS]
    names = short_names([row["option"] for row in rows])
    figure = Figure(figsize=(5.2, 0.9 + 0.26 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    place = np.arange(len(shown))
    sd = [row["sd"] for row in shown]
    bars: dict[str, Any] = {"ecolor": _INK, "error_kw": {"linewidth": 0.9}}
    axes.barh(place, [row["importance"] for row in shown], height=0.62, color=_PLAIN, xerr=sd, **bars)
    axes.axvline(0, color=_FAINT, linewidth=0.8)
    axes.set_yticks(place, [_wrap(names[row["option"]], 34, 1) for row in shown], parse_math=False)
    axes.invert_yaxis()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    visual.quiet(axes, title, "R² lost when the option is shuffled", "")
    axes.grid(visible=False, axis="y")
    if len(shown) < len(rows):
        _caption(figure, f"the first {len(shown)} of {len(rows)} options")
    return figure


_COSTS = {"latency_ms": "latency in ms per image", "memory_mb": "memory in MB"}


def pareto_figure(trials: Sequence[Mapping[str, Any]], front: Collection[str]) -> Figure:
    """Objective of each trial against its latency and against its memory.

    Args:
        trials: those without an objective, or without the cost, take no part.
        front: names of the trials on the common front; drawn in orange, while the line of a panel joins the trials
            that none beats in the two values of that panel.
    """
    title = "What an objective costs"
    trials = _measured(trials)
    keys = [key for key in _COSTS if np.isfinite(_objectives(trials, key)).any()]
    if not keys:
        return _nothing(title, "no latency or memory was measured")
    figure = Figure(figsize=(3.6 * len(keys), 3.2), layout="constrained")
    on_front = set(front)
    y = _objectives(trials)
    floor = _floor(y)
    first = figure.add_subplot(1, len(keys), 1)
    for number, key in enumerate(keys):
        axes = first if number == 0 else figure.add_subplot(1, len(keys), number + 1, sharey=first)
        cost = _objectives(trials, key)
        member = np.array([trial["trial"] in on_front for trial in trials])
        joined = np.flatnonzero(pareto_front(np.column_stack([y, cost]), (True, False)))
        joined = joined[np.lexsort((y[joined], cost[joined]))]
        drawn = np.maximum(y, floor)
        size = 16 if len(trials) < 300 else 6
        axes.step(cost[joined], drawn[joined], where="post", color=_MARKED, linewidth=1.1, zorder=2)
        axes.scatter(cost[~member], drawn[~member], s=size, color=_FAINT, linewidths=0, alpha=0.7)
        axes.scatter(cost[member], drawn[member], s=22, color=_MARKED, linewidths=0, zorder=3)
        known = np.isfinite(cost)
        if _spans(cost):
            _log_axis(axes, cost[known])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        best = int(np.argmax(np.where(known, y, -np.inf)))
        _name_point(axes, cost[best], y[best], str(trials[best]["trial"]), cost[known])
        _limit(axes, floor, y.max() + 0.06 * (y.max() - floor))  # room for the name
        visual.quiet(axes, _COSTS[key].split(" in ")[0].capitalize(), _COSTS[key], "objective" if number == 0 else "")
        axes.tick_params(labelleft=number == 0)
    words = (
        f"{_count(len(trials), 'trial')}; orange: on the common front; line: what none beats in the two values shown"
    )
    _caption(figure, words + _below(y, floor))
    return figure


def _name_point(axes: Axes, x: float, y: float, name: str, every: Floats) -> None:
    """Write a name above a point, on the side that has room."""
    low, high = every.min(), every.max()
    right = high > low and _scaled(x, low, high, axes.get_xscale() == "log") > 0.5
    axes.annotate(
        _wrap(name, 28, 1),
        (x, y),
        xytext=(3 if right else -3, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        fontsize=7,
        color=_INK,
        fontweight="bold",
        zorder=5,
        parse_math=False,
    )


def history_figure(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """How the objective of each trial grew, those stopped early ending in a cross; without intermediate reports, the
    objective of each trial in turn and the best so far."""
    curves = [
        np.array([(r["progress"], r["objective"]) for r in trial.get("reports") or () if _known(r)], np.float64)
        for trial in trials
    ]
    if not any(len(curve) > 1 for curve in curves):
        return _history_in_turn(trials)
    figure, axes = _wide_figure()
    final = [(curve, trial) for curve, trial in zip(curves, trials, strict=True) if len(curve)]
    ends = np.array([curve[-1, 1] for curve, _ in final])
    y = _objectives([trial for _, trial in final])
    best = int(np.nanargmax(np.where(np.isfinite(y), y, ends - 1e6)))
    alpha = min(0.7, max(0.05, 35 / len(final)))
    lines = [curve for curve, _ in final if len(curve) > 1]
    axes.add_collection(LineCollection(lines, colors=_FAINT, linewidths=0.8, alpha=alpha, zorder=1))
    reported = np.concatenate([curve[:, 1] for curve, _ in final])
    floor, high = _floor(reported), float(reported.max())
    small = len(final) >= 300
    for status, marker, colour in (("done", "o", _PLAIN), ("stopped", "x", _INK)):
        points = np.array([curve[-1] for curve, trial in final if trial["status"] == status]).reshape(-1, 2)
        style: dict[str, Any] = {"markersize": (2 if small else 3.5), "markeredgewidth": 0.8, "zorder": 3}
        if len(points):
            words = "finished" if status == "done" else "stopped early"
            place = np.maximum(points[:, 1], floor)
            axes.plot(points[:, 0], place, marker, color=colour, alpha=0.8, label=words, **style)
    curve, trial = final[best]
    axes.plot(*curve.T, color=_MARKED, linewidth=1.8, zorder=4, label=f"best: {_wrap(str(trial['trial']), 28, 1)}")
    axes.plot(*curve[-1], "X" if trial["status"] == "stopped" else "o", color=_MARKED, markersize=6, zorder=4)
    axes.set_xlim(-2, 102)
    _limit(axes, floor, high)
    visual.quiet(axes, "Objective while training", "progress in %", "objective")
    _legend(axes)
    _caption(figure, _ended(trials) + _below(ends, floor))
    return figure


def _known(report: Mapping[str, Any]) -> bool:
    value = report.get("objective")
    return value is not None and math.isfinite(value)


def _history_in_turn(trials: Sequence[Mapping[str, Any]]) -> Figure:
    y = _objectives(trials)
    known = np.flatnonzero(np.isfinite(y))
    if not len(known):
        return _nothing("Objective of each trial", "no trial has an objective")
    figure, axes = _wide_figure()
    floor = _floor(y[known])
    number = np.arange(1, len(y) + 1)
    style: dict[str, Any] = {"markersize": 4 if len(known) < 300 else 1.8, "zorder": 2}
    axes.plot(number[known], np.maximum(y[known], floor), "o", color=_PLAIN, alpha=0.7, label="trial", **style)
    running = np.maximum(np.fmax.accumulate(y), floor)
    axes.step(number, running, where="post", color=_MARKED, linewidth=1.5, zorder=3, label="best so far")
    best = int(np.nanargmax(y))
    axes.plot(number[best], y[best], "o", color=_MARKED, markersize=5, zorder=4)
    _name_point(axes, number[best], y[best], str(trials[best]["trial"]), number.astype(np.float64))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlim(0.5 - 0.01 * len(y), len(y) + 0.5 + 0.01 * len(y))
    _limit(axes, floor, float(y[best]) + 0.06 * (float(y[best]) - floor))
    visual.quiet(axes, "Objective of each trial", "trial", "objective")
    _legend(axes)
    _caption(figure, _ended(trials) + _below(y[known], floor))
    return figure


def _wide_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes) -> None:
    """A key beside the axes, where it covers nothing."""
    style: dict[str, Any] = {"fontsize": 7, "frameon": False, "labelcolor": _INK, "handlelength": 1.4}
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1, 1), **style)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _ended(trials: Sequence[Mapping[str, Any]]) -> str:
    """How many trials ended in which way."""
    counts = {status: sum(trial["status"] == status for trial in trials) for status in STATUSES}
    found = ", ".join(f"{count:,} {status}" for status, count in counts.items() if count)
    return f"{_count(len(trials), 'trial')}: {found}"


def slices_figure(settings: Sequence[Mapping[str, Any]]) -> Figure:
    """The objective against each option that varies, one panel each, with medians; the 12 options that tell most."""
    title = "Objective by option"
    settings = _measured(settings)
    columns = columns_of([setting["values"] for setting in settings])
    if not columns:
        return _nothing(title, "no option varies")
    y = _objectives(settings)
    shown = _most_telling(columns, y, _PANELS)
    names = short_names([column.option for column in columns])
    across = min(4, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(max(2.3 * across, 3.4), 2.3 * down + 0.3), layout="constrained")
    floor = _floor(y)
    generator = np.random.default_rng(0)
    first: Axes | None = None
    for number, column in enumerate(shown):
        axes = figure.add_subplot(down, across, number + 1, sharey=first)
        first = first or axes
        visual.quiet(axes, _wrap(names[column.option], 26), "", "objective" if number % across == 0 else "")
        axes.title.set_fontsize(8)
        _draw_slice(axes, column, np.maximum(y, floor), generator)
        if number % across:
            axes.tick_params(labelleft=False)
    assert first is not None
    _limit(first, floor, float(y.max()))
    words = f"{_count(len(settings), 'setting')}; orange: medians"
    if len(shown) < len(columns):
        words += f"; the {len(shown)} of {len(columns)} options that tell most"
    _caption(figure, words + _below(y, floor))
    return figure


def _draw_slice(axes: Axes, column: Column, y: Floats, generator: np.random.Generator) -> None:
    """Points of one option and the median of each level, or of each eighth of its values."""
    n = len(y)
    points: dict[str, Any] = {
        "s": 14 if n < 100 else 5 if n < 1000 else 2.5,
        "color": _PLAIN,
        "linewidths": 0,
        "alpha": 0.8 if n < 100 else 0.35,
    }
    x = column.numbers
    if column.levels or np.isnan(x).any() or len(np.unique(x)) <= _STRIPS:
        levels, index = _strips(column, y)
        axes.scatter(index + generator.uniform(-0.22, 0.22, n), y, **points)
        for place in range(len(levels)):
            own = y[index == place]
            if len(own) > 1:
                axes.plot([place - 0.32, place + 0.32], [np.median(own)] * 2, color=_MARKED, linewidth=1.8)
        words = [_wrap(word, 16, 1) for word in levels]
        steep = sum(map(len, words)) > 26
        style: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if steep else {}
        axes.set_xticks(range(len(words)), words, parse_math=False, **style)
        axes.set_xlim(-0.6, len(words) - 0.4)
        axes.grid(visible=False, axis="x")
        return
    axes.scatter(x, y, **points)
    part = _eighths(x)
    medians = [(np.median(x[part == p]), np.median(y[part == p])) for p in np.unique(part)]
    axes.plot(*zip(*medians, strict=True), "o-", color=_MARKED, linewidth=1.3, markersize=3)
    if column.log:
        _log_axis(axes, x)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=bool((x % 1 == 0).all())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _strips(column: Column, y: Floats) -> tuple[list[str], NDArray[np.int64]]:
    """Words and (N,) place of at most nine strips: levels, the rare and the worse together as "others"; different
    numbers if they are few, else eighths; None first."""
    if not column.levels:
        x = column.numbers
        values = np.unique(x[np.isfinite(x)])
        if len(values) <= _STRIPS:
            words, place = [_short(float(v), 4) for v in values], np.searchsorted(values, x) + 1
        else:
            _, place = np.unique(_eighths(x), return_inverse=True)  # fewer where many values are equal
            words = [f"≤ {_short(float(x[place == n].max()))}" for n in range(1, place.max() + 1)]
        if not np.isnan(x).any():
            return words, place - 1
        return [in_words(None), *words], np.where(np.isnan(x), 0, place)
    levels, index = list(column.levels), column.index
    if len(levels) <= _STRIPS + 1:
        return levels, index
    # the best of those that were tried more than a few times
    rank = [(min(int((index == n).sum()), 5), float(np.median(y[index == n]))) for n in range(len(levels))]
    kept = sorted(sorted(range(len(levels)), key=lambda n: rank[n], reverse=True)[:_STRIPS])
    places = np.full(len(levels), _STRIPS, np.int64)
    places[kept] = np.arange(_STRIPS)
    return [*(levels[n] for n in kept), f"{len(levels) - _STRIPS} others"], places[index]


def agreement_figure(
    validation_set: Sequence[float | None],
    test: Sequence[float | None],
    default_index: int | None,
    chosen_index: int | None,
    names: Sequence[str],
) -> Figure:
    """What settings reach on the test set against what the validation images said of them, with their rank correlation.

    Args:
        validation_set: objective of each setting without test data, from left to right.
        test: its objective on the test set, upwards.
        default_index: which is the default setting, if any is.
        chosen_index: which the campaign chose.
        names: of the settings; those of the two are written in the key.
    """
    title = "TrainValSplit without test data, measured on it"
    x, y = (np.array([math.nan if v is None else v for v in side], np.float64) for side in (validation_set, test))
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return _nothing(title, "no setting has both objectives")
    floors = _floor(x[known]), _floor(y[known])
    low = known & ((x < floors[0]) | (y < floors[1]))
    drawn = np.maximum(x, floors[0]), np.maximum(y, floors[1])
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    others = known.copy()
    # where both are one, the smaller mark lies on the larger
    marks = ((default_index, "default", "s", _INK, 8.0), (chosen_index, "chosen", "D", _MARKED, 5.5))
    for index, word, marker, colour, size in marks:
        if index is not None and known[index]:
            others[index] = False
            style: dict[str, Any] = {"markersize": size, "zorder": 3, "linestyle": "none"}
            label = f"{word}: {_wrap(str(names[index]), 26, 1)}"
            axes.plot(drawn[0][index], drawn[1][index], marker=marker, color=colour, label=label, **style)
    small: dict[str, Any] = {"s": 18 if known.sum() < 300 else 5, "alpha": 0.6 if known.sum() < 300 else 0.35}
    if others.any():
        axes.scatter(drawn[0][others], drawn[1][others], color=_PLAIN, linewidths=0, label="other settings", **small)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    visual.quiet(axes, title, "validation objective", "test objective")
    _legend(axes)
    edge = f"; {_count(int(low.sum()), 'lower setting')} at the lower edges" if low.any() else ""
    _caption(figure, _correlation_words(rank_correlation(x, y)) + edge)
    return figure


def _correlation_words(found: Mapping[str, Any]) -> str:
    words = _count(found["n"], "setting")
    if found["spearman"] is None:
        return f"{words}; no rank correlation, as one side does not vary"
    words += f"; Spearman's ρ {found['spearman']:.2f}"
    if found["spearman_interval"]:
        low, high = found["spearman_interval"]
        words += f" (95 %: {low:.2f} to {high:.2f})"
    return f"{words}, Kendall's τ {found['kendall']:.2f}"


# -- forms -------------------------------------------------------------------------------------------------------------

GAIN_COLUMNS = ["category", "common setting", "own setting", "gain", "own trial"]


def section(title: str, content: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, Any]:
    """What a report shows of a campaign.

    Args:
        title: its heading.
        content: of the campaign's JSON.
        figures: titles by name of the PNG file beside the section.
    """
    tables = [
        ("Best settings", *_setting_table(content)),
        ("Importance of the options", ["option", "R² lost", "sd"], _importance_table(content)),
        ("Gain of a setting for each category", GAIN_COLUMNS, _gain_table(content)),
        ("Trials without a result", ["trial", "error"], [[row["trial"], row["error"]] for row in content["errors"]]),
    ]
    return {
        "title": title,
        "text": [_searched(content), *_left_undone(content)],
        "tables": [{"title": name, "columns": columns, "rows": rows} for name, columns, rows in tables if rows],
        "figures": [{"title": words, "file": file} for file, words in figures.items()],
    }


def print_campaign(content: Mapping[str, Any]) -> None:
    """Print the best settings, how the trials ended, what categories would gain, and what was left undone."""
    columns, rows = _setting_table(content)
    if rows:
        print_table("best settings", columns, rows)
    counts = content["counts"]
    columns = ["trials", *STATUSES, "settings", "time"]
    row = [f"{counts.get(key, 0):,}" for key in columns[:-1]]
    print_table("trials", columns, [[*row, _duration(content["seconds"])]])
    gain = _gain_table(content)
    if gain:
        print_table("gain of a setting for each category", GAIN_COLUMNS, gain, footer=1)
    for sentence in _left_undone(content):
        console.print(f"note: {sentence}")
    for error in content["errors"][:_TOP]:
        console.print(f"  {error['trial']}: {error['error']}")
    if len(content["errors"]) > _TOP:
        console.print(f"  and {len(content['errors']) - _TOP} more")


def _setting_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the default and the best settings side by side, since options are many and names long."""
    best = content.get("best")
    settings = [best] if best else []
    settings += [setting for setting in content.get("top") or () if not best or not _same(setting, best)]
    settings = settings[:_TOP]
    default = content.get("default")
    names = ["best" if number == 0 else str(number + 1) for number in range(len(settings))]
    if default:
        names, settings = ["default", *names], [default, *settings]
    rows = [
        ["trial", *(str(setting.get("trial") or UNDEFINED) for setting in settings)],
        ["objective", *(_four(setting["objective"]) for setting in settings)],
    ]
    confirmed = (best or {}).get("confirmed")
    if confirmed is not None:
        value = confirmed.get("objective") if isinstance(confirmed, Mapping) else confirmed
        rows.append(["confirmed", *(_four(value) if name == "best" else "" for name in names)])
    for metric in content["objective"]["metrics"]:
        measured = [(setting.get("metrics") or {}).get(metric) for setting in settings]
        if any(value is not None for value in measured):
            rows.append([metric, *map(_four, measured)])
    for option in dict.fromkeys(option for setting in settings for option in setting["values"]):
        every = [setting["values"] for setting in settings]
        rows.append([option, *(in_words(own[option]) if option in own else UNDEFINED for own in every)])
    return ["", *names], rows if settings else []


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first.get(key) == second.get(key) for key in ("trial", "values"))


def _importance_table(content: Mapping[str, Any]) -> list[list[str]]:
    return [[row["option"], f"{row['importance']:.3f}", f"{row['sd']:.3f}"] for row in content["importance"]]


def _gain_table(content: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["category"],
            _four(row["common"]),
            _four(row["own"]),
            f"{row['gain']:+.4f}",
            "" if row["category"] == "mean" else str(row.get("trial") or UNDEFINED),
        ]
        for row in content["category_gain"]
    ]


def _searched(content: Mapping[str, Any]) -> str:
    """What was searched for, and how."""
    counts, objective = content["counts"], content["objective"]
    metrics = objective["metrics"]
    weighted = [name if set(metrics.values()) == {1} else f"{weight:g} · {name}" for name, weight in metrics.items()]
    return (
        f"{_count(counts['settings'], 'setting')} of {content['method']} in {_count(counts['trials'], 'trial')} "
        f"({_named(content['search'])}), {_duration(content['seconds'])}. Objective: {' + '.join(weighted)} on "
        f"{objective['validation']}."
    )


def _named(search: Any) -> str:
    if isinstance(search, Mapping):
        return ", ".join(f"{key} {in_words(value)}" for key, value in search.items())
    return in_words(search)


def _left_undone(content: Mapping[str, Any]) -> list[str]:
    """A sentence for each kind of trial without a full result."""
    counts = content["counts"]
    missing = counts["trials"] - sum(counts.get(status, 0) for status in STATUSES)
    kinds = {
        "stopped early, as others were better at the same progress": counts.get("stopped", 0),
        "failed, so their settings are not among these": counts.get("failed", 0),
        "lost to a crash": counts.get("crashed", 0),
        "not run; the same command continues": missing,
    }
    found = [f"{_count(number, 'trial')} {words}." for words, number in kinds.items() if number > 0]
    gain = content.get("gain")
    if gain:
        low, high = gain["interval"]
        words = (
            f"The best setting has {gain['objective']:+.4f} over the options as given (95 %: {low:+.4f} to {high:+.4f})"
        )
        advice = "." if gain["beyond_chance"] else ", which is not beyond chance: rather keep the options as given."
        found.append(words + advice)
    if not content.get("best"):
        found.append("No setting was measured, so there is no best one.")
    return found


def _four(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds in the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
