"""Anomaly clustering: test images grouped by what is anomalous in them (UniFormaly, arXiv 2307.12540, Sec. 5).

    shards ─▶ actors: embed, search the bank ─▶ patches that matter, one file per range ─▶ K-means per category

An image is described by its most anomalous patches. These are kept, so another variant or number of clusters takes no
network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipelines.data.extractors import Arrays, BatchFunction, ImageBatch
from pipelines.data.feature_cache import CachedFeatures, FeatureCache
from pipelines.data.image_source import SampleSource
from pipelines.evaluation.options import ClusterOptions
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import input_policy, memory_method
from unianom import files
from unianom.data.image import InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import OptionError
from unianom.methods import Method
from unianom.methods.layers.postprocess import upsample_and_blur

GOOD = "good"
"""Type of normal images that carry no defect name."""

COLUMNS = ("sample_id", "category", "label", "defect")
"""Columns of the shards that are kept with an image."""


def model_k_ratio(options: ClusterOptions, model: Mapping[str, Any]) -> float:
    """Return the share of patches that "top" takes: the one asked for, else the model's own.

    Raises:
        OptionError: it exceeds what is kept.
    """
    ratio = float(options.k_ratio if options.k_ratio is not None else model["config"].get("k_ratio", 0.05))
    if ratio > options.keep_ratio:
        raise OptionError(
            f"the model's k_ratio of {ratio:g} exceeds keep_ratio={options.keep_ratio:g}; raise --keep_ratio, or give "
            f"a lower --k_ratio"
        )
    return ratio


# -- features ----------------------------------------------------------------------------------------------------------


def keep_features(
    options: ClusterOptions, shards: ShardSet, model_set: ModelSet, models: Sequence[Mapping[str, Any]]
) -> str:
    """Compute the features of all images of the splits, or find them computed; returns the folder of their cache.

    They depend on neither variant, pooling, number of clusters nor choice of categories.
    """
    groups = {str(number): folder for number, folder in enumerate(model_set.folders)}
    cache = FeatureCache.below(
        files.full_uri(options.features or files.beside(options.output, "cluster_features")),
        "cluster features",
        {
            number: SampleSource(shards, Selection(options.splits, categories_of(model_set, folder)), options.limits)
            for number, folder in groups.items()
        },
        {"models": [model["digest"] for model in models], "keep_ratio": options.keep_ratio},
        options.runtime,
        options.batch_size,
    )
    extractors = {number: AnomalousPatches(folder, options.keep_ratio) for number, folder in groups.items()}
    cache.fill(extractors, options.batch_size, options.runtime, "features")
    return cache.uri


def categories_of(model_set: ModelSet, folder: str) -> tuple[str, ...]:
    """Return the categories that a model folder of a model_set scores; empty for all."""
    return tuple(sorted(name for name, own in model_set.by_category.items() if own == folder))


@dataclass(frozen=True)
class AnomalousPatches:
    """What describes an image by its most anomalous patches. An `Extractor`.

    Arrays: "distances" n×N, "top" n×T×D (patches of largest distance, the largest first; equal ones by place) and
    "mean" n×D (of all patches, masked ones included), float32.

    Attributes:
        model: folder of a memory method.
        keep_ratio: T as a share of N.
    """

    model: str
    keep_ratio: float

    def policy(self) -> InputPolicy:
        return input_policy(self.model)

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = memory_method(load(self.model))

        def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
            embedding = method.embed(images)
            return {"distances": method.patch_distances(embedding), "patches": embedding.patches.float()}

        def arrays(_: ImageBatch, found: Arrays) -> Arrays:
            distances, patches = found["distances"], found["patches"]  # B N, B N D
            top = max(1, round(self.keep_ratio * distances.shape[1]))
            order = np.argsort(-distances, axis=1, kind="stable")[:, :top]  # B T
            chosen = np.take_along_axis(patches, order[:, :, None], axis=1)
            return {"distances": distances, "top": chosen, "mean": patches.mean(1, dtype=np.float64).astype(np.float32)}

        return BatchFunction(method.input, arrays, network, method.device)


def describe_images(
    top: np.ndarray, mean: np.ndarray, patches: int, variant: str, pooling: str, k_ratio: float
) -> np.ndarray:
    """Return the vectors that are clustered, un-normalised.

    Args:
        top: n×T×D, patches of largest distance, the largest first.
        mean: n×D, of all patches.
        patches: N, of an image.
        variant, pooling, k_ratio: see `ClusterOptions`; "top" takes K = round(k_ratio · N) patches, at least one.

    Returns:
        n×D, or n×K·D if they are concatenated; float64.
    """
    if variant == "all":
        return mean.astype(np.float64)
    count = 1 if variant == "max" else max(1, round(k_ratio * patches))
    chosen = top[:, :count].astype(np.float64)
    return chosen.reshape(len(chosen), -1) if pooling == "concat" else chosen.mean(1)


def standardise(vectors: np.ndarray) -> np.ndarray:
    """Return n×D values at mean 0 and deviation 1 in each column; constant columns become 0."""
    deviation = vectors.std(0)
    return (vectors - vectors.mean(0)) / np.where(deviation > 0, deviation, 1)


def cluster_vectors(vectors: np.ndarray, clusters: int, n_init: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster by K-means (scikit-learn), the largest cluster first.

    Args:
        vectors: n×D.
        clusters: how many.
        n_init: starts, of which the best counts.
        seed: of the starts.

    Returns:
        (n,) cluster of each vector, and (n,) its distance from that cluster's centre.
    """
    with threadpool_limits(1):  # sums of several threads would differ in their last bits
        fitted = KMeans(clusters, n_init=n_init, random_state=seed).fit(vectors)
    sizes = np.bincount(fitted.labels_, minlength=clusters)
    rank = np.argsort(np.argsort(-sizes, kind="stable"))
    distances = np.linalg.norm(vectors - fitted.cluster_centers_[fitted.labels_], axis=1)
    return rank[fitted.labels_], distances


def type_of(row: Mapping[str, Any]) -> str | None:
    """Return the defect type of an image, "good" of normal ones; None where it is unknown."""
    return GOOD if row["label"] == NORMAL and row["defect"] is None else row["defect"]


@dataclass(frozen=True, eq=False)
class DescribedImages:
    """Images of one category, as vectors to be clustered.

    Attributes:
        rows: `COLUMNS` of each, with its `type`.
        vectors: n×D, what is clustered.
        distances: n×N, of patches.
        model: description of the model that described them.
    """

    rows: list[dict[str, Any]]
    vectors: np.ndarray
    distances: np.ndarray
    model: Mapping[str, Any]

    def anomaly_maps(self, side: int, numbers: Sequence[int]) -> np.ndarray:
        """Return the anomaly maps of some images, n×S×S, as the method makes them from its patch distances."""
        grid = math.isqrt(self.distances.shape[1])  # inputs are square, and so are their patch grids
        cells = torch.from_numpy(self.distances[list(numbers)]).unflatten(1, (grid, grid))
        return upsample_and_blur(cells, side, self.model["config"]["blur_sigma"]).numpy()


def describe_category(
    options: ClusterOptions,
    shards: ShardSet,
    model_set: ModelSet,
    models: Sequence[Mapping[str, Any]],
    folder: str,
    category: str,
) -> DescribedImages:
    """Read the features of a category's images, and make of them what is clustered."""
    model_folder = model_set.folder_of(category)
    number = model_set.folders.index(model_folder)
    selection = Selection(options.splits, categories_of(model_set, model_folder))
    rows: list[dict[str, Any]] = []
    features: dict[str, list[np.ndarray]] = {"distances": [], "top": [], "mean": []}
    cached, start = CachedFeatures(folder), 0
    known = shards.table(selection, list(COLUMNS)).to_pylist()  # in the order of the cache
    for part in cached.parts_of(str(number)):
        stored = known[start : start + cached.rows(part)]
        start += len(stored)
        inside = [
            n
            for n, row in enumerate(stored)
            if row["category"] == category and (not options.anomalous_only or row["label"] == ANOMALOUS)
        ]
        if not inside:
            continue
        rows += [{**stored[n], "type": type_of(stored[n])} for n in inside]
        for kind, arrays in features.items():
            arrays.append(cached.array(part, kind)[inside])
    distances = np.concatenate(features["distances"])
    ratio = model_k_ratio(options, models[number])
    vectors = describe_images(
        np.concatenate(features["top"]),
        np.concatenate(features["mean"]),
        distances.shape[1],
        options.variant,
        options.pooling,
        ratio,
    )
    if options.scaling == "standard":
        vectors = standardise(vectors)
    return DescribedImages(rows, vectors, distances, models[number])
