"""One trial of a campaign: fit a method by some values of its options, then search its reading options.

A trial is what its values say and nothing else: it lies in a folder named by them, and whoever finds its record there
need not run it. So a campaign that died goes on by being started again: trials with a record tell what they once told.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.train import UserCallback

from pipelines.data.options import ValidationOptions
from pipelines.data.splits import TrainValSplit
from pipelines.data.validation_set import ValidationSet, build_tests, build_validation_set
from pipelines.runtime.errors import reason, user_error
from pipelines.training.options import WORK
from pipelines.training.ray_training import WorkersLostError
from pipelines.training.validation import PROGRESS
from pipelines.tuning.objective import OBJECTIVE, Postprocessor, ScoredSetting, best_of, read, score_settings
from pipelines.tuning.space import key_of
from unianom import files
from unianom.data.shards import ShardSet
from unianom.errors import MachineError, UnianomError, WeightsError
from unianom.methods import METHODS, Method
from unianom.options import from_plain, to_plain, with_values

DONE, STOPPED, FAILED, CRASHED = "done", "stopped", "failed", "crashed"
"""How a trial ended: to its end; early, being worse than others; by a fault of its own values; by one of the machines
it ran on, so that it is tried again when the campaign is resumed."""

CARRIED = "carried"
"""How a part of a trial of population-based training ended that others go on from."""

RECORD, PLAN, REPORTS, SETTINGS = "record.json", "values.json", "reports.json", "settings.parquet"
"""Files of a trial: what came of it; its values, written first; what it reported while it trained; all settings of its
reading options."""

SCORES, MAPS = "scores.npy", "maps.npy"
BEST, GIVEN = "best", "given"
"""Scores and thinned maps of the validation images are kept by the best setting of every trial, and of the trial with
the options as given also by these."""

LATENCY, MEMORY = "latency_ms", "memory_mb"


@dataclass(frozen=True)
class Campaign:
    """What all trials of a campaign share; its kinds say how a trial is fitted.

    Attributes:
        name, config: the method, and its options as plain data where a trial says nothing.
        options: of fitting it.
        shards, categories: the corpus.
        chosen: which images are learned from, and which held out.
        settings: values of the reading options that every trial is finished with; the first has those of `config`.
        validation, objective: what trials are compared on, and by.
        folder: of the campaign.
        keep_models: whether trained models stay, for a diagnosis.
    """

    name: str
    config: dict[str, Any]
    options: Any
    shards: ShardSet
    categories: list[str]
    chosen: TrainValSplit
    settings: list[dict[str, Any]]
    validation: ValidationOptions
    objective: dict[str, float]
    folder: str
    keep_models: bool

    @property
    def config_class(self) -> type:
        """Whose options are searched."""
        return METHODS[self.name].Config

    def config_of(self, values: Mapping[str, Any]) -> Any:
        """The options of a trial."""
        return with_values(from_plain(self.config_class, self.config), values)

    def fit_options(self, values: Mapping[str, Any]) -> Any:
        """The options of fitting a trial."""
        return self.options

    def shown_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a trial in tables and figures."""
        return dict(values)

    def trial_folder(self, values: Mapping[str, Any]) -> str:
        """Where a trial lies."""
        return files.join(self.folder, "trials", trial_id(values))

    def validation_set_of(self, method: Method) -> str:
        """URI of the validation images as input of a method."""
        return build_validation_set(
            self.shards,
            self.categories,
            self.chosen.held_out,
            method.input,
            self.validation,
            self.options.limits,
            files.join(self.folder, "validation"),
        )

    def tests_for(self, method: Method, folder: str) -> str:
        """URI of the test split as input of a method, for a diagnosis."""
        images = files.join(folder, "images")
        return build_tests(self.shards, self.categories, method.input, self.options.limits, images)

    def run(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> dict[str, Any]:
        """Run a trial in its folder; its record, written."""
        return finish_trial(self, values, folder, self.fit(values, folder, context))

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        """Fit a trial in its folder and find what it sees in the validation images."""
        raise NotImplementedError

    def tests(self, values: Mapping[str, Any], folder: str) -> Any:
        """Prepare what `find_in_tests` takes, in the driver; for a diagnosis, in its folder.

        Raises:
            DataError: there is no labelled test split, or what is needed of the trial was not kept.
        """
        raise NotImplementedError

    def find_in_tests(self, values: Mapping[str, Any], tests: Any, device: str) -> FittedTrial:
        """Find what a trial sees in the test split."""
        raise NotImplementedError


class FittedTrial(NamedTuple):
    """A fitted trial, on the CPU, and what it finds in the images at a URI.

    Attributes:
        reader: the method, or what reads like one.
        raw_outputs: N×… by name.
        validation_set: URI of the N images.
        latency_ms, memory_mb: of a prediction of one image, and of weights and bank.
    """

    postprocessor: Postprocessor
    raw_outputs: dict[str, torch.Tensor]
    validation_set: str
    latency_ms: float
    memory_mb: float


@dataclass(frozen=True)
class TrialContext:
    """What a trial has of Tune and Ray Train while it is fitted.

    Attributes:
        callbacks: makes what Ray Train calls with the reports of its workers.
        exclusive: entered while images are prepared that other trials need, too.
    """

    callbacks: Callable[[], Sequence[UserCallback]] = tuple
    exclusive: Callable[[], AbstractContextManager[None]] = nullcontext


def trial_id(values: Mapping[str, Any]) -> str:
    """Name of the trial with these values."""
    return files.sha256_of(key_of(values).encode())[:10]


def read_record(folder: str) -> dict[str, Any] | None:
    """What came of a trial; None if it has not ended, or crashed."""
    path = files.join(folder, RECORD)
    if not files.exists(path):
        return None
    record = files.read_json(path)
    return None if record["status"] == CRASHED else record


def write_end(
    folder: str,
    values: Mapping[str, Any],
    status: str,
    error: str | None = None,
    told: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the record of a trial that did not come to its end; `told` are reports that reached Tune."""
    kept = {report[PROGRESS]: dict(report) for report in [*told, *read_reports(folder)]}
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
    """What a trial has reported so far."""
    path = files.join(folder, REPORTS)
    return files.read_json(path) if files.exists(path) else []


def seconds_since(folder: str) -> float:
    """Since a trial was begun."""
    path = files.join(folder, PLAN)
    return time.time() - files.read_json(path)["begun"] if files.exists(path) else 0.0


class PreparationLock:
    """Who may prepare what trials share, so that no two write it at a time. A Ray actor."""

    def __init__(self) -> None:
        self._holder: str | None = None
        self._seen = 0.0

    def take(self, name: str) -> bool:
        """Whether it is this one's turn, who is to ask again every few seconds, or it passes on."""
        now = time.monotonic()
        if self._holder not in (None, name) and now - self._seen < PATIENCE:
            return False
        self._holder, self._seen = name, now
        return True

    def leave(self, name: str) -> None:
        """It is not any more."""
        if self._holder == name:
            self._holder = None


PATIENCE = 20.0
"""Seconds after which the turn of a trial passes on that does not ask again: its process died."""


@contextmanager
def hold_lock(turn: Any) -> Iterator[None]:
    """Wait for a turn, a handle to the actor `PreparationLock`, and keep it for the length of the block."""
    name = f"{os.getpid()}-{uuid.uuid4().hex}"
    while not ray.get(turn.take.remote(name)):
        time.sleep(0.5)
    ended = threading.Event()

    def ask_again() -> None:
        while not ended.wait(PATIENCE / 5):
            ray.get(turn.take.remote(name))

    asking = threading.Thread(target=ask_again, daemon=True)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        asking.join()
        ray.get(turn.leave.remote(name))


def _is_of_the_machine(error: BaseException) -> bool:
    """Whether Ray lost something, and not what ran on it failed."""
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError)


# ---------------------------------------------------------------------------------------------------------- inside Tune
def run_trial(
    campaign: Campaign,
    values: Mapping[str, Any],
    report: Callable[[dict[str, Any]], None],
    context: TrialContext | None = None,
) -> dict[str, Any]:
    """Run a trial, or tell again what came of it.

    Args:
        campaign: what it belongs to.
        values: of its options, by name.
        report: told the objective at the end, and before it what the trial told when it ran before.
        context: what it has of Tune and Ray Train; None for nothing.

    Returns:
        Its record.

    Raises:
        UnianomError: it failed, now or before; its record says why.
    """
    folder = campaign.trial_folder(values)
    record = read_record(folder)
    if record is None:
        if not files.exists(files.join(folder, PLAN)):
            files.write_json(files.join(folder, PLAN), {"values": to_plain(dict(values)), "begun": time.time()})
        for told in read_reports(folder):
            report(told)
        try:
            record = campaign.run(values, folder, context or TrialContext())
        except Exception as error:
            known = user_error(error)
            # a full disk, a lost connection and missing weights are no fault of the values, either
            ours = isinstance(known, MachineError | WorkersLostError | WeightsError) or isinstance(error, OSError)
            if ours or (known is None and _is_of_the_machine(error)):
                # also what a trial sees of being stopped, which the driver then records
                write_end(folder, values, CRASHED, str(known or reason(error)))
                raise
            why = str(known) if known is not None else reason(error)
            write_end(folder, values, FAILED, why)
            raise
    else:
        for told in record["reports"]:
            report(told)
        if record["status"] == FAILED or not (record["reports"] or record["status"] == DONE):
            raise UnianomError(record["error"] or "it was stopped before it told anything")
    if record["status"] == DONE:
        report({OBJECTIVE: record["objective"], PROGRESS: 100, LATENCY: record[LATENCY], MEMORY: record[MEMORY]})
    return record


def finish_trial(campaign: Campaign, values: Mapping[str, Any], folder: str, fitted: FittedTrial) -> dict[str, Any]:
    """Search the reading options of a fitted trial, and write its record."""
    config = campaign.config_of(values)
    validation_set = ValidationSet(fitted.validation_set, campaign.validation.pixel_stride)
    found = score_settings(
        fitted.postprocessor, fitted.raw_outputs, config, campaign.settings, validation_set, campaign.objective
    )
    best = best_of(found)
    _write_settings(folder, found)
    kept = {BEST: best.values, **({GIVEN: found[0].values} if config == campaign.config_of({}) else {})}
    for name, reading in kept.items():
        (scores,), maps = read(fitted.postprocessor, fitted.raw_outputs, [with_values(config, reading)], validation_set)
        files.write_array(files.join(folder, f"{name}-{SCORES}"), scores)
        files.write_array(files.join(folder, f"{name}-{MAPS}"), maps)
    assert best.measured is not None
    record = {
        "trial": trial_id(values),
        "status": DONE,
        "error": None,
        "values": to_plain(dict(values)),
        "reports": read_reports(folder),
        "objective": best.measured.objective,
        "seconds": seconds_since(folder),
        LATENCY: fitted.latency_ms,
        MEMORY: fitted.memory_mb,
        "best": _plain_reading(best),
        "default": _plain_reading(found[0]),
        "proxy": fitted.validation_set,
    }
    files.write_json(files.join(folder, RECORD), record)
    if not campaign.keep_models:
        files.remove(files.join(folder, WORK))
    files.remove(files.join(folder, "readings"))
    return record


def _plain_reading(reading: ScoredSetting) -> dict[str, Any] | None:
    if reading.measured is None:
        return None
    return {"values": to_plain(reading.values), **to_plain(reading.measured)}


def _write_settings(folder: str, found: Sequence[ScoredSetting]) -> None:
    """All settings as a table; values and verdicts are JSON text, since columns differ by method."""
    rows = []
    for reading in found:
        measured = reading.measured
        rows.append(
            {
                "values": key_of(reading.values),
                "objective": None if measured is None else measured.objective,
                "measured": None if measured is None else files.json_bytes(to_plain(measured)).decode(),
            }
        )
    schema = pa.schema([("values", pa.string()), ("objective", pa.float64()), ("measured", pa.string())])
    with files.open_atomic(files.join(folder, SETTINGS)) as handle:
        pq.write_table(pa.Table.from_pylist(rows, schema), handle, compression="zstd")
