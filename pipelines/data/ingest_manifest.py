"""The manifest of a shard set: what was written, and what a person should know of it."""

from __future__ import annotations

from typing import Any

from pipelines.data.ingest_findings import SetFindings
from pipelines.data.ingest_plan import part_name
from pipelines.runtime import outputs
from unianom import __version__, files
from unianom.data.layouts import LeftOut
from unianom.data.shards import ShardSet, write_rejected
from unianom.errors import DataError
from unianom.temporary_database import temporary_database


def commit(
    output: str, digest: str, told: dict[str, Any], parts: int, left_out: LeftOut, made: type[ShardSet] = ShardSet
) -> None:
    """Write the rejected rows and the manifest of a folder whose parts are all there.

    Args:
        output: the folder.
        digest: of the plan by which the parts were written.
        told: what else the manifest tells of the plan.
        parts: how many there are.
        left_out: what was seen and is no sample.
        made: which kind of shard set it is.

    Raises:
        DataError: a part is missing, or not one sample could be read.
    """
    with temporary_database() as database:
        findings = SetFindings(database)
        entries = []
        for number in range(parts):
            record = outputs.part_record(output, part_name(number))
            if record is None or record["plan"] != digest:
                raise DataError(f"{output}/{part_name(number)} was not written; run the same command again")
            findings.add_record(record)
            entries.append({key: record[key] for key in ("name", "rows", "sha256")})
        write_rejected(output, findings.rejected())
        draft = made(output, {"files": entries}, "")
        for part in draft.parts:
            for batch in draft.read(part, columns=findings.columns, rows=4096):
                findings.add_rows(batch)
        if not findings.count:
            raise DataError(
                f"not one of {sum(findings.statuses().values())} samples could be read; the reasons are in "
                f"{output}/_rejected.parquet"
            )
        manifest = {
            "kind": made.kind,
            "schema_version": made.version,
            "tool_version": __version__,
            "plan_digest": digest,
            **told,
            "counts": findings.counts(),
            "bytes": sum(_size(output, entry["name"]) for entry in entries),
            "rejected": findings.statuses(),
            "summary": findings.summary(left_out),
            "files": entries,
        }
    outputs.finish(output, manifest)


def _size(output: str, name: str) -> int:
    fs, path = files.resolve(files.join(output, name))
    return int(fs.size(path))


def check_rejected(shards: ShardSet, most: float) -> None:
    """Raise a DataError if a larger share than `most` of the samples was rejected."""
    rejected = sum(shards.manifest["rejected"].values())
    total = rejected + sum(row["count"] for row in shards.manifest["counts"])
    if rejected > most * total:
        reasons = ", ".join(f"{count} {status}" for status, count in shards.manifest["rejected"].items())
        raise DataError(
            f"{rejected} of {total} samples were rejected ({reasons}), more than --max-reject-fraction {most:g} "
            f"allows; all others were taken, the reasons are in {shards.uri}/_rejected.parquet"
        )
