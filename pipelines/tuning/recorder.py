"""Records of trials while Ray Tune runs them: how they ended, MLflow, the line on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import ray
from ray import tune
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from pipelines.data.options import METRICS
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.run_record import Run
from pipelines.runtime.tracking import track
from pipelines.training.validation import PROGRESS, WORKERS
from pipelines.tuning.budget import SPENT, Budget
from pipelines.tuning.objective import OBJECTIVE
from pipelines.tuning.ray_tune import TrialValues
from pipelines.tuning.records import LATENCY, MEMORY, RECORD, read_record, write_early_end
from pipelines.tuning.statuses import CRASHED, DONE, STOPPED
from pipelines.tuning.trial import Campaign
from unianom import files
from unianom.options import to_plain

REPORTED = (OBJECTIVE, *METRICS, LATENCY, MEMORY)
"""Reports of a trial that MLflow gets."""


class Recorder(tune.Callback):
    """Records how trials end that cannot do so themselves, and shows all to MLflow and the terminal.

    Args:
        campaign, values: to know a trial by its config.
        tracking, store, run: where MLflow records the job, the folder of its store by default, and its run.
        budget: trials that it stops are not stopped for good.
        progress: of the terminal.
        best: objective so far; None for none.
    """

    def __init__(
        self,
        campaign: Campaign,
        values: TrialValues,
        tracking: TrackingOptions,
        store: str,
        run: Run,
        budget: Budget,
        progress: Progress,
        best: float | None = None,
    ) -> None:
        self._campaign, self._values, self._budget, self._progress = campaign, values, budget, progress
        self._tracking, self._store, self._run = tracking, store, run
        self._open: dict[str, tuple[ExitStack, Run]] = {}
        self._reported: dict[str, list[dict[str, Any]]] = {}
        self._workers: dict[str, str] = {}
        self._ended: dict[str, int] = {}
        self._best = -math.inf if best is None else best

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and never reads them again here

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """End the MLflow runs of trials that were cut short; the same command goes on with them."""
        for stack, _run in self._open.values():
            stack.close()

    def _track(self, values: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """Open the MLflow run of a trial."""
        return track(
            self._tracking,
            "trial",
            self._campaign.trial_folder(values),
            to_plain(dict(values)),
            default_folder=self._store,
            parent=self._run,
        )

    def record_again(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Record trials in MLflow that ended before, for their driver may have died in between."""
        for record in records if self._run.uri is not None else ():
            with self._track(record["values"]) as own:
                _record_end(own, record)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        stack = ExitStack()
        self._open[trial.trial_id] = (stack, stack.enter_context(self._track(self._values.of(trial.config))))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if PROGRESS not in result:
            return
        self._workers[trial.trial_id] = result.get(WORKERS, "")
        kept = {name: value for name, value in result.items() if name in REPORTED}
        self._reported.setdefault(trial.trial_id, []).append({PROGRESS: result[PROGRESS], **kept})
        self._open[trial.trial_id][1].metrics(kept, result[PROGRESS])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = self._values.of(trial.config)
        folder = self._campaign.trial_folder(values)
        record = read_record(folder)
        if record is None and not self._budget.stop_all():
            record = write_early_end(folder, values, STOPPED, reported=self._reported.get(trial.trial_id, []))
        self._end(trial, record)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        values = self._values.of(trial.config)
        folder = self._campaign.trial_folder(values)
        record = read_record(folder)
        if record is None:
            path = files.join(folder, RECORD)
            if files.exists(path):
                record = files.read_json(path)
            else:
                error = "its process died (out of memory, or its machine was lost)"
                record = write_early_end(folder, values, CRASHED, error)
        self._end(trial, record)

    def _end(self, trial: Any, record: dict[str, Any] | None) -> None:
        release(self._workers.pop(trial.trial_id, ""))
        stack, own = self._open.pop(trial.trial_id, (ExitStack(), Run()))
        if record is not None:
            _record_end(own, record)
            if record["status"] == DONE:
                self._best = max(self._best, record["objective"])
            self._ended[record["status"]] = self._ended.get(record["status"], 0) + 1
        stack.close()
        files.write_json(files.join(self._campaign.folder, SPENT), self._budget.spent())
        words = ", ".join(f"{count} {status}" for status, count in self._ended.items())
        best = "" if self._best == -math.inf else f", best {self._best:.4f}"
        self._progress.set(sum(self._ended.values()), words + best)


def _record_end(run: Run, record: Mapping[str, Any]) -> None:
    """Record in its MLflow run how a trial ended."""
    run.tags({"unianom.status": record["status"], "unianom.error": record["error"] or ""})
    if record["status"] == DONE:
        run.metrics({f"best/{name}": value for name, value in record["best"]["metrics"].items()})
        run.json("record.json", record)


def release(workers: str) -> None:
    """Give back what the workers of a training hold whose trial has ended, if they hold it still.

    Ray Train gives it back where its controller ended in good order, but that of a stopped trial is killed. What should
    notice that asks the dashboard, which need not be there, and gives up where two Rays run on a machine.
    """
    if not workers:
        return
    group = PlacementGroup(ray.PlacementGroupID.from_hex(workers))
    if placement_group_table(group).get("state") not in (None, "REMOVED"):
        remove_placement_group(group)
