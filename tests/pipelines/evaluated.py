"""Writes a shard set, its score set and their evaluation from arrays, as the jobs would, for tests of their readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluation.labelled_images import LabelledImages
from pipelines.evaluation.options import EvaluateOptions
from pipelines.evaluation.pixel_counts import MapReader, plan_pixels, scored_range
from pipelines.evaluation.tabulate import tabulate
from unianom import files
from unianom.data.image import InputPolicy, encode_map, encode_png
from unianom.data.maps import MapsKept
from unianom.data.schema import SAMPLE_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA, SCORE_VERSION
from unianom.data.shards import MANIFEST, PartWriter, ScoreSet, ShardSet, write_rejected
from unianom.options import to_plain

MODEL = "5e" * 32
"""Digest of the model that scored everything."""


@dataclass(frozen=True)
class Scored:
    """One sample and what the model said of it. Image H×W×3 uint8, mask H×W uint8 of 0 and 255, map S×S float32.

    `calibration` holds offset and scale, of the map and of the score.
    """

    name: str
    category: str
    label: int | None
    defect: str | None
    image: np.ndarray
    score: float | None
    mask: np.ndarray | None = None
    anomaly_map: np.ndarray | None = None
    calibration: tuple[float, float] | None = None
    status: str = "ok"
    error: str | None = None
    split: str = "test"
    dataset: str = "drawn"
    model: str = MODEL
    decision: str | None = None  # another one than the threshold's

    @property
    def sample_id(self) -> str:
        return f"{self.dataset}/{self.name}"


def model_entry(policy: InputPolicy, threshold: float | None, **changes: Any) -> dict[str, Any]:
    """A model as score manifests list it."""
    entry = {
        "digest": MODEL,
        "method": "patchcore",
        "categories": ["disc", "stripe"],
        "threshold": None
        if threshold is None
        else {
            "value": threshold,
            "target_fpr": 0.1,
            "confidence": 0.95,
            "n_normals": 60,
            "rank": 59,
            "observed_fpr": 1 / 60,
        },
        "config": {
            "preset": "paper",
            "backbone": {"name": "wide_resnet50_2.tv_in1k", "weights": "pretrained", "precision": "fp32"},
            "input": to_plain(policy),
            "bank": {"coreset_ratio": 0.1, "index": "flat", "seed": 0},
        },
        "provenance": {
            "shards": {"uri": "/data/shards", "digest": "ab" * 32},
            "bank": {"images": 60, "patches": 43210, "rows": 4321, "cover_radius": 0.5},
            "notice": None,
            "seeds": {"split": 0, "coreset": 0},
            "versions": {"unianom": "0.1.0", "torch": "2.10.0"},
        },
    }
    return entry | changes


def write_scored(
    folder: Path,
    samples: Sequence[Scored],
    models: Sequence[dict[str, Any]],
    parts: int = 2,
    maps: MapsKept | None = None,
) -> tuple[ScoreSet, ShardSet]:
    """Write `shards` and `scores` below a folder."""
    shards = _write_shards(folder / "shards", samples, parts)
    return _write_scores(folder / "scores", samples, models, shards, parts, maps), shards


def write_evaluation(
    folder: Path,
    samples: Sequence[Scored],
    models: Sequence[dict[str, Any]],
    parts: int = 2,
    soft_dice: bool = False,
    maps: MapsKept | None = None,
    **options_changed: Any,
) -> str:
    """Write `shards`, `scores` and `evaluation` below a folder; returns the evaluation's folder."""
    scores, shards = write_scored(folder, samples, models, parts, maps)
    output = str(folder / "evaluation")
    options = EvaluateOptions(scores.uri, shards.uri, output, soft_dice=soft_dice, **options_changed)
    images = LabelledImages.read(scores)
    plan = plan_pixels(options, scores, images)
    reader = MapReader(scores, shards, plan, str(folder / "counted"))
    for entry in scores.manifest["files"]:
        if scores.maps == "all" and scored_range(entry, shards) is not None:
            reader.run({"part": entry["name"]})
    content = tabulate(options, scores, shards, images, plan, str(folder / "counted"))
    files.write_json(files.join(output, "evaluation.json"), content)
    return output


def _write_parts(
    folder: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]], parts: int, ending: str = ""
) -> list[dict[str, Any]]:
    entries = []
    for number in range(parts):
        own = rows[number::parts]
        name = f"part-{number:05d}{ending}.parquet"
        uri = str(folder / name)
        with files.open_atomic(uri) as handle:
            writer = PartWriter(handle, schema)
            for row in own:
                writer.write(row)
            writer.close()
        entries.append(
            {"name": name, "rows": len(own), "bytes": (folder / name).stat().st_size, "sha256": files.sha256_file(uri)}
        )
    return entries


def _counts(samples: Iterable[Scored]) -> list[dict[str, Any]]:
    names = ("dataset", "category", "split", "label", "defect")
    counted: dict[tuple[Any, ...], int] = {}
    for sample in samples:
        key = tuple(getattr(sample, name) for name in names)
        counted[key] = counted.get(key, 0) + 1
    return [dict(zip(names, key, strict=True), count=n) for key, n in sorted(counted.items(), key=str)]


def _identity(sample: Scored) -> dict[str, Any]:
    fields = ("sample_id", "dataset", "category", "split", "label", "defect")
    return {name: getattr(sample, name) for name in fields} | {
        "uri": f"/data/{sample.name}",
        "sha256": files.sha256_of(sample.image.tobytes()),
        "height": sample.image.shape[0],
        "width": sample.image.shape[1],
    }


def _write_shards(folder: Path, samples: Sequence[Scored], parts: int) -> ShardSet:
    rows = [
        _identity(sample)
        | {
            "image": encode_png(sample.image),
            "format": "PNG",
            "mask": None if sample.mask is None else encode_png(sample.mask),
        }
        for sample in samples
    ]
    entries = _write_parts(folder, SAMPLE_SCHEMA, rows, parts)
    write_rejected(str(folder), [])
    manifest = {
        "kind": "shard set",
        "schema_version": SCHEMA_VERSION,
        "tool_version": "0.1.0",
        "source": "/data",
        "layout": "mvtec",
        "layout_options": {},
        "counts": _counts(samples),
        "bytes": sum(entry["bytes"] for entry in entries),
        "files": entries,
        "rejected": {"corrupt": 1},
        "summary": {
            "height": [64, 64],
            "width": [64, 96],
            "distinct_sizes": 2,
            "duplicates": {"groups": 2, "examples": []},
            "duplicates_across_splits": {"groups": 1, "examples": [["drawn/a.png", "drawn/b.png"]]},
            "duplicates_with_other_label": {"groups": 0, "examples": []},
            "masks": {
                "missing": {"count": 3, "examples": ["drawn/c.png"]},
                "wrong_size": {"count": 0, "examples": []},
                "unreadable": {"count": 0, "examples": []},
                "empty": {"count": 0, "examples": []},
            },
        },
    }
    files.write_json(str(folder / MANIFEST), manifest)
    return ShardSet.open(str(folder))


def _write_scores(
    folder: Path,
    samples: Sequence[Scored],
    models: Sequence[dict[str, Any]],
    shards: ShardSet,
    parts: int,
    maps: MapsKept | None = None,
) -> ScoreSet:
    thresholds = {model["digest"]: model["threshold"] for model in models}
    rows = []
    for sample in samples:
        packed = (None, None, None) if sample.anomaly_map is None else encode_map(sample.anomaly_map)
        threshold = thresholds.get(sample.model)
        decided = sample.score is not None and threshold is not None
        rows.append(
            _identity(sample)
            | {
                "score": sample.score,
                "calibrated_score": None
                if sample.calibration is None or sample.score is None
                else (sample.score - sample.calibration[0]) / sample.calibration[1],
                "decision": sample.decision
                or (("fail" if sample.score > threshold["value"] else "pass") if decided else None),
                "anomaly_map": packed[0],
                "map_offset": packed[1],
                "map_scale": packed[2],
                "calibration_offset": None if sample.calibration is None else sample.calibration[0],
                "calibration_scale": None if sample.calibration is None else sample.calibration[1],
                "status": sample.status,
                "error": sample.error,
                "model": sample.model,
            }
        )
    manifest = {
        "kind": "score set",
        "schema_version": SCORE_VERSION,
        "tool_version": "0.1.0",
        "shards": {"digest": shards.digest},
        "models": list(models),
        "splits": ["test"],
        "categories": [],
        "maps": maps or any(sample.anomaly_map is not None for sample in samples),  # as before there were three
        "batch_size": 8,
        "device": "cpu",
        "counts": _counts(samples),
        "statuses": _statuses(samples),
        "files": _write_parts(folder, SCORE_SCHEMA, rows, parts, "-0123456789ab"),
    }
    files.write_json(str(folder / MANIFEST), manifest)
    return ScoreSet.open(str(folder))


def _statuses(samples: Sequence[Scored]) -> dict[str, int]:
    names = [sample.status for sample in samples]
    return {name: names.count(name) for name in sorted(set(names))}
