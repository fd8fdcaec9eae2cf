"""How well the validation images of a campaign ranked its settings, told by the labelled test split.

It runs when all is chosen and changes nothing of the choice: it is about the images that settings were compared on, and
whether to trust them next time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.data.validation_set import ValidationSet
from pipelines.runtime import outputs
from pipelines.runtime.actors import run_unfinished
from pipelines.runtime.cli import console, print_table
from pipelines.runtime.progress import Progress
from pipelines.runtime.tracking import Run
from pipelines.tuning import figures as shown
from pipelines.tuning.objective import score_settings
from pipelines.tuning.space import key_of
from pipelines.tuning.trial import DONE, Campaign, read_record
from unianom import files, visual
from unianom.errors import DataError

DIAGNOSIS = "diagnosis.json"
"""Name of its JSON file."""


def diagnose(
    output: str,
    campaigns: Mapping[str, Campaign],
    contents: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    options: Any,
    run: Run,
) -> dict[str, Any]:
    """Measure every setting of every trial that came to its end on the test split.

    Args:
        output: of the job; results go to its folder `diagnosis`.
        campaigns, contents, settings: of the job, by name.
        options: of jobs/tune.py.
        run: the MLflow run of the job.

    Returns:
        What the JSON file says: for each campaign rank correlations of all settings, of the trials, and of each kind of
        validation images, and what the default and the chosen setting reach on the test split.

    Raises:
        DataError: no labelled test split, or trained models were not kept.
    """
    folder = files.join(output, "diagnosis")
    found = {}
    for name, campaign in campaigns.items():
        own = files.join(folder, files.safe_name(name)) if len(campaigns) > 1 else folder
        tested = _test_settings(campaign, own, options)
        found[name] = _verdict(contents[name], settings[name], tested)
        _draw(own, settings[name], tested, contents[name])
        prefix = f"diagnosis/{name}" if len(campaigns) > 1 else "diagnosis"
        run.metrics({f"{prefix}/spearman": found[name]["settings"]["spearman"]})
        run.figures({f"{prefix}.png": files.read_bytes(files.join(own, "proxy.png"))})
    told = {"about": ABOUT, "campaigns": found}
    files.write_json(files.join(folder, DIAGNOSIS), told)
    run.json(DIAGNOSIS, told)
    return told


ABOUT = (
    "Measured on the labelled test split when all was chosen, to judge the validation images, not to choose by. The "
    "best on the test split is what nobody can know beforehand."
)


def _test_settings(campaign: Campaign, folder: str, options: Any) -> dict[tuple[str, str], float]:
    """The objective of every setting on the test split, by trial and values of the reading options."""
    records = []
    for trial in files.list_names(files.join(campaign.folder, "trials")):
        record = read_record(files.join(campaign.folder, "trials", trial))
        if record is not None and record["status"] == DONE:
            records.append(record)
    tests = {record["trial"]: (record["values"], campaign.tests(record["values"], folder)) for record in records}
    arguments = {"campaign": campaign, "tests": tests, "folder": folder, "device": options.runtime.device}
    tasks = {record["trial"]: {"trial": record["trial"]} for record in records}
    runtime = dataclasses.replace(options.runtime, workers=None)
    progress = Progress("diagnose", len(tasks), "trials")
    found, _ = run_unfinished(Diagnoser, arguments, tasks, folder, runtime, progress)
    return {
        (trial, key): value
        for trial, record in found.items()
        for key, value in zip(record["keys"], record["objectives"], strict=True)
        if value is not None
    }


class Diagnoser:
    """Measures all settings of a trial on the test split. A `PartTask`."""

    def __init__(
        self, campaign: Campaign, tests: dict[str, tuple[dict[str, Any], Any]], folder: str, device: str
    ) -> None:
        self._campaign, self._tests, self._folder, self._device = campaign, tests, folder, device

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Measure one trial and commit what came of it."""
        campaign = self._campaign
        own, tests = self._tests[task["trial"]]
        fitted = campaign.find_in_tests(own, tests, self._device)
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
    """The part of an objective that these images can tell: pixel metrics need masks.

    Raises:
        DataError: nothing is left of it.
    """
    left = {name: weight for name, weight in objective.items() if validation_set.tells_pixels or "pixel" not in name}
    if not left:
        raise DataError("the test split has no masks, so an objective of pixel metrics cannot be diagnosed")
    return left


def _verdict(
    content: Mapping[str, Any],
    settings: Sequence[Mapping[str, Any]],
    tested: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    validation_set, test = _pairs(settings, tested)
    trials: dict[str, int] = {}
    for number, setting in enumerate(settings):
        best = trials.get(setting["trial"])
        if setting["objective"] is not None and (best is None or setting["objective"] > settings[best]["objective"]):
            trials[setting["trial"]] = number
    kinds = list(dict.fromkeys(kind for setting in settings for kind in setting["by_recipe"]))
    at = {word: _place(content[word], settings) for word in ("default", "best")}
    return {
        "settings": shown.rank_correlation(validation_set, test),
        "trials": shown.rank_correlation(
            [validation_set[n] for n in trials.values()], [test[n] for n in trials.values()]
        ),
        "by_kind": {
            kind: shown.rank_correlation([setting["by_recipe"].get(kind, np.nan) for setting in settings], test)
            for kind in kinds
        },
        "test": {
            "default": None if at["default"] is None else test[at["default"]],
            "chosen": None if at["best"] is None else test[at["best"]],
            "median": float(np.nanmedian(test)),
            "best_on_test": float(np.nanmax(test)),
        },
    }


def _pairs(
    settings: Sequence[Mapping[str, Any]], tested: Mapping[tuple[str, str], float]
) -> tuple[list[float], list[float]]:
    """Objectives of the settings on validation and test images, NaN where there is none."""
    validation_set = [np.nan if setting["objective"] is None else setting["objective"] for setting in settings]
    return validation_set, [tested.get((setting["trial"], setting["reading"]), np.nan) for setting in settings]


def _place(wanted: Mapping[str, Any] | None, settings: Sequence[Mapping[str, Any]]) -> int | None:
    if wanted is None:
        return None
    key = key_of(wanted["values"])
    same = (n for n, s in enumerate(settings) if s["trial"] == wanted["trial"] and key_of(s["values"]) == key)
    return next(same, None)


def _draw(
    folder: str,
    settings: Sequence[Mapping[str, Any]],
    tested: Mapping[tuple[str, str], float],
    content: Mapping[str, Any],
) -> None:
    validation_set, test = _pairs(settings, tested)
    names = [setting["trial"] for setting in settings]
    default, chosen = (_place(content[word], settings) for word in ("default", "best"))
    figure = shown.agreement_figure(validation_set, test, default, chosen, names)
    files.write_bytes(files.join(folder, "proxy.png"), visual.png(figure))


def print_diagnosis(told: Mapping[str, Any]) -> None:
    """Print how validation and test images agree."""
    rows = []
    for name, verdict in told["campaigns"].items():
        found, test = verdict["settings"], verdict["test"]
        shown_values = [test[key] for key in ("default", "chosen", "best_on_test")]
        numbers = [found["spearman"], verdict["trials"]["spearman"], *shown_values]
        rows.append([name, str(found["n"]), *("–" if value is None else f"{value:.4f}" for value in numbers)])
    columns = [
        "diagnosis on the test split",
        "settings",
        "rank correlation",
        "of trials",
        "default",
        "chosen",
        "best there",
    ]
    print_table("", columns, rows)
    console.print(told["about"])
