"""Outputs: who may write where, and folders that are written part by part and can be continued.

Every job claims its output before it writes. `_plan.json` says which job's the folder is and all that its bytes depend
on; whatever else lies there is refused, and only files of the names that the job itself writes are ever removed. A
claim under which nothing was written stands in nobody's way: a job that fails takes it back, and one that a killed job
left is taken over.

The order of writes is the invariant: a part is written beside its name and renamed, then its small JSON;
`_manifest.json`, or whatever file completes the folder, comes last. So whoever finds a part's JSON may trust the part,
and whoever finds the manifest may trust the folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.runtime.locks import exclusive
from pipelines.runtime.output_contents import (
    described,
    foreign_names,
    is_bare_claim,
    leads_nowhere,
    look,
    on_the_way,
    some,
)
from pipelines.runtime.output_kinds import KINDS, LOCK, PLAN
from unianom import files
from unianom.data.shards import MANIFEST
from unianom.errors import DataError, OptionError

MODELS = ("models", "calibrated models")
"""Kinds of outputs that hold single models, each in a folder of its own with a claim of its own."""

RECORDS_AT_ONCE = 16
"""Records of parts that are read at the same time; on object stores that is waiting."""


@contextmanager
def open_output(
    output: str,
    kind: str,
    plan: Mapping[str, Any],
    *,
    inputs: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Iterator[str]:
    """Claim an output folder for the length of the block.

    Nothing is locked or written where the same plan is complete already.

    Args:
        output: the folder; path or URI.
        kind: one of `KINDS`.
        plan: everything the output's bytes depend on, as plain data.
        inputs: folders and files that the job reads, by the option that names them.
        overwrite: whether files that an earlier run of the same job wrote there may be removed; no others ever are.

    Yields:
        The plan's digest.

    Raises:
        OptionError: the output is, contains or lies within an input.
        DataError: the folder holds another plan's output, of which something is written, and `overwrite` is not set,
            or anything else.
        BusyError: another process is at work on it.
    """
    check_output(output, kind, plan, inputs=inputs, overwrite=overwrite)
    digest = files.digest_of(plan)
    if _is_done(output, kind, digest):
        yield digest
        return
    with _folder_taken_back(output), exclusive(files.join(output, LOCK), output):
        claimed = _claim(output, kind, plan, overwrite)
        try:
            yield digest
        except BaseException:
            if claimed:
                _take_back(output)
            raise


@contextmanager
def open_cache(uri: str, kind: str, plan: Mapping[str, Any]) -> Iterator[bool]:
    """Claim a folder in which jobs keep something for each other, waiting for one that is making it.

    Args:
        uri: the folder, named by the digest of its plan.
        kind: one of `KINDS`.
        plan: everything its bytes depend on.

    Yields:
        Whether it is complete already.

    Raises:
        DataError: the folder holds anything else.
    """
    check_output(uri, kind, plan)
    if _is_done(uri, kind, files.digest_of(plan)):
        yield True
        return
    with exclusive(files.join(uri, LOCK), f"{KINDS[kind].words} in {uri}", wait=True):
        _claim(uri, kind, plan, False)
        yield is_complete(uri)


def check_output(
    output: str,
    kind: str,
    plan: Mapping[str, Any],
    *,
    inputs: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> None:
    """Refuse what `open_output` would refuse, without a claim.

    Raises:
        OptionError, DataError: see `open_output`.
    """
    check_apart(output, inputs or {})
    if blocking := on_the_way(output):
        raise DataError(f"{blocking}, where a folder is to be written; choose another output")
    names = foreign_names(output)
    if not names and not files.exists(files.join(output, PLAN)):
        return
    there = look(output, names)
    if there is None:
        raise DataError(f"{output} holds other files ({some(names)}); choose another output")
    found, before = there
    if found is not None and before is not None and is_bare_claim(output, models=found == kind in MODELS):
        return
    if found not in (kind, None) or (found is None and before is not None):
        raise DataError(f"{output} holds {described(output, found)}; choose another output")
    if before is None and kind in MODELS:
        return  # of before there was a plan of these; each of the models has one of its own
    if before is not None and files.digest_of(before) == files.digest_of(plan):
        return
    if not overwrite:
        why = "of an earlier version, which kept no plan"
        if before is not None:
            changed = sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key))
            why = f"differing in: {', '.join(changed)}"
        raise DataError(
            f"{output} holds {KINDS[kind].words} of another run ({why}); choose another output, or replace it with "
            f"--overwrite true"
        )


def _claim(output: str, kind: str, plan: Mapping[str, Any], overwrite: bool) -> bool:
    """Make the folder this plan's own; the lock is held. Return whether it was not before."""
    check_output(output, kind, plan, overwrite=overwrite)
    path = files.join(output, PLAN)
    before = files.read_json(path) if files.exists(path) else None
    digest = files.digest_of(plan)
    if before is not None and before["digest"] == digest:
        _sweep(output, kind)
        return False
    # JSON files declare the others done, so they go first; the old plan stays to the end, and with it the right
    # to remove the rest, should this process be killed
    own = [name for name in files.list_files(output) if KINDS[kind].wrote(name)]
    for name in sorted(own, key=lambda name: (not name.endswith(".json"), name)):
        files.remove_file(output, name)
    files.write_json(path, {"job": kind, "digest": digest, "plan": plan})
    return True


def _take_back(output: str) -> None:
    """Remove the claim of a job that failed, if nothing was written under it; the lock is held."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return  # a worker may be about to write a part, which belongs to this plan, though the job is ended already
    with suppress(OSError):  # the job's own error is what the user is to know
        if is_bare_claim(output):
            files.remove_file(output, PLAN)


@contextmanager
def _folder_taken_back(folder: str) -> Iterator[None]:
    """Remove a local folder that was not there before the block if that fails and leaves it empty."""
    path = Path(files.full_uri(folder)) if files.is_local(folder) else None
    made = path is not None and not os.path.lexists(path)
    try:
        yield
    except BaseException:
        if path is not None and made:
            with suppress(OSError):
                path.rmdir()
        raise


def _sweep(output: str, kind: str) -> None:
    """Remove what a killed run of this job left half-written."""
    for name in files.list_names(output):
        if files.is_half_written(name) and (KINDS[kind].wrote(name) or name.startswith(PLAN)):
            files.remove_file(output, name)


def _is_done(output: str, kind: str, digest: str) -> bool:
    done = KINDS[kind].done
    if done is None or not files.exists(files.join(output, done)):
        return False
    path = files.join(output, PLAN)
    return files.exists(path) and bool(files.read_json(path)["digest"] == digest)


def check_apart(output: str, inputs: Mapping[str, str | None]) -> None:
    """Refuse an output that is, contains or lies within an input, whatever links lead there.

    Args:
        output: path or URI.
        inputs: by the option that names them; None and places that do not exist are passed over.

    Raises:
        OptionError: it does; says how.
    """
    for option, uri in inputs.items():
        if uri is None or not files.exists(uri):
            continue
        for inner, outer, words in ((output, uri, "lies within"), (uri, output, "contains")):
            if files.lies_within(inner, outer):
                words = "is" if files.lies_within(outer, inner) else words
                raise OptionError(
                    f"the output {output} {words} the input --{option} {uri}, which would be changed by it; choose "
                    f"another output"
                )


@contextmanager
def open_file(
    output: str,
    words: str,
    digest: str,
    made_by: Callable[[bytes], str | None],
    *,
    inputs: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Iterator[bool]:
    """Claim an output that is one file for the length of the block.

    Args:
        output: the file; path or URI.
        words: what it is, in words.
        digest: of the plan it is made by.
        made_by: the digest that a file's content names; None if it is no such file.
        inputs, overwrite: see `open_output`.

    Yields:
        Whether it is there already, made by the same plan.

    Raises:
        OptionError, DataError, BusyError: see `open_output`.
    """
    check_apart(output, inputs or {})
    if _is_made(output, words, digest, made_by, overwrite):
        yield True
        return
    folder, _, name = files.full_uri(output).rpartition("/")
    if blocking := on_the_way(folder):
        raise DataError(f"{blocking}, where the folder of {output} is to be; choose another output")
    with _folder_taken_back(folder), exclusive(files.join(folder, f".{name}.lock"), output):
        yield _is_made(output, words, digest, made_by, overwrite)


def _is_made(output: str, words: str, digest: str, made_by: Callable[[bytes], str | None], overwrite: bool) -> bool:
    if files.is_local(output) and (nowhere := leads_nowhere(Path(files.full_uri(output)))):
        raise DataError(f"{nowhere}; choose another output")
    if not files.exists(output):
        return False
    if not files.is_file(output):
        what = "a folder" if files.is_folder(output) else "neither file nor folder"
        raise DataError(f"{output} is {what}, where a file is to be written; choose another output")
    before = made_by(files.read_bytes(output))
    if before is None:
        raise DataError(f"{output} is a file that is not {words}; choose another output, or move that file")
    if before != digest and not overwrite:
        raise DataError(
            f"{output} holds {words} made of something else; choose another output, or replace it with --overwrite true"
        )
    return before == digest


def is_complete(output: str) -> bool:
    """Return whether the folder's manifest is there."""
    return files.exists(files.join(output, MANIFEST))


def part_record(output: str, part: str) -> dict[str, Any] | None:
    """Return what the JSON of a committed part says; None if the part is not committed."""
    path = files.join(output, _record_name(part))
    return files.read_json(path) if files.exists(path) else None


def part_records(output: str, parts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what `part_record` does of those of many parts that are committed, by part; looks into the folder once."""
    present = set(files.list_names(output))
    committed = [part for part in parts if _record_name(part) in present]
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        records = pool.map(lambda part: files.read_json(files.join(output, _record_name(part))), committed)
        return dict(zip(committed, records, strict=True))


def commit_part(output: str, part: str, record: dict[str, Any]) -> None:
    """Declare a part, already written under its name, as done."""
    files.write_json(files.join(output, _record_name(part)), record)


def remove_record(output: str, part: str) -> None:
    """Take back what `commit_part` declared."""
    if files.exists(files.join(output, _record_name(part))):
        files.remove_file(output, _record_name(part))


def _record_name(part: str) -> str:
    # readers of Parquet folders pass over names that begin with an underscore
    return "_" + part.removesuffix(".parquet") + ".json"


def finish(output: str, manifest: dict[str, Any]) -> None:
    """Sweep what killed workers left half-written, then write the manifest: from now on the folder is complete."""
    found = look(output, ())
    if found is not None and found[0] is not None:
        _sweep(output, found[0])
    files.write_json(files.join(output, MANIFEST), manifest)
