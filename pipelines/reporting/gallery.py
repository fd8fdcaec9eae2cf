"""The choice of a report's pictures: of each category the images that a model judges worst and best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa

from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.samples import text_column
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.thresholds import threshold_of

MOST_CATEGORIES = 24
"""Categories that are pictured, the worst first: a page of more is too heavy."""

WORST_DEFECT, WORST_NORMAL, BEST_DEFECT = "faintest defect", "highest normal", "clearest defect"
"""The large pictures: a defect with the lowest score, a normal image with the highest, a defect with the highest."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Samples that all inputs of a report have scored, by sample_id.

    Attributes:
        sample_id, category, defect: (n,) text; a defect may be None.
        label: (n,) 0, 1, or -1 where it is not known.
        margin: (n, models) see `margins`.
        decision: (n, models) "pass", "review", "fail" or None.
        rows: (n, models) of each input's table.
    """

    sample_id: np.ndarray
    category: np.ndarray
    defect: np.ndarray
    label: np.ndarray
    margin: np.ndarray
    decision: np.ndarray
    rows: np.ndarray

    @property
    def missed(self) -> np.ndarray:
        """Return of how many models each anomalous image is missed; (n,)."""
        return np.where(self.label == ANOMALOUS, (self.decision == "pass").sum(1), 0)

    @property
    def false_alarms(self) -> np.ndarray:
        """Return how many models flag each normal image; (n,)."""
        return np.where(self.label == NORMAL, (self.decision == "fail").sum(1), 0)


@dataclass(frozen=True)
class PictureGroup:
    """Samples under one heading, in the order they are shown: rows of `Judged`, and how many more there are."""

    title: str
    rows: list[int]
    left_out: int = 0


@dataclass(frozen=True)
class CategoryPictures:
    """The pictures of one category.

    Attributes:
        category: its name.
        large: role and row of `Judged` of each picture of the first screen.
        more: what follows them.
    """

    category: str
    large: list[tuple[str, int]]
    more: list[PictureGroup]


def judged(inputs: Sequence[ReportInput]) -> Judged:
    """Return what all inputs say of the samples that all have scored."""
    ids = [np.asarray(entry.table["sample_id"].to_pylist(), dtype=object) for entry in inputs]
    common = reduce(lambda a, b: np.intersect1d(a, b), ids) if len(ids) > 1 else ids[0]
    rows = np.stack([np.searchsorted(own, common) for own in ids], axis=1) if len(common) else np.zeros((0, len(ids)))
    rows = rows.astype(np.int64)
    first = inputs[0].table.take(rows[:, 0])
    return Judged(
        sample_id=np.asarray(common, dtype=object),
        category=text_column(first, "category"),
        defect=text_column(first, "defect"),
        label=first["label"].fill_null(-1).to_numpy(),
        margin=np.stack([margins(entry)[rows[:, n]] for n, entry in enumerate(inputs)], axis=1),
        decision=np.stack([text_column(entry.table, "decision")[rows[:, n]] for n, entry in enumerate(inputs)], axis=1),
        rows=rows,
    )


def margins(entry: ReportInput) -> np.ndarray:
    """Return how far each score lies above its threshold: (n,), in standard deviations of normal scores.

    The unit is the spread of the scores that the model gave to normal images (to all, if there are none), so that
    models whose raw scores differ can be compared. Where there is no threshold, the median of those scores takes its
    place.
    """
    table: pa.Table = entry.table
    model, category = text_column(table, "model"), text_column(table, "category")
    label, score = table["label"].to_numpy(), table["score"].to_numpy()
    margin = np.zeros(len(score))
    for of_model in entry.models:
        scored = model == of_model["digest"]
        if not scored.any():
            continue
        usual = score[scored & (label == NORMAL)] if np.any(scored & (label == NORMAL)) else score[scored]
        for name in set(category[scored]):
            threshold = threshold_of(of_model, name)
            start = np.median(usual) if threshold is None else threshold["value"]
            own = scored & (category == name)
            margin[own] = (score[own] - start) / (usual.std() or 1.0)
    return margin


def choose(samples: Judged, categories: Sequence[str], count: int) -> list[CategoryPictures]:
    """Choose the pictures of labelled samples.

    Args:
        samples: what all models say of them.
        categories: in the order they are shown; those beyond `MOST_CATEGORIES` have no pictures.
        count: of each category half as many defects, half as many normal images, and a quarter as many typical
            defects of each type; each rounded up.
    """
    if count == 0:
        return []
    alone = len(categories) == 1
    return [_choose_of(samples, name, count, 2 if alone else 1) for name in categories[:MOST_CATEGORIES]]


def _choose_of(samples: Judged, category: str, count: int, n_worst: int) -> CategoryPictures:
    inside = samples.category == category
    margin = samples.margin.mean(1)
    defects = np.flatnonzero(inside & (samples.label == ANOMALOUS))
    normals = np.flatnonzero(inside & (samples.label == NORMAL))
    # what most models get wrong comes first, then what is furthest on the wrong side
    defects = defects[np.lexsort((margin[defects], -samples.missed[defects]))]
    normals = normals[np.lexsort((-margin[normals], -samples.false_alarms[normals]))]
    half = (count + 1) // 2
    worst, alarms = defects[:n_worst].tolist(), normals[:1].tolist()
    rest = defects[n_worst:].tolist()
    best = sorted(rest, key=lambda row: (samples.missed[row], -margin[row]))[:1]
    large = [(WORST_DEFECT, row) for row in worst] + [(WORST_NORMAL, row) for row in alarms]
    large += [(BEST_DEFECT, row) for row in best]
    shown = {row for _, row in large}
    more_defects = [row for row in rest if row not in shown][: max(0, half - n_worst)]
    more_normals = normals[1:half].tolist()
    shown |= {*more_defects, *more_normals}
    typical = _typical(samples, [row for row in rest if row not in shown and not samples.missed[row]], count, margin)
    missed, alarmed = samples.missed > 0, samples.false_alarms > 0
    left = [int(wrong[inside].sum()) - sum(bool(wrong[row]) for row in shown) for wrong in (missed, alarmed)]
    groups = [
        PictureGroup("More defects with low scores, missed ones first", more_defects, left[0]),
        PictureGroup("More normal images with high scores, false alarms first", more_normals, left[1]),
        PictureGroup("Typical defects of each type", typical),
    ]
    return CategoryPictures(category, large, [group for group in groups if group.rows or group.left_out])


def _typical(samples: Judged, rows: Sequence[int], count: int, margin: np.ndarray) -> list[int]:
    """Return the rows next to the median of each defect type."""
    kinds: dict[str, list[int]] = {}
    for row in rows:
        kinds.setdefault(samples.defect[row] or "", []).append(row)
    chosen = []
    for _, of_kind in sorted(kinds.items()):
        middle = np.median(margin[of_kind])
        chosen += sorted(of_kind, key=lambda row: abs(margin[row] - middle))[: max(1, count // 4)]
    return chosen


def choose_unlabelled(samples: Judged, count: int) -> list[PictureGroup]:
    """Choose the pictures of scores without an evaluation: the most anomalous images, those next to the threshold on
    both sides, and the least anomalous.

    Args:
        samples: what the model says of them; without a threshold there is nothing next to it.
        count: three times as many of the first, half as many of each of the others.
    """
    if count == 0:
        return []
    margin = samples.margin.mean(1)
    order = np.argsort(-margin, kind="stable")
    first = order[: 3 * count].tolist()
    groups = [PictureGroup("Most anomalous", first)]
    rest = [row for row in order[3 * count :].tolist()]
    if any(decision is not None for decision in samples.decision.ravel()):
        near = sorted(rest, key=lambda row: abs(margin[row]))[: (count + 1) // 2]
        groups.append(PictureGroup("Next to the threshold", sorted(near, key=lambda row: -margin[row])))
        rest = [row for row in rest if row not in set(near)]
    groups.append(PictureGroup("Least anomalous", rest[::-1][: (count + 1) // 2]))
    return [group for group in groups if group.rows]
