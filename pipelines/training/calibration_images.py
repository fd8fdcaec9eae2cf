"""The normal images that a calibrator learns from: which, and the cache of what the model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from torch import Tensor

from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch, finite
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.data.splits import held_out_normals, some
from pipelines.runtime.models import input_policy
from pipelines.training.options import CalibrateOptions
from unianom import __version__, files
from unianom.calibration import MapStatistics
from unianom.data.image import InputPolicy
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError
from unianom.methods import Method
from unianom.options import to_plain

FEATURES, STATISTICS, CATEGORY = "embedding", "statistics", "category"
"""Names of the cached arrays: N×C×h×w; N×3 float64, mean, mean square and maximum of each map; N int32,
their classes."""

MOMENTS = "moments"
"""Name of the array of the sums of the embeddings' channels and of their squares, 2×C float64 for each batch."""


@dataclass(frozen=True)
class NormalEmbeddings:
    """What a method makes of normal images, as calibrators learn from it. An `Extractor`.

    Attributes:
        model: folder of the model.
        categories: whose places are the classes.
        half: keep embeddings as float16 instead of float32.
    """

    model: str
    categories: tuple[str, ...]
    half: bool

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = load(self.model)
        kind = "half precision; give --precision full" if self.half else "float32; check the model's weights"

        def network(images: Tensor) -> dict[str, Tensor]:
            prediction = method.predict(images)
            embedding = prediction.embedding
            return {
                FEATURES: embedding.half() if self.half else embedding.float(),
                STATISTICS: MapStatistics.columns(prediction.raw_map),
            }

        def arrays(batch: ImageBatch, found: Arrays) -> Arrays:
            error = f"embeddings of {batch.part} are not finite in {kind}"
            values = finite(found[FEATURES], error).astype(np.float64)
            sums = np.stack([values.sum((0, 2, 3)), (values**2).sum((0, 2, 3))])
            category = [self.categories.index(name) for name in batch.columns["category"]]
            return {**found, CATEGORY: np.array(category, np.int32), MOMENTS: sums[None]}

        return BatchFunction(method.input, arrays, network, method.device)


@dataclass(frozen=True)
class EmbeddingCache:
    """The normal images that calibrators of a model learn from, and the cache of what the model makes of them.

    Attributes:
        cache: the cache.
        plan: everything its content depends on, as calibrated models record it.
        model: folder of the model.
        shards, categories: the corpus.
        chosen: sample_ids.
        held_out: sample_ids of the normal images that the model's training held out.
    """

    cache: FeatureCache
    plan: dict[str, Any]
    model: str
    shards: ShardSet
    categories: list[str]
    chosen: frozenset[str]
    held_out: frozenset[str]

    @staticmethod
    def of(model: str, shards: ShardSet, options: CalibrateOptions) -> EmbeddingCache:
        """Return which images, and where.

        Raises:
            DataError: no normal training image, or which were held out cannot be told.
        """
        description = files.read_json(files.join(model, "model.json"))
        categories: list[str] = description["categories"]
        selection = Selection(("train", "val"), tuple(categories), (NORMAL,))
        shards.check(selection)
        chosen, held_out = _choose(description, shards, categories, options)
        network = network_key(description)
        plan = {
            "tool": __version__,
            **network,
            "shards": shards.digest,
            "images": files.digest_of({"ids": sorted(chosen)}),
            "batch_size": options.batch_size,
            "half": options.precision == "half",
            "limits": to_plain(options.limits),
            **options.runtime.execution.plan,
            "threads": options.runtime.cpus_per_worker,
        }
        cache = FeatureCache.below(
            options.folder or files.beside(model, "prepared"),
            "calibration images",
            {"": SampleSource(shards, selection, options.limits, chosen, columns=("category",))},
            {**network, "categories": categories, "half": options.precision == "half"},
            options.runtime,
            options.batch_size,
        )
        return EmbeddingCache(cache, plan, model, shards, categories, chosen, held_out)

    def fill(self, options: CalibrateOptions) -> None:
        """Compute embeddings and statistics of all these images, or find them computed."""
        extractor = NormalEmbeddings(self.model, tuple(self.categories), options.precision == "half")
        self.cache.fill({"": extractor}, options.batch_size, options.runtime, "inspect normals")


def network_key(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the outputs of a model depend on, from its `model.json`."""
    return {key: description[key] for key in ("method", "config", "weights_sha256", "bank_sha256")}


def summed_moments(features: CachedFeatures) -> np.ndarray:
    """Return the sums of the embeddings' channels and of their squares over all images, 2×C float64."""
    # batch by batch and then part by part, as the order of a sum decides its last bits
    return np.sum([reduce(np.add, rows) for rows in features.arrays(MOMENTS)], axis=0)


def _choose(
    description: dict[str, Any], shards: ShardSet, categories: list[str], options: CalibrateOptions
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the normal images to learn from, and of those that the model's training held out.

    Raises:
        DataError: held-out ones are asked for and there are none, or which they are cannot be told.
    """
    columns = ["sample_id", "category", "split"]
    rows = shards.table(Selection(("train", "val"), tuple(categories), (NORMAL,)), columns).to_pylist()
    if options.images == "all":
        return frozenset(row["sample_id"] for row in rows), frozenset()
    provenance, name = description["provenance"], f"the model for {some(categories)}"
    held_out: frozenset[str] = frozenset()
    if provenance["shards"]["digest"] == shards.digest:  # of other shards it has seen nothing, and held nothing out
        held_out = held_out_normals(provenance, rows, name, options.held_out_fraction)
    if options.images == "held_out":
        if not held_out:
            raise DataError(
                f"{name} held no normal image out; give --images train, or train it with "
                f"--threshold.validation_fraction above 0"
            )
        return held_out, held_out
    chosen = frozenset(row["sample_id"] for row in rows if row["split"] == "train") - held_out
    if not chosen:
        raise DataError(f"{shards.uri} has no normal training image for {name}; give --images all")
    return chosen, held_out
