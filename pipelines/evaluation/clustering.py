"""Anomaly clustering: test images grouped by what is anomalous in them (UniFormaly, arXiv 2307.12540, Sec. 5).

    shards ─▶ actors: embed, search the bank ─▶ patches that matter, one file per part ─▶ K-means per category

An image is described by its most anomalous patches. These are kept, so another variant or number of clusters takes no
network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipelines.data.reader import SampleReader
from pipelines.evaluation.options import ClusterOptions
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.models import ModelSet, load_model
from pipelines.runtime.progress import Progress
from unianom import __version__, files
from unianom.data.image import ImageLimits
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.errors import OptionError
from unianom.methods import MemoryMethod
from unianom.methods.base import MaskedPatches
from unianom.methods.layers.maps import grid_to_map
from unianom.options import to_plain

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
    """Compute the features of all images of the splits, or find them computed; returns their folder.

    They depend on neither variant, pooling, number of clusters nor choice of categories.
    """
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "models": [model["digest"] for model in models],
        "splits": list(options.splits),
        "keep_ratio": options.keep_ratio,
        "batch_size": options.batch_size,
        "limits": to_plain(options.limits),
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    folder = files.full_uri(options.features or files.beside(options.output, "cluster_features"))
    uri = files.join(folder, files.digest_of(plan)[:20])
    with outputs.open_cache(uri, "cluster features", plan) as complete:
        if complete:
            return uri
        arguments = {
            "shards": shards,
            "model_set": model_set,
            "splits": options.splits,
            "output": uri,
            "keep_ratio": options.keep_ratio,
            "batch_size": options.batch_size,
            "limits": options.limits,
            "device": options.runtime.device,
            "threads": options.runtime.cpus_per_worker,
        }
        tasks = {feature_part(p, n): {"part": p, "model": n} for p in shards.parts for n in range(len(models))}
        progress = Progress("features", shards.count(Selection(options.splits)))
        run_unfinished(PartFeatures, arguments, tasks, uri, options.runtime, progress, "images")
        outputs.finish(uri, {"kind": "cluster features", "images": shards.count(Selection(options.splits))})
        return uri


def feature_part(part: str, model: int) -> str:
    """Name under which the features of one part by one model are committed."""
    return f"{part.removesuffix('.parquet')}-{model}"


def categories_of(model_set: ModelSet, folder: str) -> tuple[str, ...]:
    """Categories that a model folder of a model_set scores; empty for all."""
    return tuple(sorted(name for name, own in model_set.by_category.items() if own == folder))


class PartFeatures:
    """Writes what describes the images of one part by one model. A `PartTask`.

    Files: `-distances.npy` n×N, `-top.npy` n×T×D (patches of largest distance, the largest first; equal ones by
    place) and `-mean.npy` n×D (of all patches, masked ones included), float32.

    Args:
        shards: the shard set.
        model_set: models.
        splits: which images.
        output: folder of the features.
        keep_ratio: T as a share of N.
        batch_size: images in one forward pass.
        limits: what an image may cost.
        device: where networks run.
        threads: images decoded at the same time.
    """

    def __init__(
        self,
        shards: ShardSet,
        model_set: ModelSet,
        splits: tuple[str, ...],
        output: str,
        keep_ratio: float,
        batch_size: int,
        limits: ImageLimits,
        device: str,
        threads: int,
    ) -> None:
        self._shards, self._shelf, self._splits, self._output = shards, model_set, splits, output
        self._keep_ratio, self._batch_size, self._limits = keep_ratio, batch_size, limits
        self._device, self._threads = device, threads
        self._methods: dict[int, MemoryMethod] = {}

    @torch.inference_mode()
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Write the features of a part by a model, and their record."""
        part, number = task["part"], task["model"]
        folder = self._shelf.folders[number]
        selection = Selection(self._splits, categories_of(self._shelf, folder))
        ids = [i for b in self._shards.read(part, selection, ["sample_id"]) for i in b["sample_id"].to_pylist()]
        method = self._method(number, folder)
        reader = SampleReader(self._shards, selection, frozenset(ids), self._batch_size, self._limits, self._threads)
        found: dict[str, list[np.ndarray]] = {"distances": [], "top": [], "mean": []}
        for batch in reader.batches(part, method):
            for name, values in self._describe(method, method.embed(batch)).items():
                found[name].append(values)
        name = feature_part(part, number)
        for kind, arrays in found.items():
            array = np.concatenate(arrays) if arrays else np.zeros((0, 0), np.float32)
            files.write_array(files.join(self._output, f"{name}-{kind}.npy"), array)
        record = {"images": len(ids)}
        outputs.commit_part(self._output, name, record)
        return record

    def _describe(self, method: MemoryMethod, embedding: MaskedPatches) -> dict[str, np.ndarray]:
        distances = method.patch_distances(embedding).cpu().numpy()  # B N
        patches = embedding.patches.float().cpu().numpy()  # B N D
        top = max(1, round(self._keep_ratio * distances.shape[1]))
        order = np.argsort(-distances, axis=1, kind="stable")[:, :top]  # B T
        chosen = np.take_along_axis(patches, order[:, :, None], axis=1)
        return {"distances": distances, "top": chosen, "mean": patches.mean(1, dtype=np.float64).astype(np.float32)}

    def _method(self, number: int, folder: str) -> MemoryMethod:
        if number not in self._methods:
            method = load_model(folder, self._device).method
            assert isinstance(method, MemoryMethod)
            self._methods[number] = method
        return self._methods[number]


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
        return grid_to_map(cells, side, self.model["config"]["blur_sigma"]).numpy()


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
    with TemporaryDirectory(prefix="unianom-clustering-") as copies:
        for part in shards.parts:
            stored = [row for batch in shards.read(part, selection, list(COLUMNS)) for row in batch.to_pylist()]
            inside = [
                n
                for n, row in enumerate(stored)
                if row["category"] == category and (not options.anomalous_only or row["label"] == ANOMALOUS)
            ]
            if not inside:
                continue
            rows += [{**stored[n], "type": type_of(stored[n])} for n in inside]
            for kind, arrays in features.items():
                path = files.join(folder, f"{feature_part(part, number)}-{kind}.npy")
                arrays.append(files.map_array(path, Path(copies))[inside])
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
