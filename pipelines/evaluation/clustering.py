"""Anomaly clustering: test images grouped by what is anomalous in them (UniFormaly, arXiv 2307.12540, Sec. 5).

    shards ─▶ actors: embed, search the bank ─▶ patches that matter, one file per part ─▶ K-means per category ─▶
    agreement with the defect types, contact sheets

An image is described by its most anomalous patches. These are kept, so another variant or number of clusters takes no
network.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from pipelines.data.feature_cache import Arrays, BatchFunction, FeatureCache, ImageBatch, part_name
from pipelines.data.image_source import SampleSource
from pipelines.evaluation.options import ClusterOptions
from pipelines.reporting.contact_sheet import font, sheet_png
from pipelines.reporting.gallery import SCALE_MAPS
from pipelines.reporting.samples import STORED, as_seen, read_samples
from pipelines.reporting.tables import percent
from pipelines.runtime import outputs
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import memory_method
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files, visual
from unianom.data.image import InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.splits import hash_order
from unianom.errors import DataError, ModelError, OptionError
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.layers.maps import grid_to_map
from unianom.metrics.clustering import clustering_metrics, contingency, match_clusters
from unianom.options import from_plain, to_plain

GOOD = "good"
"""Type of normal images that carry no defect name."""

CELL, CAPTION, TITLE, GAP = 128, 14, 24, 4
"""Pixels of a contact sheet: side of a picture, height of its caption and of a cluster's title, space between."""


@dataclass(frozen=True)
class ClusterResult:
    """What a clustering found.

    Attributes:
        folder: where it lies.
        fresh: whether this run wrote it.
        content: of clustering.json.
    """

    folder: str
    fresh: bool
    content: dict[str, Any]


def cluster_anomalies(options: ClusterOptions) -> ClusterResult:
    """Cluster, or find it done.

    Raises:
        DataError: wrong inputs, or no category with anything to tell apart.
        ModelError: no usable model, or one without a memory bank.
        OptionError: the model's own k_ratio exceeds keep_ratio.
    """
    shards = ShardSet.open(options.shards)
    labels = (ANOMALOUS,) if options.anomalous_only else ()
    selection = Selection(options.splits, options.categories, labels)
    shards.check(selection)
    model_set = ModelSet.open(options.model)
    models = model_set.descriptions()
    for category in options.categories or shards.categories:
        model_set.folder_of(category)
    for model in models:
        if not issubclass(METHODS[model["method"]], MemoryMethod):
            raise ModelError(
                f"{model_set.uri} is a {model['method']} model, which has no memory bank of patches to search"
            )
        _k_ratio(options, model)
    own = (
        "splits",
        "categories",
        "variant",
        "pooling",
        "scaling",
        "k_ratio",
        "keep_ratio",
        "anomalous_only",
        "clusters",
    )
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "models": [model["digest"] for model in models],
        **{key: to_plain(getattr(options, key)) for key in (*own, "n_init", "seed", "shown", "batch_size")},
        "device": options.runtime.device,
        "threads": options.runtime.cpus_per_worker,
    }
    output = files.full_uri(options.output)
    inputs = {"model": options.model, "shards": options.shards}
    with (
        outputs.open_output(output, "clustering", plan, inputs=inputs, overwrite=options.overwrite) as digest,
        track(options.tracking, "cluster_anomalies", output, to_plain(options), plan=digest) as run,
    ):
        fresh = not outputs.is_complete(output)
        if fresh:
            folder = keep_features(options, shards, model_set, models)
            _write(options, output, shards, model_set, models, folder, selection)
        content = files.read_json(files.join(output, "clustering.json"))
        for row in content["categories"]:
            run.metrics({f"{scope(row['category'])}/{key}": value for key, value in row.items() if key in SHOWN})
        run.metrics({f"mean/{key}": value for key, value in content["mean"].items()})
        run.artifacts({"categories.csv": files.read_bytes(files.join(output, "categories.csv"))})
        run.json("clustering.json", content)
        run.figures({name: files.read_bytes(files.join(output, name)) for name in content["sheets"].values()})
    return ClusterResult(output, fresh, content)


def _k_ratio(options: ClusterOptions, model: Mapping[str, Any]) -> float:
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


def feature_part(part: str, model: int) -> str:
    """Name under which the features of one part by one model are cached."""
    return part_name(part, str(model))


def categories_of(model_set: ModelSet, folder: str) -> tuple[str, ...]:
    """Categories that a model folder of a model_set scores; empty for all."""
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

    def open(self, load: Callable[[str], Method]) -> BatchFunction:
        method = memory_method(load(self.model))

        def compute(batch: ImageBatch) -> Arrays:
            embedding = method.embed(batch.tensor(method))
            distances = method.patch_distances(embedding).cpu().numpy()  # B N
            patches = embedding.patches.float().cpu().numpy()  # B N D
            top = max(1, round(self.keep_ratio * distances.shape[1]))
            order = np.argsort(-distances, axis=1, kind="stable")[:, :top]  # B T
            chosen = np.take_along_axis(patches, order[:, :, None], axis=1)
            return {"distances": distances, "top": chosen, "mean": patches.mean(1, dtype=np.float64).astype(np.float32)}

        return BatchFunction(method.input, compute)


def describe_images(
    top: np.ndarray, mean: np.ndarray, patches: int, variant: str, pooling: str, k_ratio: float
) -> np.ndarray:
    """The vectors that are clustered, un-normalised.

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
    """n×D values at mean 0 and deviation 1 in each column; constant columns become 0."""
    deviation = vectors.std(0)
    return (vectors - vectors.mean(0)) / np.where(deviation > 0, deviation, 1)


def cluster_vectors(vectors: np.ndarray, clusters: int, n_init: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """K-means (scikit-learn), the largest cluster first.

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


# -- results -----------------------------------------------------------------------------------------------------------

SHOWN = {"nmi": "NMI", "ari": "ARI", "accuracy": "accuracy", "f1_macro": "macro F1"}
"""Metrics, and their short names."""

COLUMNS = ("sample_id", "category", "label", "defect")


@dataclass(frozen=True, eq=False)
class Described:
    """The images of one category.

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


def type_of(row: Mapping[str, Any]) -> str | None:
    """Defect type of an image, "good" of normal ones; None where it is unknown."""
    return GOOD if row["label"] == NORMAL and row["defect"] is None else row["defect"]


def _described(
    options: ClusterOptions,
    shards: ShardSet,
    model_set: ModelSet,
    models: Sequence[Mapping[str, Any]],
    folder: str,
    category: str,
) -> Described:
    """Read the features of a category."""
    model_folder = model_set.folder_of(category)
    number = model_set.folders.index(model_folder)
    selection = Selection(options.splits, categories_of(model_set, model_folder))
    rows: list[dict[str, Any]] = []
    found: dict[str, list[np.ndarray]] = {"distances": [], "top": [], "mean": []}
    with TemporaryDirectory(prefix="unianom-clustering-") as copies:
        for part in shards.parts:
            own = [row for batch in shards.read(part, selection, list(COLUMNS)) for row in batch.to_pylist()]
            inside = [
                n
                for n, row in enumerate(own)
                if row["category"] == category and (not options.anomalous_only or row["label"] == ANOMALOUS)
            ]
            if not inside:
                continue
            rows += [{**own[n], "type": type_of(own[n])} for n in inside]
            for kind, arrays in found.items():
                path = files.join(folder, f"{feature_part(part, number)}-{kind}.npy")
                arrays.append(files.map_array(path, Path(copies))[inside])
    distances = np.concatenate(found["distances"])
    ratio = _k_ratio(options, models[number])
    vectors = describe_images(
        np.concatenate(found["top"]),
        np.concatenate(found["mean"]),
        distances.shape[1],
        options.variant,
        options.pooling,
        ratio,
    )
    if options.scaling == "standard":
        vectors = standardise(vectors)
    return Described(rows, vectors, distances, models[number])


def _write(
    options: ClusterOptions,
    output: str,
    shards: ShardSet,
    model_set: ModelSet,
    models: Sequence[Mapping[str, Any]],
    folder: str,
    selection: Selection,
) -> None:
    table: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    notes: list[str] = []
    sheets: dict[str, str] = {}
    for category in options.categories or tuple(shards.categories):
        if not shards.count(Selection(selection.splits, (category,), selection.labels)):
            continue
        described = _described(options, shards, model_set, models, folder, category)
        types = sorted({row["type"] for row in described.rows if row["type"] is not None})
        count = options.clusters or len(types)
        if count > len(described.rows):
            raise DataError(f"{category} has {len(described.rows)} images, too few for {count} clusters")
        if options.clusters is None and count < 2:
            notes.append(f"{category} has {count} known type of image, so there is nothing to tell apart")
            continue
        labels, distance = cluster_vectors(described.vectors, count, options.n_init, options.seed)
        own = [
            {**row, "cluster": int(label), "distance": float(away)}
            for row, label, away in zip(described.rows, labels, distance, strict=True)
        ]
        table += own
        rows.append(_measured(category, own, count))
        clusters += summarise_clusters(category, own)
        if options.shown:
            sheets[category] = f"clusters_{files.safe_name(category)}.png"
            sheet = contact_sheet(shards, described, own, options.shown)
            files.write_bytes(files.join(output, sheets[category]), sheet)
    if not rows:
        raise DataError(f"nothing to cluster in {shards.uri}: {'; '.join(notes)}; give --clusters")
    mean = {key: _mean([row[key] for row in rows]) for key in SHOWN}
    content = {
        "tool_version": __version__,
        "models": [{key: model[key] for key in ("digest", "method", "config")} for model in models],
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "options": {key: to_plain(getattr(options, key)) for key in ("variant", "pooling", "scaling", "n_init", "seed")}
        | {"k_ratio": _k_ratio(options, models[0]), "anomalous_only": options.anomalous_only},
        "categories": rows,
        "mean": mean,
        "clusters": clusters,
        "notes": notes,
        "sheets": sheets,
    }
    _write_table(output, table)
    files.write_bytes(files.join(output, "categories.csv"), files.csv_bytes([*rows, {"category": "mean", **mean}]))
    files.write_json(files.join(output, "section.json"), _section(content))
    files.write_json(files.join(output, "clustering.json"), content)
    outputs.finish(output, {"kind": "clustering", "images": len(table)})


def _measured(category: str, rows: Sequence[Mapping[str, Any]], clusters: int) -> dict[str, Any]:
    """Agreement of one category's clusters with its types; None where a single type leaves nothing to agree on."""
    known = [row for row in rows if row["type"] is not None]
    counts = {"images": len(rows), "clusters": clusters, "types": len({row["type"] for row in known})}
    if counts["types"] < 2:
        return {"category": category, **dict.fromkeys(SHOWN), **counts}
    metrics = clustering_metrics([row["cluster"] for row in known], [row["type"] for row in known])
    return {"category": category, **{key: metrics[key] for key in SHOWN}, **counts}


def summarise_clusters(category: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What lies in each cluster of a category.

    Returns:
        Rows of category, cluster, images, `majority` (most frequent known type, None without any), `share` of it among
        all images of the cluster, `matched` (type that the cluster stands for when it is measured, or None) and
        `types` (counts).
    """
    known = [row for row in rows if row["type"] is not None]
    matched: dict[int, str] = {}
    if known:
        table, numbers, types = contingency([row["cluster"] for row in known], [row["type"] for row in known])
        matched = {int(numbers[row]): str(types[column]) for row, column in match_clusters(table)}
    found = []
    for cluster in sorted({row["cluster"] for row in rows}):
        own = [row for row in rows if row["cluster"] == cluster]
        counts = Counter(row["type"] for row in own if row["type"] is not None)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        found.append(
            {
                "category": category,
                "cluster": cluster,
                "images": len(own),
                "majority": ranked[0][0] if ranked else None,
                "share": ranked[0][1] / len(own) if ranked else None,
                "matched": matched.get(cluster),
                "types": dict(ranked),
            }
        )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _write_table(output: str, rows: list[dict[str, Any]]) -> None:
    schema = pa.schema(
        [
            pa.field("sample_id", pa.string()),
            pa.field("category", pa.string()),
            pa.field("label", pa.int8()),
            pa.field("defect", pa.string()),
            pa.field("cluster", pa.int32()),
            pa.field("distance", pa.float64()),
        ]
    )
    with files.open_atomic(files.join(output, "clusters.parquet")) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema), handle, compression="zstd")


RESULT_COLUMNS = ["category", *SHOWN.values(), "images", "clusters", "types"]
CLUSTER_COLUMNS = ["category", "cluster", "images", "stands for", "types"]


def _result_rows(content: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [
            row["category"],
            *(percent(row[key]) for key in SHOWN),
            *(str(row[key]) for key in ("images", "clusters", "types")),
        ]
        for row in content["categories"]
    ]
    if len(rows) > 1:
        rows.append(["mean", *(percent(content["mean"][key]) for key in SHOWN), "", "", ""])
    return rows


def _cluster_rows(content: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["category"],
            str(row["cluster"] + 1),
            str(row["images"]),
            row["matched"] or "–",
            ", ".join(f"{count} {name}" for name, count in row["types"].items()) or "unknown",
        ]
        for row in content["clusters"]
    ]


def _in_words(options: Mapping[str, Any]) -> str:
    patches = {
        "top": f"the {100 * options['k_ratio']:g} % of its patches farthest from the bank",
        "max": "its patch farthest from the bank",
        "all": "all its patches",
    }[options["variant"]]
    joined = "mean" if options["pooling"] == "mean" else "concatenation"
    scaled = ", brought to unit deviation" if options["scaling"] == "standard" else ""
    return f"An image is described by the {joined} of {patches}{scaled}"


def _section(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a report shows."""
    which = "anomalous test images" if content["options"]["anomalous_only"] else "test images"
    methods = ", ".join(sorted({model["method"] for model in content["models"]}))
    return {
        "title": f"Anomaly clustering: {methods}",
        "text": [
            f"{_in_words(content['options'])}; K-means on the {which} of each category "
            f"({content['options']['n_init']} starts, seed {content['options']['seed']}). Accuracy is the "
            f"micro-averaged F1 after each cluster is matched with one type.",
            *(f"{note}." for note in content["notes"]),
        ],
        "tables": [
            {
                "title": "Agreement with the defect types, in %",
                "columns": RESULT_COLUMNS,
                "rows": _result_rows(content),
            },
            {"title": "Clusters", "columns": CLUSTER_COLUMNS, "rows": _cluster_rows(content)},
        ],
        "figures": [{"title": f"Clusters of {name}", "file": file} for name, file in content["sheets"].items()],
    }


def print_clustering(result: ClusterResult) -> None:
    """Print the tables of agreement and of clusters."""
    content = result.content
    rows = _result_rows(content)
    print_table("agreement with the defect types, in %", RESULT_COLUMNS, rows, footer=int(len(rows) > 1))
    print_table("clusters", CLUSTER_COLUMNS, _cluster_rows(content))
    for note in content["notes"]:
        console.print(f"note: {note}")
    done = "written" if result.fresh else "was complete already"
    console.print(f"clustering {done}: {result.folder} (clusters.parquet, clustering.json, contact sheets)")


# -- contact sheets ----------------------------------------------------------------------------------------------------


def contact_sheet(shards: ShardSet, described: Described, rows: Sequence[Mapping[str, Any]], shown: int) -> bytes:
    """PNG of the clusters of a category: for each a title and the images nearest to its centre, as the model saw them
    (with the outline of the mask, where there is one), above their heat maps.

    Args:
        shards: where the images are.
        described: the images.
        rows: of the same images, with `cluster` and `distance`.
        shown: images of each cluster.
    """
    policy = from_plain(InputPolicy, described.model["config"]["input"])
    scale = _scale(described, policy.side)
    summaries = summarise_clusters("", rows)
    nearest = []
    for entry in summaries:
        own = [n for n, row in enumerate(rows) if row["cluster"] == entry["cluster"]]
        nearest.append(sorted(own, key=lambda n: (rows[n]["distance"], rows[n]["sample_id"]))[:shown])
    drawn = [n for group in nearest for n in group]
    maps = dict(zip(drawn, _maps(described, policy.side, drawn), strict=True))
    wanted = {rows[n]["sample_id"] for n in drawn}
    stored = {row["sample_id"]: row for row in read_samples(shards, wanted, STORED)}
    block = TITLE + 2 * (CELL + GAP) + CAPTION
    sheet = Image.new("RGB", (shown * (CELL + GAP) + GAP, len(nearest) * block + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (entry, group) in enumerate(zip(summaries, nearest, strict=True)):
        y = number * block
        draw.text((GAP, y + 5), visual.drawable(_sheet_title(entry)), fill="#3a4150", font=font(12))
        for column, n in enumerate(group):
            x = GAP + column * (CELL + GAP)
            image, over = _pictures(stored[rows[n]["sample_id"]], maps[n], scale, policy)
            sheet.paste(image, (x, y + TITLE))
            sheet.paste(over, (x, y + TITLE + CELL + GAP))
            caption = rows[n]["type"] or "unknown"
            draw.text((x, y + TITLE + 2 * CELL + GAP + 1), visual.drawable(caption), fill="#6b7280", font=font(9))
    return sheet_png(sheet)


def _sheet_title(entry: Mapping[str, Any]) -> str:
    words = f"cluster {entry['cluster'] + 1}: {entry['images']} images"
    if entry["majority"] is not None:
        words += f", {100 * entry['share']:.0f} % {entry['majority']}"
    return words + (f"; stands for {entry['matched']}" if entry["matched"] is not None else "")


def _maps(described: Described, side: int, numbers: Sequence[int]) -> np.ndarray:
    """Anomaly maps of chosen images, n×S×S, as the method makes them from its patch distances."""
    grid = math.isqrt(described.distances.shape[1])  # inputs are square, and so are their patch grids
    cells = torch.from_numpy(described.distances[list(numbers)]).unflatten(1, (grid, grid))
    return grid_to_map(cells, side, described.model["config"]["blur_sigma"]).numpy()


def _scale(described: Described, side: int) -> visual.HeatScale:
    """One scale for a sheet, from some maps of normal images and as many of anomalous ones."""
    number = {row["sample_id"]: n for n, row in enumerate(described.rows)}
    values = []
    for normal in (True, False):
        ids = [row["sample_id"] for row in described.rows if (row["type"] == GOOD) == normal]
        chosen = [number[sample_id] for sample_id in hash_order(ids, seed=0)[:SCALE_MAPS]]
        values.append(_maps(described, side, chosen)[:, ::4, ::4].ravel())
    return visual.heat_scale(*values)


def _pictures(
    stored: Mapping[str, Any], anomaly_map: np.ndarray, scale: visual.HeatScale, policy: InputPolicy
) -> tuple[Image.Image, Image.Image]:
    """The image with the outline of its mask, and its overlay, each CELL pixels a side."""
    image, mask = as_seen(stored, policy)
    over = visual.overlay(image, anomaly_map, scale)
    if mask is not None:
        image = visual.draw_outline(image, mask, max(1, policy.side // CELL))
    small = [Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.BILINEAR) for pixels in (image, over)]
    return small[0], small[1]
