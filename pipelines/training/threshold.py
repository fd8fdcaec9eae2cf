"""The decision thresholds of a fitted model, from the scores of held-out normal images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pipelines.data.extractors import BatchFunction
from pipelines.data.feature_cache import FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.runtime.models import input_policy
from pipelines.training.calibration_images import network_key
from pipelines.training.options import FitOptions, ThresholdOptions
from unianom import files
from unianom.data.image import InputPolicy
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.methods import Method
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


SCORE = "score"
"""Name of the array of image scores, N float32."""


@dataclass(frozen=True)
class ImageScores:
    """Image scores. An `Extractor`.

    Attributes:
        model: folder of the model.
    """

    model: str

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = load(self.model)

        def network(images: Tensor) -> dict[str, Tensor]:
            return {SCORE: method.score_images(images).score.float()}

        return BatchFunction(method.input, lambda _, found: found, network, method.device)


def score_held_out(
    model: str, shards: ShardSet, held_out: frozenset[str], categories: list[str], options: FitOptions, folder: str
) -> NormalScores:
    """Return the image scores of held-out normals by a model.

    Args:
        model: its folder.
        shards, held_out: the images.
        categories: of the model.
        options: batches, limits and workers.
        folder: of unfinished work, below which scores are kept.
    """
    selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
    cache = FeatureCache.below(
        folder,
        "held-out scores",
        {"": SampleSource(shards, selection, options.limits, held_out)},
        network_key(files.read_json(files.join(model, "model.json"))),
        options.runtime,
        options.batch_size,
    )
    label = "score held-out normals"
    cache.fill({"": ImageScores(model)}, options.batch_size, options.runtime, label, temporary=True)
    rows = shards.table(selection, ["sample_id", "category"]).to_pylist()  # in the order of the cache
    known = [row["category"] for row in rows if row["sample_id"] in held_out]
    scores = np.concatenate(cache.open().arrays(SCORE)).tolist()
    return NormalScores.of("held_out", zip(known, scores, strict=True))


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
