"""A clustering on the terminal and as a section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.reporting.metric_text import UNDEFINED, percent
from pipelines.runtime.cli import console, print_table

METRIC_NAMES = {"nmi": "NMI", "ari": "ARI", "accuracy": "accuracy", "f1_macro": "macro F1"}

RESULT_COLUMNS = ["category", *METRIC_NAMES.values(), "images", "clusters", "types"]
CLUSTER_COLUMNS = ["category", "cluster", "images", "stands for", "types"]


def _result_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of categories and, of several, their mean."""
    rows = [
        [
            row["category"],
            *(percent(row[key]) for key in METRIC_NAMES),
            *(str(row[key]) for key in ("images", "clusters", "types")),
        ]
        for row in content["categories"]
    ]
    if len(rows) > 1:
        rows.append(["mean", *(percent(content["mean"][key]) for key in METRIC_NAMES), "", "", ""])
    return rows


def _cluster_rows(content: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each cluster."""
    return [
        [
            row["category"],
            str(row["cluster"] + 1),
            str(row["images"]),
            row["matched"] or UNDEFINED,
            ", ".join(f"{count} {name}" for name, count in row["types"].items()) or "unknown",
        ]
        for row in content["clusters"]
    ]


def _description(options: Mapping[str, Any]) -> str:
    """Say which patches describe an image."""
    patches = {
        "top": f"the {100 * options['k_ratio']:g} % of its patches farthest from the bank",
        "max": "its patch farthest from the bank",
        "all": "all its patches",
    }[options["variant"]]
    joined = "mean" if options["pooling"] == "mean" else "concatenation"
    scaled = ", brought to unit deviation" if options["scaling"] == "standard" else ""
    return f"An image is described by the {joined} of {patches}{scaled}"


def cluster_section(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of a report."""
    which = "anomalous test images" if content["options"]["anomalous_only"] else "test images"
    methods = ", ".join(sorted({model["method"] for model in content["models"]}))
    return {
        "title": f"Anomaly clustering: {methods}",
        "text": [
            f"{_description(content['options'])}; K-means on the {which} of each category "
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


def print_clustering(content: Mapping[str, Any], folder: str, fresh: bool) -> None:
    """Print the tables of agreement and of clusters, and where everything is.

    Args:
        content: of clustering.json.
        folder: where it lies.
        fresh: whether this run wrote it.
    """
    rows = _result_rows(content)
    print_table("agreement with the defect types, in %", RESULT_COLUMNS, rows, footer=int(len(rows) > 1))
    print_table("clusters", CLUSTER_COLUMNS, _cluster_rows(content))
    for note in content["notes"]:
        console.print(f"note: {note}")
    done = "written" if fresh else "was complete already"
    console.print(f"clustering {done}: {folder} (clusters.parquet, clustering.json, contact sheets)")
