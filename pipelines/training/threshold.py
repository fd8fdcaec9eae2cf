"""The decision thresholds of a fitted model, from the scores of held-out normal images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from pipelines.data.reader import SampleReader
from pipelines.runtime.models import load_model
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_tasks
from pipelines.training.options import FitOptions, ThresholdOptions
from unianom.data.image import ImageLimits
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.tensors import normalise
from unianom.execution import Execution
from unianom.model import Model
from unianom.thresholds import Source, fit_by_category, fit_supported


class NormalScores(NamedTuple):
    """Image scores of normal images, from which thresholds are chosen.

    Attributes:
        source: which images these are.
        by_category: scores in ascending order, by category.
    """

    source: Source
    by_category: dict[str, list[float]]

    @classmethod
    def of(cls, source: Source, scored: Iterable[tuple[str, float]]) -> NormalScores:
        """Return the scores of images given by category and score, in any order."""
        found: dict[str, list[float]] = {}
        for category, score in sorted(scored):
            found.setdefault(category, []).append(score)
        return cls(source, found)


class HeldOutScorer:
    """Scores the held-out normals of one part. A `PartTask`."""

    def __init__(
        self,
        model: str,
        shards: ShardSet,
        selection: Selection,
        chosen: frozenset[str],
        batch_size: int,
        limits: ImageLimits,
        execution: Execution,
        threads: int,
    ) -> None:
        self._model = load_model(model, execution)
        self._reader = SampleReader(shards, selection, chosen, batch_size, limits, threads)

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Return categories and scores of one part's held-out images."""
        method, scores, categories = self._model.method, [], []
        for batch in self._reader.decoded(task["part"], method.input, ["category"]):
            images = normalise([sample.pixels for sample in batch], method.input).to(method.device)
            scores += method.score_images(images).score.float().cpu().tolist()
            categories += [sample.row["category"] for sample in batch]
        return {"categories": categories, "scores": scores}


def score_held_out(
    model: str, shards: ShardSet, held_out: frozenset[str], categories: list[str], options: FitOptions
) -> NormalScores:
    """Return the image scores of held-out normals by a model folder."""
    arguments = {
        "model": model,
        "shards": shards,
        "selection": Selection(("train", "val"), tuple(categories), (NORMAL,)),
        "chosen": held_out,
        "batch_size": options.batch_size,
        "limits": options.limits,
        "execution": options.runtime.execution,
        "threads": options.runtime.cpus_per_worker,
    }
    progress = Progress("score held-out normals", len(held_out))
    tasks = [{"part": part} for part in shards.parts]
    scored: list[tuple[str, float]] = []
    for result in run_tasks(HeldOutScorer, arguments, tasks, options.runtime, len(held_out)):
        scored += zip(result["categories"], result["scores"], strict=True)
        progress.advance(len(result["scores"]))
    progress.close()
    return NormalScores.of("held_out", scored)


def set_thresholds(model: Model, normals: NormalScores, options: ThresholdOptions) -> None:
    """Give a model the thresholds that scores of normal images support, and these scores; none if there are none."""
    scores = normals.by_category
    everything = [score for values in scores.values() for score in values]
    if not everything:
        return
    how: tuple[float | None, float, Source] = (options.target_fpr, options.confidence, normals.source)
    model.threshold = fit_supported(everything, *how)
    if options.per_category and len(model.categories) > 1:
        model.category_thresholds = fit_by_category(scores, *how)
    model.normal_scores = scores
