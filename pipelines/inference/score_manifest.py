"""The end of a scoring: rejected samples among the scores, the check that none is missing, and the manifest."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipelines.runtime import outputs
from unianom import __version__, files
from unianom.data.schema import SCORE_SCHEMA, SCORE_VERSION
from unianom.data.shards import PartWriter, ScoreSet, Selection, ShardSet
from unianom.errors import DataError

PLANNED = ("splits", "categories", "maps", "batch_size", "device", "engine")
"""Entries of the plan that the manifest repeats; a plan without an engine is of PyTorch."""


def score_part(part: str, plan: str) -> str:
    """Return the name of the score part of a shard part: it tells the plan, so parts of two plans never mix."""
    return f"{part.removesuffix('.parquet')}-{plan[:12]}.parquet"


def commit_scores(
    output: str,
    digest: str,
    shards: ShardSet,
    selection: Selection,
    models: list[dict[str, Any]],
    plan: dict[str, Any],
) -> None:
    """Check that every sample has one score, and write the manifest.

    Raises:
        DataError: a part is missing, or the shards are damaged.
    """
    records = [outputs.part_record(output, score_part(part, digest)) for part in shards.parts]
    missing = [part for part, record in zip(shards.parts, records, strict=True) if record is None]
    if missing:
        raise DataError(f"{missing[0]} was not scored; run the same command again, it continues")
    done = [record for record in records if record is not None]
    rejected = _write_rejected(output, digest, shards, selection)
    entries = [{key: record[key] for key in ("name", "rows", "sha256")} for record in [*done, rejected]]
    draft = ScoreSet(output, {"files": entries}, "")
    ids = draft.table(columns=["sample_id"])["sample_id"]
    expected = shards.count(selection) + rejected["rows"]
    if len(ids) != expected or len(ids.unique()) != expected:
        twice = [entry["values"] for entry in ids.value_counts().to_pylist() if entry["counts"] > 1]
        raise DataError(
            f"the shards {shards.uri} are damaged: their parts and rejected samples make {len(ids)} scores"
            f"{f', two of them of {twice[0]}' if twice else ''}, their manifest counts {expected}; copy them again, or "
            f"run jobs/ingest.py again"
        )
    statuses: Counter[str] = Counter()
    for record in [*done, rejected]:
        statuses.update(record["statuses"])
    counts = [
        row
        for row in shards.manifest["counts"]
        if (not selection.splits or row["split"] in selection.splits)
        and (not selection.categories or row["category"] in selection.categories)
    ]
    manifest: dict[str, Any] = {
        "kind": ScoreSet.kind,
        "schema_version": SCORE_VERSION,
        "tool_version": __version__,
        "plan_digest": digest,
        "shards": {"digest": shards.digest},
        "models": models,
        **{key: plan[key] for key in PLANNED if key in plan},
        "counts": counts,
        "statuses": dict(sorted(statuses.items())),
        "files": entries,
    }
    outputs.finish(output, manifest)


def _write_rejected(output: str, digest: str, shards: ShardSet, selection: Selection) -> dict[str, Any]:
    """Write the samples that ingest had to reject as scores too, so that no sample is ever silently absent."""
    name = score_part("part-rejected.parquet", digest)
    statuses: Counter[str] = Counter()
    path = files.join(output, name)
    with files.open_atomic(path) as handle:
        writer = PartWriter(handle, SCORE_SCHEMA)
        table = shards.rejected()
        rows = table.to_pylist()
        for row in sorted(rows, key=lambda row: (row["split"], row["sample_id"])):
            if selection.splits and row["split"] not in selection.splits:
                continue
            if selection.categories and row["category"] not in selection.categories:
                continue
            writer.write({**row, "model": ""})
            statuses[row["status"]] += 1
        writer.close()
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
