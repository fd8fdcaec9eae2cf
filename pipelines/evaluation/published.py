"""Published results: read from a file, and set beside a run where method, data set and protocol are the same.

A run is compared with an entry only if everything that the entry names is as published; else the differences are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unianom import files
from unianom.errors import DataError, OptionError
from unianom.options import flatten
from unianom.written import natural, read_yaml, typed

PUBLISHED = Path(__file__).with_name("published.yaml")

UNKNOWN = "–"
"""Data set of a category that a model has learned and that was not evaluated."""

TYPES: dict[str, Any] = {"method": str, "dataset": str, "protocol": str, "trained_on": list[str] | None}


def read_published(uri: str) -> list[dict[str, Any]]:
    """Return the entries of a file of published results, with every optional key filled in.

    Raises:
        DataError: it is missing, no YAML list of such entries, or a key is unknown or missing.
    """
    needed = {"method", "dataset", "protocol", "source", "values"}
    optional: dict[str, Any] = {
        "calibrated": False,
        "trained_on": None,
        "config": {},
        "categories": None,
        "train_images": None,
    }
    try:
        entries = read_yaml(files.read_bytes(uri))
    except FileNotFoundError as error:
        raise DataError(f"no {uri}; give a YAML file of published results") from error
    except yaml.YAMLError as error:
        raise DataError(f"{uri} is no YAML: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{uri} is no list of published results; give one like {PUBLISHED.name} in pipelines")
    for number, entry in enumerate(entries, 1):
        wrong = sorted((needed - set(entry)) | (set(entry) - needed - set(optional)))
        if wrong:
            raise DataError(f"{uri}: entry {number} lacks or does not know {', '.join(wrong)}; mend it")
        for key in TYPES.keys() & set(entry):  # a data set may be named 007
            try:
                entry[key] = typed(entry[key], TYPES[key])
            except OptionError as error:
                raise DataError(f"{uri}: {key} of entry {number}: {error}; mend it") from error
    entries = natural(entries)
    return [{**optional, **entry, "trained_on": entry.get("trained_on") or [entry["dataset"]]} for entry in entries]


def nearest_published(
    published: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    dataset: str,
    rows: Sequence[Mapping[str, Any]],
    protocol: str,
    scores: str,
) -> dict[str, Any] | None:
    """Return the published result of the same method, data set and protocol that differs in the fewest ways."""
    dataset_of = {row["category"]: row["dataset"] for row in evaluation["metrics"]["categories"]}
    learned = sorted({dataset_of.get(category, UNKNOWN) for model in models for category in model["categories"]})
    if all(len(model["categories"]) == 1 for model in models):
        kind, learned = ("one_class" if protocol == "mean" else ""), [dataset]
    else:
        kind = "" if len(models) > 1 else "multi_class" if protocol == "mean" else "absolute_unified"
    candidates = [
        {"source": entry["source"], "values": entry["values"], "differences": _differences(entry, models, rows)}
        for entry in published
        if entry["method"] == models[0]["method"]
        and (entry["dataset"], entry["protocol"]) == (dataset, kind)
        and entry["calibrated"] == (scores == "calibrated")
        and sorted(entry["trained_on"]) == learned
    ]
    return min(candidates, key=lambda candidate: len(candidate["differences"]), default=None)


def _differences(
    entry: Mapping[str, Any], models: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Say in what a run is not as published."""
    differences = []
    for key, wanted in entry["config"].items():
        have = sorted({str(flatten(model["config"]).get(key)) for model in models})
        if have != [str(wanted)]:
            differences.append(f"{key} {', '.join(have)} instead of {wanted}")
    variants = {(model.get("calibrator") or {}).get("config", {}).get("variant") for model in models}
    if entry["calibrated"] and variants != {"cada"}:
        differences.append(f"calibrated by {', '.join(sorted(map(str, variants)))} instead of cada")
    if any(model["config"]["backbone"]["weights"] == "random" for model in models):
        differences.append("random weights")
    if entry["categories"] not in (None, len(rows)):
        differences.append(f"{len(rows)} categories instead of {entry['categories']}")
    made = [model["provenance"] for model in models]
    learned = sum((one.get("training") or one.get("bank") or {}).get("images", 0) for one in made)
    if entry["train_images"] not in (None, learned):
        differences.append(f"learned from {learned} images instead of {entry['train_images']}")
    if any(one.get("held_out_normals") for one in made):
        differences.append(f"{sum(one.get('held_out_normals') or 0 for one in made)} normal images held out")
    if any(one.get("few_shot") for one in made):
        differences.append("few-shot")
    return differences
