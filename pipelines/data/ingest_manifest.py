"""The manifest of a shard set: what was written, and what a person should know of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipelines.data.ingest_part import MASK_DOUBTS, MASK_PROBLEMS
from pipelines.data.ingest_plan import part_name
from pipelines.runtime import outputs
from unianom import __version__, files
from unianom.data.layouts import LeftOut
from unianom.data.schema import SCHEMA_VERSION
from unianom.data.shards import ShardSet, write_rejected
from unianom.errors import DataError

SMALL_PART = 1 << 14
"""16-bit images that never reach this value, a quarter of the range, look like images of fewer bits."""


def commit(output: str, digest: str, plan: dict[str, Any], parts: int, left_out: LeftOut) -> None:
    """Write the rejected rows and the manifest of a folder whose parts are all there.

    Raises:
        DataError: a part is missing, or not one sample could be read.
    """
    records = []
    for number in range(parts):
        record = outputs.part_record(output, part_name(number))
        if record is None or record["plan"] != digest:
            raise DataError(f"{output}/{part_name(number)} was not written; run the same command again")
        records.append(record)
    rejected = [row for record in records for row in record["rejected"]]
    write_rejected(output, rejected)
    entries = [{key: record[key] for key in ("name", "rows", "sha256")} for record in records]
    draft = ShardSet(output, {"files": entries}, "")
    columns = ["sample_id", "dataset", "category", "split", "label", "defect", "height", "width", "sha256"]
    table = draft.table(columns=columns).to_pylist()
    if not table:
        raise DataError(
            f"not one of {len(rejected)} samples could be read; the reasons are in {output}/_rejected.parquet"
        )
    manifest = {
        "kind": ShardSet.kind,
        "schema_version": SCHEMA_VERSION,
        "tool_version": __version__,
        "plan_digest": digest,
        **{key: plan[key] for key in ("layout", "source", "layout_options", "resize", "limits")},
        "contaminate": plan.get("contaminate"),  # share and seed
        **({"reading": plan["reading"]} if "reading" in plan else {}),
        "counts": _counts(table),
        "bytes": sum(_size(output, entry["name"]) for entry in entries),
        "rejected": dict(sorted(Counter(row["status"] for row in rejected).items())),
        "summary": summarise(table, records, left_out),
        "files": entries,
    }
    outputs.finish(output, manifest)


def _size(output: str, name: str) -> int:
    fs, path = files.resolve(files.join(output, name))
    return int(fs.size(path))


def _counts(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("dataset", "category", "split", "label", "defect")
    counts = Counter(tuple(row[key] for key in keys) for row in table)
    return [
        {**dict(zip(keys, group, strict=True)), "count": counts[group]}
        for group in sorted(counts, key=lambda g: str(g))
    ]


def summarise(
    table: list[dict[str, Any]], records: list[dict[str, Any]], left_out: LeftOut | None = None
) -> dict[str, Any]:
    """Return what a user should know of the data before trusting a figure made from it.

    The keys "left_out" and "sixteen_bits", and under "masks" those of `MASK_DOUBTS`, are there only where there is
    something to tell, so that the manifest of a set without such stays what it always was.
    """
    by_hash: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        by_hash.setdefault(row["sha256"], []).append(row)
    groups = [rows for _, rows in sorted(by_hash.items()) if len(rows) > 1]
    crossing = [rows for rows in groups if len({row["split"] for row in rows}) > 1]
    conflicting = [rows for rows in groups if len({row["label"] for row in rows}) > 1]
    heights, widths = [row["height"] for row in table], [row["width"] for row in table]

    def listed(found: list[list[dict[str, Any]]]) -> dict[str, Any]:
        return {"groups": len(found), "examples": [[row["sample_id"] for row in rows] for rows in found[:10]]}

    masks = {problem: sorted(i for record in records for i in record["masks"][problem]) for problem in MASK_PROBLEMS}
    for doubt in MASK_DOUBTS:
        ids = sorted(i for record in records for i in record.get("mask_doubts", {}).get(doubt, []))
        masks |= {doubt: ids} if ids else {}
    deep = [record["deep"] for record in records if "deep" in record]
    largest = max((found["largest"] for found in deep), default=65535)
    unused = left_out.summary() if left_out else {}
    return {
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "distinct_sizes": len(set(zip(heights, widths, strict=True))),
        "duplicates": listed(groups),
        "duplicates_across_splits": listed(crossing),
        "duplicates_with_other_label": listed(conflicting),
        "masks": {problem: {"count": len(ids), "examples": ids[:10]} for problem, ids in masks.items()},
        **({"left_out": unused} if any(unused.values()) else {}),
        **(
            {
                "sixteen_bits": {
                    "count": sum(found["count"] for found in deep),
                    "largest": largest,
                    "example": min(found["example"] for found in deep),
                }
            }
            if largest < SMALL_PART
            else {}
        ),
    }


def check_rejected(shards: ShardSet, most: float) -> None:
    """Raise a DataError if a larger share than `most` of the samples was rejected."""
    rejected = sum(shards.manifest["rejected"].values())
    total = rejected + sum(row["count"] for row in shards.manifest["counts"])
    if rejected > most * total:
        reasons = ", ".join(f"{count} {status}" for status, count in shards.manifest["rejected"].items())
        raise DataError(
            f"{rejected} of {total} samples were rejected ({reasons}), more than --max-reject-fraction {most:g} "
            f"allows; the others are stored, the reasons are in {shards.uri}/_rejected.parquet"
        )
