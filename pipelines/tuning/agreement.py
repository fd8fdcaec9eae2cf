"""How well the validation images of a campaign ranked its settings, measured on the labelled test split.

It runs when all is chosen and changes nothing of the choice: it is about the images that settings were compared on, and
whether to trust them next time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.options import RuntimeOptions
from pipelines.runtime.progress import Progress
from pipelines.runtime.tasks import run_unfinished
from pipelines.tuning.objective import score_settings
from pipelines.tuning.rank_correlation import rank_correlation
from pipelines.tuning.records import read_record
from pipelines.tuning.space import key_of
from pipelines.tuning.statuses import DONE
from pipelines.tuning.trial import Campaign
from unianom import files
from unianom.data.shards import Selection
from unianom.errors import DataError
from unianom.execution import Execution

DIAGNOSIS = "diagnosis.json"
"""File of the diagnosis."""


@dataclass(frozen=True)
class Agreement:
    """Objectives of the settings of a campaign on its validation images and on the test split.

    Attributes:
        validation, test: of each setting; NaN where there is none.
        default, chosen: which are these settings; None where they are not among them.
        names: of the settings' trials.
    """

    validation: list[float]
    test: list[float]
    default: int | None
    chosen: int | None
    names: list[str]


def diagnose(
    campaign: Campaign,
    content: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    folder: str,
    runtime: RuntimeOptions,
) -> tuple[dict[str, Any], Agreement]:
    """Measure every setting of every trial that came to its end on the test split.

    Args:
        campaign, content, settings: the campaign, what its JSON file says, and all its settings.
        folder: for what is computed.
        runtime: of the job.

    Returns:
        What the JSON file of the diagnosis says of a campaign (rank correlations of all settings, of the trials, and of
        each kind of validation images, and what the default and the chosen setting reach on the test split); and the
        objectives that it is from.

    Raises:
        DataError: no labelled test split, or trained models were not kept.
    """
    tested = _test_settings(campaign, folder, runtime)
    validation = [np.nan if setting["objective"] is None else setting["objective"] for setting in settings]
    test = [tested.get((setting["trial"], setting["reading"]), np.nan) for setting in settings]
    default, chosen = (_place(content[word], settings) for word in ("default", "best"))
    agreement = Agreement(validation, test, default, chosen, [setting["trial"] for setting in settings])
    return _correlations(agreement, settings), agreement


ABOUT = (
    "Measured on the labelled test split when all was chosen, to judge the validation images, not to choose by. The "
    "best on the test split is what nobody can know beforehand."
)


def _test_settings(campaign: Campaign, folder: str, runtime: RuntimeOptions) -> dict[tuple[str, str], float]:
    """Return the objective of every setting on the test split, by trial and values of the postprocess options."""
    records = []
    for trial in files.list_names(files.join(campaign.folder, "trials")):
        record = read_record(files.join(campaign.folder, "trials", trial))
        if record is not None and record["status"] == DONE:
            records.append(record)
    tests = {record["trial"]: (record["values"], campaign.tests(record["values"], folder)) for record in records}
    arguments = {"campaign": campaign, "tests": tests, "folder": folder, "execution": runtime.execution}
    tasks = {record["trial"]: {"trial": record["trial"]} for record in records}
    runtime = dataclasses.replace(runtime, workers=None)
    progress = Progress("diagnose", len(tasks), "trials")
    images = len(tasks) * campaign.shards.count(Selection(("test",), tuple(campaign.categories)))
    found, _ = run_unfinished(Diagnoser, arguments, tasks, folder, runtime, progress, images)
    return {
        (trial, key): value
        for trial, record in found.items()
        for key, value in zip(record["keys"], record["objectives"], strict=True)
        if value is not None
    }


class Diagnoser:
    """Measures all settings of a trial on the test split. A `PartTask`."""

    def __init__(
        self, campaign: Campaign, tests: dict[str, tuple[dict[str, Any], Any]], folder: str, execution: Execution
    ) -> None:
        self._campaign, self._tests, self._folder, self._execution = campaign, tests, folder, execution

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Measure one trial and commit what came of it."""
        campaign = self._campaign
        own, tests = self._tests[task["trial"]]
        fitted = campaign.find_in_tests(own, tests, self._execution)
        validation_set = ValidationSet(fitted.validation_set, campaign.validation.pixel_stride)
        objective = available(campaign.objective, validation_set)
        config = campaign.config_of(own)
        found = score_settings(
            fitted.postprocessor, fitted.raw_outputs, config, campaign.settings, validation_set, objective
        )
        values = [None if one.measured is None else one.measured.objective for one in found]
        keys = [key_of(one.values) for one in found]
        record = {"name": task["trial"], "keys": keys, "objectives": values, "metrics": sorted(objective)}
        outputs.commit_part(self._folder, task["trial"], record)
        return {"name": task["trial"]}


def available(objective: Mapping[str, float], validation_set: ValidationSet) -> dict[str, float]:
    """Return the part of an objective that these images can measure: pixel metrics need masks.

    Raises:
        DataError: nothing is left of it.
    """
    left = {name: weight for name, weight in objective.items() if validation_set.tells_pixels or "pixel" not in name}
    if not left:
        raise DataError("the test split has no masks, so an objective of pixel metrics cannot be diagnosed")
    return left


def _correlations(agreement: Agreement, settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    validation, test = agreement.validation, agreement.test
    trials: dict[str, int] = {}
    for number, setting in enumerate(settings):
        best = trials.get(setting["trial"])
        if setting["objective"] is not None and (best is None or setting["objective"] > settings[best]["objective"]):
            trials[setting["trial"]] = number
    kinds = list(dict.fromkeys(kind for setting in settings for kind in setting["by_recipe"]))
    return {
        "settings": rank_correlation(validation, test),
        "trials": rank_correlation([validation[n] for n in trials.values()], [test[n] for n in trials.values()]),
        "by_kind": {
            kind: rank_correlation([setting["by_recipe"].get(kind, np.nan) for setting in settings], test)
            for kind in kinds
        },
        "test": {
            "default": None if agreement.default is None else test[agreement.default],
            "chosen": None if agreement.chosen is None else test[agreement.chosen],
            "median": float(np.nanmedian(test)),
            "best_on_test": float(np.nanmax(test)),
        },
    }


def _place(wanted: Mapping[str, Any] | None, settings: Sequence[Mapping[str, Any]]) -> int | None:
    if wanted is None:
        return None
    key = key_of(wanted["values"])
    same = (n for n, s in enumerate(settings) if s["trial"] == wanted["trial"] and key_of(s["values"]) == key)
    return next(same, None)
