"""Population-based training: who follows whom, how options change, and that a recipe trains a member again."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.data.options import ValidationOptions
from pipelines.runtime.cli import parse
from pipelines.training import driver as module
from pipelines.training import worker
from pipelines.training.context import LocalContext
from pipelines.training.driver import train_networks
from pipelines.training.options import Phase, ThresholdOptions, train_options
from pipelines.tuning import driver, population_driver, trained_trials
from pipelines.tuning.dimensions import Choice, Dimension, Range
from pipelines.tuning.options import PopulationOptions, tune_options
from pipelines.tuning.population import PARENT, PHASES, UNTIL, current_options, explore, first_segments, next_segments
from pipelines.tuning.recipes import RECIPE
from pipelines.tuning.records import trial_id
from pipelines.tuning.trial import run_trial
from pipelines.tuning.tune import tune
from tests.data.test_shards import write_set
from tests.methods.conftest import TINY
from tests.pipelines.conftest import ONE, UNTRACKED
from tests.pipelines.sharded import samples
from unianom.configs.training import TrainingConfig
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError, UnianomError
from unianom.model import load

SPACE = (
    Dimension("training.learning_rate", Range(1e-4, 1e-2, log=True)),
    Dimension("weight", Choice((0.1, 1.0, 10.0))),
    Dimension("fixed", Choice((1, 2))),
)
CHANGING = ("training.learning_rate", "weight")
OPTIONS = PopulationOptions(segments=4, share=0.25, resample=0.0, factor=2.0)


def members(count: int) -> list[dict[str, Any]]:
    rates = np.geomspace(2e-4, 5e-3, count)
    return [{"training.learning_rate": float(rate), "weight": 1.0, "fixed": 1 + n % 2} for n, rate in enumerate(rates)]


def test_the_worst_follow_the_best_and_the_others_themselves() -> None:
    begun = first_segments(members(8), 4)
    assert all(values[PHASES] == [] and values[UNTIL] == 0.25 and values[PARENT] is None for values in begun)
    objectives = [0.5, 0.9, 0.1, 0.6, 0.8, 0.4, 0.2, 0.3]
    following = next_segments(begun, objectives, 1, SPACE, CHANGING, OPTIONS, seed=3)
    parents = [values[PARENT] for values in following]
    names = [trial_id(values) for values in begun]
    for number in (0, 1, 3, 4, 5, 7):
        assert parents[number] == names[number]
        assert following[number] == {**begun[number], UNTIL: 0.5, PARENT: names[number]}
    best = {names[1]: begun[1], names[4]: begun[4]}
    for number in (2, 6):
        parent = best[parents[number]]
        (phase,) = following[number][PHASES]
        assert phase["start"] == 0.25
        assert set(phase["method"]) == set(CHANGING)
        assert following[number]["fixed"] == parent["fixed"]
        ratio = phase["method"]["training.learning_rate"] / parent["training.learning_rate"]
        assert min(abs(ratio - 2), abs(ratio - 0.5)) < 1e-3
        assert phase["method"]["weight"] in (0.1, 10.0)
        assert current_options(following[number]) == {
            "training.learning_rate": phase["method"]["training.learning_rate"],
            "weight": phase["method"]["weight"],
            "fixed": parent["fixed"],
        }
    again = next_segments(begun, objectives, 1, SPACE, CHANGING, OPTIONS, seed=3)
    assert again == following
    last = next_segments(following, objectives, 3, SPACE, CHANGING, OPTIONS, seed=3)
    assert {values[UNTIL] for values in last} == {1.0}


def test_members_that_failed_follow_the_best_whatever_the_share() -> None:
    begun = first_segments(members(4), 4)
    following = next_segments(begun, [None, None, 0.3, None], 1, SPACE, CHANGING, OPTIONS, seed=0)
    assert {values[PARENT] for values in following} == {trial_id(begun[2])}
    nobody = next_segments(begun, [None] * 4, 1, SPACE, CHANGING, OPTIONS, seed=0)
    assert [values[PARENT] for values in nobody] == [trial_id(values) for values in begun]


def test_options_move_within_the_space() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        told = explore(SPACE, {"training.learning_rate": 9e-3, "weight": 10.0, "fixed": 2}, OPTIONS, rng)
        assert math.isclose(told["training.learning_rate"], 4.5e-3) or told["training.learning_rate"] == 1e-2
        assert told["weight"] in (1.0, 10.0)
    drawn = dataclasses.replace(OPTIONS, resample=1.0)
    rates = [
        explore(SPACE, {"training.learning_rate": 9e-3, "weight": 1.0, "fixed": 1}, drawn, rng)[
            "training.learning_rate"
        ]
        for _ in range(400)
    ]
    assert 0.4 < np.mean(np.array(rates) < 1e-3) < 0.6  # evenly in the logarithm


@pytest.mark.parametrize("wrong", [{"segments": 1}, {"share": 0.0}, {"share": 0.6}, {"resample": 1.5}, {"factor": 1.0}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        PopulationOptions(**wrong)


@pytest.fixture
def here(inline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials and trainings run in this process, one after the other."""

    def work(job: module.Job, options: Any, work: str, run: Any, prefix: str, callbacks: Any = ()) -> None:
        def tell(event: dict[str, Any]) -> None:
            values = {f"validation/{name}": value for name, value in event.get("validation", {}).items()}
            if run is not None:
                run.metrics(values, event["step"])

        worker.work(job, tell, LocalContext())

    monkeypatch.setattr(module, "run_job_here", work)
    monkeypatch.setattr(trained_trials, "run_job", work)

    def trials(self: Any, planned: list[dict[str, Any]], before: Any, budget: Any) -> None:
        for values in planned:
            with suppress(UnianomError):  # as Tune goes on with the others
                run_trial(self.campaign, values, lambda told: None)

    monkeypatch.setattr(driver.Driver, "run_trials", trials)
    monkeypatch.setattr(population_driver, "connect", lambda *_, **__: None)


def population(shards: ShardSet, output: Path, **changes: Any) -> Any:
    """Four members of UniAD in three segments of three steps."""
    config = dataclasses.replace(
        TINY["uniad"].config, training=TrainingConfig(iterations=9, batch_size=4, learning_rate=1e-3)
    )
    given = {
        "method": config,
        "space": {"neighbours": None, "training.learning_rate": {"low": 1e-5, "high": 3e-2, "log": True}},
        "search": "pbt",
        "trials": 4,
        "population": PopulationOptions(segments=3, share=0.5),
        "settings": 4,
        "validation": ValidationOptions(normals=4, recipes=("cutpaste_patch", "shade"), pixel_stride=2),
        "threshold": ThresholdOptions(validation_fraction=0.3),
        "validate_every": 3,
        "runtime": ONE,
        "tracking": UNTRACKED,
    }
    return tune_options()["uniad"](shards=shards.uri, output=str(output), **{**given, **changes})


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    parts = [samples("bolt", "train", 12), samples("nut", "train", 12)]
    return ShardSet.open(write_set(tmp_path / "shards", parts))


def test_a_segment_whose_driver_died_before_it_heard_of_it_is_trained_again(
    here: None, shards: ShardSet, tmp_path: Path
) -> None:
    whole = tune(population(shards, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        # the last segments never begin
        patch.setattr(population_driver, "next_segments", lambda members, objectives, done, *rest: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(population(shards, tmp_path / "killed"))
    first = sorted(tmp_path.glob("killed/trials/*"))
    assert len(first) == 4
    record = json.loads((first[0] / "record.json").read_text())
    for name in ("record.json", "reports.json"):
        (first[0] / name).unlink()
    assert (first[0] / "state.pt").exists()
    again = tune(population(shards, tmp_path / "killed"))
    told = json.loads((first[0] / "record.json").read_text())
    assert told["objective"] == record["objective"]
    (content,), (expected,) = again.contents.values(), whole.contents.values()
    assert content["best"]["objective"] == expected["best"]["objective"]


def test_a_population_that_all_fails_says_why(here: None, shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no trial came to its end .*finite"):
        tune(
            population(
                shards,
                tmp_path / "c",
                space={"neighbours": None, "training.learning_rate": [1e30]},
                trials=1,
                method=dataclasses.replace(
                    TINY["uniad"].config, training=TrainingConfig(iterations=9, batch_size=4, learning_rate=1e30)
                ),
            )
        )


def test_a_recipe_trains_the_best_member_again(here: None, shards: ShardSet, tmp_path: Path) -> None:
    options = population(shards, tmp_path / "campaign")
    kept: dict[str, torch.Tensor] = {}
    real = trained_trials.load_model

    def seen(folder: str, device: str) -> Any:
        model = real(folder, device)
        kept[folder.split("/trials/")[1].split("/")[0]] = torch.cat(
            [p.detach().flatten() for p in model.method.parameters() if p.requires_grad]
        )
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_trials, "load_model", seen)
        result = tune(options)
    (content,) = result.contents.values()
    assert content["counts"]["done"] == 4
    recipe = yaml.safe_load((tmp_path / "campaign" / RECIPE).read_text())
    assert len(recipe["phases"]) in (1, 2), "with half of them following the other half, the best is one that followed"

    arguments = ["uniad", "--config", str(tmp_path / "campaign" / RECIPE)]
    asked = parse(train_options(), [*arguments, "--shards", shards.uri, "--output", str(tmp_path / "again")])
    assert asked.phases == tuple(Phase(**phase) for phase in recipe["phases"])
    asked = dataclasses.replace(asked, tracking=UNTRACKED, runtime=ONE)
    train_networks("uniad", asked.method, asked, None)  # type: ignore[arg-type]
    method = load(str(tmp_path / "again")).method
    again = torch.cat([p.detach().flatten() for p in method.parameters() if p.requires_grad])
    assert torch.equal(again, kept[content["best"]["trial"]])

    records = {path: path.stat().st_mtime_ns for path in tmp_path.glob("campaign/trials/*/record.json")}
    assert not tune(options).fresh
    assert {path: path.stat().st_mtime_ns for path in records} == records
