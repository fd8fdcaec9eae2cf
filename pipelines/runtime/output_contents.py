"""What lies in an output folder, and which job wrote it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.runtime.locks import Holder
from pipelines.runtime.output_kinds import KINDS, LOCK, PLAN
from unianom import files


def foreign_names(output: str) -> list[str]:
    """Return what lies in a folder, besides the files of this module."""
    names = []
    for name in files.list_names(output):
        if name == PLAN or (files.is_half_written(name) and name.startswith(PLAN)):
            continue
        if name == LOCK:
            content = b""
            with suppress(FileNotFoundError):  # its holder just removed it
                content = files.read_bytes(files.join(output, LOCK))
            if not content or Holder.parse(content) is not None:
                continue
        names.append(name)
    return names


def look(output: str, names: Sequence[str]) -> tuple[str | None, dict[str, Any] | None] | None:
    """Return which kind of output lies in a folder, and its plan; None if no job wrote it.

    The kind is None where the plan's job is not known, and the plan where an earlier version kept none.
    """
    path = files.join(output, PLAN)
    if files.exists(path):
        try:
            content = files.read_json(path)
            plan, kind = content["plan"], content.get("job")
            if content["digest"] != files.digest_of(plan):
                return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if kind is None:  # an earlier version did not write down the job
            kind = next((name for name, known in KINDS.items() if known.keys and known.keys <= plan.keys()), None)
        return (kind if kind in KINDS else None), plan
    for kind, known in KINDS.items():
        if known.unplanned and any(re.fullmatch(known.unplanned[0], name) for name in names):
            if all(any(re.fullmatch(pattern, name) for pattern in known.unplanned) for name in names):
                return kind, None
            return None
    for name in names:
        if name == "models.json":
            continue
        inner = files.join(output, name)
        found = look(inner, ()) if files.exists(files.join(inner, PLAN)) else None
        if found is None or found[0] not in ("model", "calibrated model"):
            return None
        kind = f"{found[0]}s"
    return (kind, None) if names and any(name != "models.json" for name in names) else None


def is_bare_claim(output: str, models: bool = False) -> bool:
    """Return whether a folder that a job claimed holds nothing but the claim.

    Args:
        output: the folder.
        models: whether claims of single models, in folders below it, count as nothing, too.
    """
    for name in files.list_files(output):
        *folders, last = name.split("/")
        planned = last == PLAN or (files.is_half_written(last) and last.startswith(PLAN))
        if len(folders) > models or not (planned or last == LOCK):
            return False
    return True


def described(output: str, kind: str | None) -> str:
    if kind is None:
        return "the output of another version of this software"
    known = KINDS[kind]
    done = known.done is None or files.exists(files.join(output, known.done))
    return f"{known.words} of jobs/{known.job}.py" + ("" if done else ", unfinished")


def on_the_way(folder: str) -> str | None:
    """Return which file, or link that leads nowhere, lies where a folder is to be made or above it, in words."""
    if not files.is_local(folder):
        return f"{folder} is a file" if files.is_file(folder) else None
    path = Path(files.full_uri(folder))
    nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if nearest.is_dir():
        return None
    return leads_nowhere(nearest) or f"{nearest} is a file"


def leads_nowhere(path: Path) -> str | None:
    """Say where a link leads if nothing is there."""
    if not path.is_symlink() or path.exists():
        return None
    return f"{path} is a link to {path.readlink()}, which is not there"


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
