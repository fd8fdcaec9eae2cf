"""Output folders that are written part by part and can be continued.

The order of writes is the invariant: `_plan.json` says whose folder it is; a part is written beside its name and
renamed, then its small JSON; `_manifest.json` comes last. So whoever finds a part's JSON may trust the part, and
whoever finds the manifest may trust the folder.
"""

from __future__ import annotations

from typing import Any

from unianom import files
from unianom.data.shards import MANIFEST
from unianom.errors import DataError

PLAN = "_plan.json"


def claim(output: str, plan: dict[str, Any], overwrite: bool, job: str) -> str:
    """Make an output folder this plan's own, or find that it is already.

    Args:
        output: the folder.
        plan: everything the output's bytes depend on, as plain data.
        overwrite: whether what another plan left there may be removed. Files that no plan made never are.
        job: command to name in the error.

    Returns:
        The plan's digest.

    Raises:
        DataError: the folder holds another plan's output and `overwrite` is not set, or other files.
    """
    digest = files.digest_of(plan)
    path = files.join(output, PLAN)
    names = [name for name in files.list_names(output) if not name.endswith(".tmp")]
    if PLAN in names:
        before = files.read_json(path)
        if before["digest"] == digest:
            return digest
        if not overwrite:
            changed = sorted(key for key in {*plan, *before["plan"]} if plan.get(key) != before["plan"].get(key))
            raise DataError(
                f"{output} holds the output of another {job} (differing in: {', '.join(changed)}); choose another "
                f"output, or replace it with --overwrite true"
            )
        # JSON files declare the others done, so they go first; the old plan stays to the end, and with it the right
        # to remove the rest, should this process be killed
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            if name != PLAN:
                files.remove(files.join(output, name))
    elif names:
        raise DataError(f"{output} holds other files ({', '.join(names[:3])}); choose another output, or empty it")
    files.write_json(path, {"digest": digest, "plan": plan})
    return digest


def is_complete(output: str) -> bool:
    """Whether the folder's manifest is there."""
    return files.exists(files.join(output, MANIFEST))


def part_record(output: str, part: str) -> dict[str, Any] | None:
    """What the JSON of a committed part says; None if the part is not committed."""
    path = files.join(output, _record_name(part))
    return files.read_json(path) if files.exists(path) else None


def commit_part(output: str, part: str, record: dict[str, Any]) -> None:
    """Declare a part, already written under its name, as done."""
    files.write_json(files.join(output, _record_name(part)), record)


def _record_name(part: str) -> str:
    # readers of Parquet folders pass over names that begin with an underscore
    return "_" + part.removesuffix(".parquet") + ".json"


def finish(output: str, manifest: dict[str, Any]) -> None:
    """Sweep what a killed run left half-written, then write the manifest: from now on the folder is complete."""
    for name in files.list_names(output):
        if name.endswith(".tmp"):
            files.remove(files.join(output, name))
    files.write_json(files.join(output, MANIFEST), manifest)
