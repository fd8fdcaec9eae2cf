"""Clusters compared with the defect types: metrics of agreement, and what lies in each cluster."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from unianom import files
from unianom.metrics.clustering import clustering_metrics, contingency, match_clusters

METRICS = ("nmi", "ari", "accuracy", "f1_macro")


def measure_agreement(category: str, rows: Sequence[Mapping[str, Any]], clusters: int) -> dict[str, Any]:
    """Return the agreement of one category's clusters with its types; None where there is a single type."""
    known = [row for row in rows if row["type"] is not None]
    counts = {"images": len(rows), "clusters": clusters, "types": len({row["type"] for row in known})}
    if counts["types"] < 2:
        return {"category": category, **dict.fromkeys(METRICS), **counts}
    metrics = clustering_metrics([row["cluster"] for row in known], [row["type"] for row in known])
    return {"category": category, **{key: metrics[key] for key in METRICS}, **counts}


def summarise_clusters(category: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Summarise each cluster of a category.

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
    summaries = []
    for cluster in sorted({row["cluster"] for row in rows}):
        members = [row for row in rows if row["cluster"] == cluster]
        counts = Counter(row["type"] for row in members if row["type"] is not None)
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        summaries.append(
            {
                "category": category,
                "cluster": cluster,
                "images": len(members),
                "majority": ranked[0][0] if ranked else None,
                "share": ranked[0][1] / len(members) if ranked else None,
                "matched": matched.get(cluster),
                "types": dict(ranked),
            }
        )
    return summaries


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are defined; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def write_table(output: str, rows: list[dict[str, Any]]) -> None:
    """Write clusters.parquet: the cluster of each image, and its distance from the centre."""
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
