"""What a report is made of: evaluations with their scores, or scores alone, and the shards of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.reporting.options import ReportOptions
from pipelines.reporting.outcomes import Outcome, outcome
from pipelines.reporting.samples import labelled, text_column
from unianom import files
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError

SCORE_COLUMNS = (
    "sample_id",
    "category",
    "label",
    "defect",
    "score",
    "calibrated_score",
    "decision",
    "map_offset",
    "status",
    "model",
)
"""Columns of the scores that the page is made of; `map_offset` tells which samples have a map."""


@dataclass(frozen=True, eq=False)
class ReportInput:
    """One column of a report: what one model, or one model a category, made of the images.

    Attributes:
        name: as shown, unique in the report.
        evaluation: content of its evaluation.json; None of scores alone.
        digest: SHA-256 of that file, or of the scores' manifest.
        scores: its score set.
        table: `SCORE_COLUMNS` of what has a score, by sample_id; with an evaluation, of what has a label, too.
    """

    name: str
    evaluation: Mapping[str, Any] | None
    digest: str
    scores: ScoreSet
    table: pa.Table

    @cached_property
    def outcomes(self) -> tuple[Outcome, dict[str, Outcome]]:
        """What became of all images, and of those of each category, sorted."""
        label = self.table["label"].fill_null(-1).to_numpy()
        category, decision, defect = (text_column(self.table, name) for name in ("category", "decision", "defect"))

        def within(inside: np.ndarray) -> Outcome:
            return outcome(label[inside], decision[inside].tolist(), defect[inside].tolist())

        every = within(np.ones(len(label), bool))
        return every, {name: within(category == name) for name in sorted(set(category))}

    @property
    def models(self) -> Sequence[Mapping[str, Any]]:
        """The models, as the scores' manifest tells of them."""
        return self.scores.manifest["models"]  # type: ignore[no-any-return]


def read_inputs(options: ReportOptions) -> tuple[list[ReportInput], ShardSet]:
    """Read all that a report is made of, but for images and maps.

    Raises:
        DataError: no evaluation there, its scores or shards are gone or were changed since, evaluations of different
            shard sets, or scores of other shards.
    """
    if options.scores is not None and options.shards is not None:
        return _scores_alone(options.scores, options.shards, options.names)
    folders = options.evaluations or (str(options.evaluation),)
    read = [_read_evaluation(folder) for folder in folders]
    names = options.names or _names([evaluation["models"] for evaluation, _, _ in read], folders)
    shards = ShardSet.open(read[0][0]["shards"]["uri"])
    inputs = []
    for folder, name, (evaluation, digest, scores) in zip(folders, names, read, strict=True):
        if evaluation["shards"]["digest"] != read[0][0]["shards"]["digest"]:
            raise DataError(
                f"{folder} is of other shards ({evaluation['shards']['uri']}) than {folders[0]} ({shards.uri}); a "
                f"report compares models on the same images, so score and evaluate them on one shard set"
            )
        path = files.join(folder, "evaluation.json")
        for kind, parts in (("scores", scores), ("shards", shards)):
            if parts.digest != evaluation[kind]["digest"]:
                raise DataError(f"{parts.uri} was changed after {path} was written; run jobs/evaluate.py again")
        inputs.append(ReportInput(name, evaluation, digest, scores, labelled(scores.table(columns=SCORE_COLUMNS))))
    return inputs, shards


def _read_evaluation(folder: str) -> tuple[dict[str, Any], str, ScoreSet]:
    """Return the content of an evaluation, its digest and its scores."""
    path = files.join(folder, "evaluation.json")
    try:
        evaluation = files.read_json(path)
    except FileNotFoundError as error:
        raise DataError(f"no {path}; give the folder jobs/evaluate.py wrote") from error
    return evaluation, files.sha256_file(path), ScoreSet.open(evaluation["scores"]["uri"])


def _scores_alone(uri: str, shards_uri: str, names: Sequence[str]) -> tuple[list[ReportInput], ShardSet]:
    scores, shards = ScoreSet.open(uri), ShardSet.open(shards_uri)
    if scores.manifest["shards"]["digest"] != shards.digest:
        raise DataError(f"{scores.uri} was scored on other shards than {shards.uri}; give the shards it was made from")
    table = scores.table(columns=SCORE_COLUMNS)
    table = table.filter(pc.equal(table["status"], "ok")).sort_by("sample_id")
    if len(table) == 0:
        raise DataError(f"no image of {scores.uri} has a score, so there is nothing to report; run jobs/score.py again")
    name = names[0] if names else _names([scores.manifest["models"]], [uri])[0]
    return [ReportInput(name, None, scores.digest, scores, table)], shards


def _names(models: Sequence[Sequence[Mapping[str, Any]]], folders: Sequence[str]) -> list[str]:
    """Return the shortest unique names: methods, methods and backbones, folders, or numbers."""

    def joined(values: Sequence[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    methods = [joined([model["method"] for model in of]) for of in models]
    backbones = [joined([model["config"]["backbone"]["name"] for model in of]) for of in models]
    with_backbones = [f"{method}, {backbone}" for method, backbone in zip(methods, backbones, strict=True)]
    last = [folder.rstrip("/").rpartition("/")[2] for folder in folders]
    numbered = [f"{method} {number}" for number, method in enumerate(methods, 1)]
    return next(names for names in (methods, with_backbones, last, numbered) if len(set(names)) == len(names))
