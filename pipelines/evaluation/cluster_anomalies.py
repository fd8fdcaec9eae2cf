"""jobs/cluster_anomalies.py: test images in clusters by their anomalous patches, compared with the defect types.

shards ─▶ features of every image ─▶ K-means per category ─▶ agreement with the defect types, contact sheets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipelines.data.engine import choose_engine
from pipelines.data.image_source import SampleSource
from pipelines.evaluation.cluster_summary import (
    METRICS,
    mean_of_defined,
    measure_agreement,
    summarise_clusters,
    write_table,
)
from pipelines.evaluation.clustering import cluster_vectors, describe_category, keep_features, model_k_ratio
from pipelines.evaluation.options import ClusterOptions
from pipelines.reporting.cluster_report import cluster_section
from pipelines.reporting.cluster_sheet import cluster_sheet
from pipelines.runtime import outputs
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.runtime.tracking import scope, track
from unianom import __version__, files
from unianom.data.image import InputPolicy
from unianom.data.schema import ANOMALOUS
from unianom.data.shards import Selection, ShardSet
from unianom.errors import DataError, ModelError
from unianom.execution import CPU
from unianom.methods import METHODS, MemoryMethod
from unianom.options import from_plain, to_plain

PLANNED = (
    "splits",
    "categories",
    "variant",
    "pooling",
    "scaling",
    "k_ratio",
    "keep_ratio",
    "anomalous_only",
    "clusters",
    "n_init",
    "seed",
    "shown",
    "batch_size",
)
"""Options that the clusters depend on."""


@dataclass(frozen=True)
class ClusterResult:
    """Result of a clustering.

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
        model_k_ratio(options, model)
    source = SampleSource(shards, selection, options.limits)
    runtime = choose_engine(
        options.runtime,
        source,
        shards.count(selection) // len(models),
        lambda: load_model(model_set.folders[0], CPU).method,
    )
    options = replace(options, runtime=runtime)
    plan = {
        "tool": __version__,
        "shards": shards.digest,
        "models": [model["digest"] for model in models],
        **{key: to_plain(getattr(options, key)) for key in PLANNED},
        **options.runtime.execution.plan,
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
            _write(options, output, shards, model_set, models, folder)
        content = files.read_json(files.join(output, "clustering.json"))
        for row in content["categories"]:
            run.metrics({f"{scope(row['category'])}/{key}": value for key, value in row.items() if key in METRICS})
        run.metrics({f"mean/{key}": value for key, value in content["mean"].items()})
        run.artifacts({"categories.csv": files.read_bytes(files.join(output, "categories.csv"))})
        run.json("clustering.json", content)
        run.figures({name: files.read_bytes(files.join(output, name)) for name in content["sheets"].values()})
    return ClusterResult(output, fresh, content)


def _write(
    options: ClusterOptions,
    output: str,
    shards: ShardSet,
    model_set: ModelSet,
    models: Sequence[Mapping[str, Any]],
    folder: str,
) -> None:
    """Cluster each category and write everything, the manifest last."""
    table: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    clusters: list[dict[str, Any]] = []
    notes: list[str] = []
    sheets: dict[str, str] = {}
    labels = (ANOMALOUS,) if options.anomalous_only else ()
    for category in options.categories or tuple(shards.categories):
        if not shards.count(Selection(options.splits, (category,), labels)):
            continue
        described = describe_category(options, shards, model_set, models, folder, category)
        types = sorted({row["type"] for row in described.rows if row["type"] is not None})
        count = options.clusters or len(types)
        if count > len(described.rows):
            raise DataError(f"{category} has {len(described.rows)} images, too few for {count} clusters")
        if options.clusters is None and count < 2:
            notes.append(f"{category} has {count} known type of image, so there is nothing to tell apart")
            continue
        assigned, distance = cluster_vectors(described.vectors, count, options.n_init, options.seed)
        clustered = [
            {**row, "cluster": int(label), "distance": float(away)}
            for row, label, away in zip(described.rows, assigned, distance, strict=True)
        ]
        summaries = summarise_clusters(category, clustered)
        table += clustered
        rows.append(measure_agreement(category, clustered, count))
        clusters += summaries
        if options.shown:
            sheets[category] = f"clusters_{files.safe_name(category)}.png"
            policy = from_plain(InputPolicy, described.model["config"]["input"])
            maps = partial(described.anomaly_maps, policy.side)
            sheet = cluster_sheet(shards, clustered, summaries, maps, policy, options.shown)
            files.write_bytes(files.join(output, sheets[category]), sheet)
    if not rows:
        raise DataError(f"nothing to cluster in {shards.uri}: {'; '.join(notes)}; give --clusters")
    mean = {key: mean_of_defined([row[key] for row in rows]) for key in METRICS}
    content = {
        "tool_version": __version__,
        "models": [{key: model[key] for key in ("digest", "method", "config")} for model in models],
        "shards": {"uri": shards.uri, "digest": shards.digest},
        "options": {key: to_plain(getattr(options, key)) for key in ("variant", "pooling", "scaling", "n_init", "seed")}
        | {"k_ratio": model_k_ratio(options, models[0]), "anomalous_only": options.anomalous_only},
        "categories": rows,
        "mean": mean,
        "clusters": clusters,
        "notes": notes,
        "sheets": sheets,
    }
    write_table(output, table)
    files.write_bytes(files.join(output, "categories.csv"), files.csv_bytes([*rows, {"category": "mean", **mean}]))
    files.write_json(files.join(output, "section.json"), cluster_section(content))
    files.write_json(files.join(output, "clustering.json"), content)
    outputs.finish(output, {"kind": "clustering", "images": len(table)})
