"""The images of a score set that an evaluation counts: those with a score and a label, by data set and category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from unianom.data.shards import ScoreSet
from unianom.errors import DataError

Group = tuple[str, str]
"""Data set and category."""

RAW, CALIBRATED = "raw", "calibrated"
"""Kinds of score."""

SCORE_COLUMNS = {RAW: "score", CALIBRATED: "calibrated_score"}


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """The labelled images that have a score, in the order of the score set.

    Attributes:
        sample_ids: (n,) names.
        groups: data set and category of each group.
        group: (n,) which group each image belongs to.
        labels: (n,) 0 normal, 1 anomalous.
        scores: by kind, (n,) float64; calibrated ones only if every image has one.
        models: (n,) digests.
        partly_calibrated: whether some, but not all have a calibrated score.
    """

    sample_ids: list[str]
    groups: list[Group]
    group: np.ndarray
    labels: np.ndarray
    scores: dict[str, np.ndarray]
    models: np.ndarray
    partly_calibrated: bool

    @classmethod
    def read(cls, scores: ScoreSet) -> LabelledImages:
        """Read the images of a score set that have a score and a label.

        Raises:
            DataError: there is none.
        """
        texts = ("sample_id", "dataset", "category", "model")
        table = scores.table(columns=[*texts, "label", "status", *SCORE_COLUMNS.values()])
        kept = [
            status == "ok" and label is not None
            for status, label in zip(table["status"].to_pylist(), table["label"].to_pylist(), strict=True)
        ]
        table = table.filter(pa.array(kept))
        if len(table) == 0:
            raise DataError(
                f"no sample of {scores.uri} has a score and a label, so there is nothing to evaluate against"
            )
        column = {name: table[name].cast(pa.string()).to_pylist() for name in texts}
        names = list(zip(column["dataset"], column["category"], strict=True))
        groups = sorted(set(names))
        number = {group: index for index, group in enumerate(groups)}
        values = {RAW: table["score"].to_numpy().astype(np.float64)}
        missing = table["calibrated_score"].null_count
        if missing == 0:
            values[CALIBRATED] = table["calibrated_score"].to_numpy().astype(np.float64)
        return cls(
            sample_ids=column["sample_id"],
            groups=groups,
            group=np.array([number[name] for name in names]),
            labels=table["label"].to_numpy().astype(np.int64),
            scores=values,
            models=np.asarray(column["model"], dtype=object),
            partly_calibrated=0 < missing < len(table),
        )

    @property
    def categories(self) -> dict[str, tuple[int, ...]]:
        """Return the groups of each category: several where data sets share its name."""
        names = sorted({category for _, category in self.groups})
        return {name: tuple(i for i, (_, category) in enumerate(self.groups) if category == name) for name in names}

    @property
    def datasets(self) -> dict[str, tuple[int, ...]]:
        """Return the groups of each data set."""
        names = sorted({dataset for dataset, _ in self.groups})
        return {name: tuple(i for i, (dataset, _) in enumerate(self.groups) if dataset == name) for name in names}

    @property
    def everything(self) -> tuple[int, ...]:
        """Return all groups."""
        return tuple(range(len(self.groups)))

    def within(self, groups: Sequence[int]) -> np.ndarray:
        """Return the images of some groups, (m,), group by group."""
        return np.concatenate([np.flatnonzero(self.group == group) for group in groups])
