"""The facts on the page: what was evaluated, the models, and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.outcomes import joined
from pipelines.reporting.page_tables import with_examples
from unianom.data.image import InputPolicy
from unianom.data.schema import ANOMALOUS, NORMAL
from unianom.data.shards import ShardSet
from unianom.options import flatten, from_plain
from unianom.thresholds import promise_in_words


def page_title(inputs: Sequence[ReportInput]) -> str:
    """Return the models and the data sets."""
    datasets = {row["dataset"] for entry in inputs for row in entry.scores.manifest["counts"]} - {""}
    return f"{joined([entry.name for entry in inputs])} on {', '.join(sorted(datasets))}"


def evaluation_facts(
    evaluation: Mapping[str, Any], score_manifest: Mapping[str, Any], table: pa.Table
) -> list[tuple[str, str]]:
    """Return name and value of what a reader must know before the figures."""
    label = table["label"].to_numpy()
    categories = [row["category"] for row in evaluation["metrics"]["categories"]]
    splits = "split " + ", ".join(score_manifest["splits"]) if score_manifest["splits"] else "all splits"
    normal, anomalous = np.sum(label == NORMAL), np.sum(label == ANOMALOUS)
    facts = [
        ("images", f"{len(label):,} ({splits}): {normal:,} normal, {anomalous:,} anomalous"),
        ("categories", f"{len(categories)}: {listed(categories)}"),
        ("data", f"{evaluation['shards']['uri']} (manifest {evaluation['shards']['digest'][:12]})"),
    ]
    models = [_model_facts(model) for model in evaluation["models"]]
    if len(models) > 1:
        facts.append(("models", f"{len(models)}, each for its own categories"))
    for name in dict.fromkeys(name for model in models for name in model):
        values = {model.get(name) for model in models}
        facts.append((name, models[0][name] if len(values) == 1 else "differs between the models; see Models"))
    return facts


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names one after the other, at most so many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _model_facts(model: Mapping[str, Any]) -> dict[str, str]:
    """Return what a model is, by name."""
    config, bank = model["config"], model["provenance"].get("bank")
    facts = {
        "method": model["method"] + (f", preset {config['preset']}" if "preset" in config else ""),
        "backbone": f"{config['backbone']['name']}, {config['backbone']['precision']}",
        "weights": config["backbone"]["weights"],
        "input": _input_words(from_plain(InputPolicy, config["input"])),
    }
    if bank is not None:
        ratio, index = config["bank"]["coreset_ratio"], config["bank"]["index"]
        facts["memory bank"] = (
            f"{bank['rows']:,} of {bank['patches']:,} patches of {bank['images']:,} images "
            f"(coreset ratio {ratio:g}), {index} index"
        )
    threshold = model["threshold"]
    facts["threshold"] = "none" if threshold is None else f"{threshold['value']:.4g}: {promise_in_words(threshold)}"
    for name, own in (model.get("category_thresholds") or {}).items():
        facts[f"threshold of {name}"] = f"{own['value']:.4g}: {promise_in_words(own)}"
    return facts


def _input_words(policy: InputPolicy) -> str:
    if policy.resize == "stretch":
        words = f"stretched to {policy.size} × {policy.size}"
    else:
        words = f"shorter side {policy.size}, centre crop {policy.crop}"
    if policy.pad is not None:
        words += f", padded to {policy.pad}"
    return f"{words}, {policy.interpolation}; masks {policy.mask_resize}"


def model_details(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's facts, and all of its config and provenance, one name and value a line."""
    plain = {key: model[key] for key in ("config", "threshold", "provenance")}
    return {
        "digest": model["digest"],
        "categories": ", ".join(model["categories"]),
        "facts": _model_facts(model),
        "details": [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in flatten(plain).items()],
    }


def data_facts(inputs: Sequence[ReportInput], shards: ShardSet) -> list[tuple[str, str]]:
    """Return name and value of what is known of the shard set and the scores."""
    manifest = shards.manifest
    summary = manifest["summary"]
    span = {key: " to ".join(str(v) for v in dict.fromkeys(summary[key])) for key in ("height", "width")}
    rejected = ", ".join(f"{count:,} {status}" for status, count in manifest["rejected"].items()) or "none"
    rows = [
        ("source", f"{manifest['source']} ({manifest['layout']} layout)"),
        ("shard set", shards.uri),
        ("manifest SHA-256", shards.digest),
        ("size", f"{manifest['bytes'] / 1e6:,.1f} MB in {len(manifest['files']):,} parts"),
        ("image sizes", f"height {span['height']}, width {span['width']}; {summary['distinct_sizes']:,} distinct"),
        ("rejected by ingest", rejected),
        ("groups of identical images", f"{summary['duplicates']['groups']:,}"),
        ("… in more than one split", with_examples(summary["duplicates_across_splits"])),
        ("… with different labels", with_examples(summary["duplicates_with_other_label"])),
    ]
    for problem, images in summary["masks"].items():
        rows.append((f"masks {problem.replace('_', ' ')}", f"{images['count']:,}"))
    for entry in inputs:
        of = f" of {entry.name}" if len(inputs) > 1 else ""
        rows += [(f"scores{of}", entry.scores.uri), (f"scores{of} SHA-256", entry.scores.digest)]
    return rows
