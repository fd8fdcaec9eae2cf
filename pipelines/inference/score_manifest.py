"""The end of a scoring: rejected samples among the scores, the check that none is missing, and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipelines.runtime import outputs
from unianom import __version__, files
from unianom.data.id_digest import IdDigest
from unianom.data.image_listing import ImageListing
from unianom.data.row_ranges import RowRange
from unianom.data.schema import SCORE_SCHEMA, SCORE_VERSION
from unianom.data.shards import PartWriter, ScoreSet, Selection, ShardSet
from unianom.errors import DataError

PLANNED = ("splits", "categories", "maps", "batch_size", "device", "engine")
"""Entries of the plan that the manifest repeats; a plan without an engine is of PyTorch."""


def score_part(part: str, plan: str, first: int | None = None) -> str:
    """Return the name of the score part of a shard part, or of its rows from `first` on.

    It tells the plan, so parts of two plans never mix.
    """
    place = "" if first is None else f"-{first:09d}"
    return f"{part.removesuffix('.parquet')}{place}-{plan[:12]}.parquet"


def score_record(plan: str, name: str, scores: pa.Table, path: str) -> dict[str, Any]:
    """Return the record of a score part that is written.

    Args:
        plan: digest of the scoring plan.
        name: of the part.
        scores: its rows, or their columns `status` and `sample_id`.
        path: of its file.
    """
    ids = IdDigest()
    ids.add(scores["sample_id"].to_pylist())
    return {
        "plan": plan,
        "name": name,
        "rows": len(scores),
        "statuses": dict(sorted(Counter(scores["status"].to_pylist()).items())),
        "ids": ids.hex(),
        "sha256": files.sha256_file(path),
    }


def commit_scores(
    output: str,
    digest: str,
    shards: ShardSet | ImageListing,
    selection: Selection,
    ranges: Sequence[RowRange],
    models: list[dict[str, Any]],
    plan: dict[str, Any],
) -> None:
    """Check that every sample has one score, and write the manifest.

    What is checked are the number of scores and the digest of their sample_ids, which every range tells of its own.

    Raises:
        DataError: a range is missing, or the shards are damaged.
    """
    names = [score_part(within.part, digest, within.first) for within in ranges]
    records = outputs.part_records(output, names)
    missing = [name for name in names if name not in records]
    if missing:
        raise DataError(f"{missing[0]} was not scored; run the same command again, it continues")
    done = [records[name] for name in names]
    rejected = _write_rejected(output, digest, shards, selection)
    _check_complete(shards, selection, done)
    entries = [
        {**{key: record[key] for key in ("name", "rows", "sha256")}, "of": [within.part, within.first, within.rows]}
        for record, within in zip(done, ranges, strict=True)
    ]
    entries.append({key: rejected[key] for key in ("name", "rows", "sha256")})
    statuses: Counter[str] = Counter()
    for record in [*done, rejected]:
        statuses.update(record["statuses"])
    manifest: dict[str, Any] = {
        "kind": ScoreSet.kind,
        "schema_version": SCORE_VERSION,
        "tool_version": __version__,
        "plan_digest": digest,
        "shards": {"digest": shards.digest},
        **({"images": shards.manifest["images"]} if isinstance(shards, ImageListing) else {}),
        "models": models,
        **{key: plan[key] for key in PLANNED if key in plan},
        "counts": shards.selected_counts(selection),
        "statuses": dict(sorted(statuses.items())),
        "files": entries,
    }
    _remove_whole_parts(output, digest, shards)
    outputs.finish(output, manifest)


def _remove_whole_parts(output: str, digest: str, shards: ShardSet | ImageListing) -> None:
    """Remove what an earlier version, which scored whole parts at once, left of this plan unfinished."""
    present = set(files.list_names(output))
    for name in (score_part(part, digest) for part in shards.parts):
        if name in present:
            files.remove_file(output, name)
            outputs.remove_record(output, name)


def _check_complete(
    shards: ShardSet | ImageListing, selection: Selection, records: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse scores that are not of just the samples that the manifest of the shards counts."""
    scored, expected = sum(record["rows"] for record in records), shards.count(selection)
    found = IdDigest()
    for record in records:
        found.merge(IdDigest.from_hex(record["ids"]))
    wanted = shards.ids(selection)
    if scored == expected and (wanted is None or wanted.hex() == found.hex()):
        return
    ids = shards.table(selection, ["sample_id"])["sample_id"]
    twice = next((entry["values"] for entry in ids.value_counts().to_pylist() if entry["counts"] > 1), None)
    what = f"{scored} scores{'' if twice is None else f', two of them of {twice},'}"
    raise DataError(
        f"the {shards.kind} {shards.uri} is damaged: its parts make {what} where its manifest counts {expected}"
        f"{'' if scored != expected else ' others'}; copy it again, or remove it and run {shards.job} again"
    )


def _write_rejected(output: str, digest: str, shards: ShardSet | ImageListing, selection: Selection) -> dict[str, Any]:
    """Write the samples that ingest had to reject as scores too, so that no sample is ever silently absent."""
    name = score_part("part-rejected.parquet", digest)
    statuses: Counter[str] = Counter()
    path = files.join(output, name)
    with files.open_atomic(path) as handle, PartWriter(handle, SCORE_SCHEMA) as writer:
        table = shards.rejected()
        rows = table.to_pylist()
        for row in sorted(rows, key=lambda row: (row["split"], row["sample_id"])):
            if selection.splits and row["split"] not in selection.splits:
                continue
            if selection.categories and row["category"] not in selection.categories:
                continue
            writer.write({**row, "model": ""})
            statuses[row["status"]] += 1
    return {
        "name": name,
        "rows": sum(statuses.values()),
        "statuses": dict(statuses),
        "sha256": files.sha256_file(path),
    }


def check_unscored(scores: ScoreSet, most: float) -> None:
    """Raise DataError if more than a share of the samples has no score."""
    statuses = scores.manifest["statuses"]
    total = sum(statuses.values())
    without = total - statuses.get("ok", 0)
    if without > most * total:
        reasons = ", ".join(f"{count} {status}" for status, count in statuses.items() if status != "ok")
        raise DataError(
            f"{without} of {total} samples have no score ({reasons}), more than --max-reject-fraction {most:g} allows; "
            f"all others are scored in {scores.uri}"
        )
