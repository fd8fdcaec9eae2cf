"""Files of a trial: its values, what it reports while it trains, all settings it was finished with, and its record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.training.validation import PROGRESS
from pipelines.tuning.objective import ScoredSetting
from pipelines.tuning.space import key_of
from pipelines.tuning.statuses import CRASHED
from unianom import files
from unianom.options import to_plain

RECORD, PLAN, REPORTS, SETTINGS = "record.json", "values.json", "reports.json", "settings.parquet"
"""Files of a trial: what came of it; its values, written first; what it reported while it trained; all settings of its
postprocess options."""

SCORES, MAPS = "scores.npy", "maps.npy"
BEST, GIVEN = "best", "given"
"""Scores and thinned maps of the validation images are kept by the best setting of every trial, and of the trial with
the options as given also by these."""

LATENCY, MEMORY = "latency_ms", "memory_mb"


def trial_id(values: Mapping[str, Any]) -> str:
    """Return the name of the trial with these values."""
    return files.sha256_of(key_of(values).encode())[:10]


def begin_trial(folder: str, values: Mapping[str, Any]) -> None:
    """Write the values of a trial and the time, unless it was begun before."""
    if not files.exists(files.join(folder, PLAN)):
        files.write_json(files.join(folder, PLAN), {"values": to_plain(dict(values)), "begun": time.time()})


def read_record(folder: str) -> dict[str, Any] | None:
    """Return what came of a trial; None if it has not ended, or crashed."""
    path = files.join(folder, RECORD)
    if not files.exists(path):
        return None
    record = files.read_json(path)
    return None if record["status"] == CRASHED else record


def write_early_end(
    folder: str,
    values: Mapping[str, Any],
    status: str,
    error: str | None = None,
    reported: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write and return the record of a trial that did not come to its end; `reported` are reports that reached Tune."""
    begin_trial(folder, values)  # its process may have died before that
    kept = {report[PROGRESS]: dict(report) for report in [*reported, *read_reports(folder)]}
    reports = [kept[progress] for progress in sorted(kept)]
    record = {
        "trial": trial_id(values),
        "status": status,
        "error": error,
        "values": to_plain(dict(values)),
        "reports": reports,
        "objective": None,
        "seconds": seconds_since(folder),
        LATENCY: None,
        MEMORY: None,
        "best": None,
        "default": None,
    }
    files.write_json(files.join(folder, RECORD), record)
    return record


def read_reports(folder: str) -> list[dict[str, Any]]:
    """Return what a trial has reported so far."""
    path = files.join(folder, REPORTS)
    return files.read_json(path) if files.exists(path) else []


def seconds_since(folder: str) -> float:
    """Return the seconds since a trial was begun."""
    path = files.join(folder, PLAN)
    return time.time() - files.read_json(path)["begun"] if files.exists(path) else 0.0


def write_settings(folder: str, scored: Sequence[ScoredSetting]) -> None:
    """Write all settings of a trial as a table; values and metrics are JSON text, since columns differ by method."""
    rows = []
    for setting in scored:
        measured = setting.measured
        rows.append(
            {
                "values": key_of(setting.values),
                "objective": None if measured is None else measured.objective,
                "measured": None if measured is None else files.json_bytes(to_plain(measured)).decode(),
            }
        )
    schema = pa.schema([("values", pa.string()), ("objective", pa.float64()), ("measured", pa.string())])
    with files.open_atomic(files.join(folder, SETTINGS)) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema), handle, compression="zstd")


def read_settings_table(folder: str) -> list[dict[str, Any]]:
    """Return the rows that `write_settings` wrote."""
    data = files.read_bytes(files.join(folder, SETTINGS))
    return pq.read_table(pa.BufferReader(data)).to_pylist()
