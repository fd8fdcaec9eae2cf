"""Campaigns as jobs/tune.py runs them."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pipelines.data.options import ValidationOptions
from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.cli import parse
from pipelines.runtime.models import load_model
from pipelines.runtime.options import TrackingOptions
from pipelines.runtime.progress import Progress
from pipelines.training.calibration_head import HeadActor
from pipelines.training.calibration_images import EmbeddingCache
from pipelines.training.options import CalibrateOptions, ThresholdOptions, train_options
from pipelines.training.train import train
from pipelines.tuning import driver
from pipelines.tuning.budget import Budget
from pipelines.tuning.dimensions import Choice, Dimension, Range
from pipelines.tuning.options import EarlyStopping, searched, tune_options
from pipelines.tuning.ray_tune import Halving, TrialValues, tree_parzen
from pipelines.tuning.recorder import Recorder
from pipelines.tuning.records import write_early_end
from pipelines.tuning.space import key_of, space_of
from pipelines.tuning.statuses import CRASHED
from pipelines.tuning.trained_trials import trained_model
from pipelines.tuning.trial import run_trial
from pipelines.tuning.tune import tune
from tests.data.test_shards import write_set
from tests.methods.conftest import TINY
from tests.pipelines.conftest import ONE, UNTRACKED, Small, kill_job, tiny_method, tiny_training
from tests.pipelines.sharded import samples
from unianom.configs.calibration import CalibrationConfig
from unianom.configs.training import TrainingConfig
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError
from unianom.execution import CPU
from unianom.options import to_plain

REPOSITORY = Path(__file__).parents[3]

VALIDATION = ValidationOptions(normals=6, recipes=("cutpaste_patch", "shade"), pixel_stride=2)
HELD_OUT = ThresholdOptions(validation_fraction=0.3)


def memory_options(shards: Path | str, output: Path, **changes: Any) -> Any:
    defaults: dict[str, Any] = {
        "method": tiny_method(),
        "space": {
            "bank.coreset_ratio": [0.1, 0.25, 0.5, 1.0],
            "mask_threshold": [0.0, 0.1],
            "mask_kernel": None,
            "blocks": None,
            "k_ratio": [0.05, 0.25, 1.0],
            "neighbours": [1, 2],
            "blur_sigma": None,
        },
        "trials": 3,
        "validation": VALIDATION,
        "threshold": HELD_OUT,
        "runtime": ONE,
        "tracking": UNTRACKED,
    }
    return tune_options()["uniformaly"](shards=str(shards), output=str(output), **{**defaults, **changes})


@pytest.fixture
def here(inline: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials run in this process, one after the other; the names of those that did."""
    return run_trials_here(monkeypatch)


def run_trials_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have trials run in this process; return the list that takes the names of those that did."""
    ran: list[str] = []

    def trials(self: Any, planned: list[dict[str, Any]] | None, before: Any, budget: Any) -> None:
        assert planned is not None
        for values in planned:
            ran.append(key_of(values))
            run_trial(self.campaign, values, lambda told: None)

    monkeypatch.setattr(driver.Driver, "run_trials", trials)
    monkeypatch.setattr(driver, "connect", lambda *_, **__: None)
    return ran


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two categories, half of whose test images are anomalous."""
    parts = [
        [*samples(name, "train", 10), *samples(name, "test", 3), *samples(name, "test", 3, label=1, first=3)]
        for name in ("bolt", "nut")
    ]
    return write_set(tmp_path / "shards", parts)


# ------------------------------------------------------------------------------------------------------- without Ray
def test_a_campaign_for_each_category_says_what_a_common_setting_loses(
    here: list[str], shards: str, tmp_path: Path
) -> None:
    result = tune(memory_options(shards, tmp_path / "c", per_category=True, search="grid", trials=None))
    assert sorted(result.contents) == ["bolt", "nut"]
    assert len(here) == 2 * 8
    common = json.loads((tmp_path / "c" / "campaign.json").read_text())
    found: dict[str, dict[str, float]] = {}
    for category in ("bolt", "nut"):
        rows = pq.read_table(tmp_path / "c" / "categories" / category / "settings.parquet").to_pylist()
        assert len(rows) == 8 * 6
        options = [
            name for name in rows[0] if name in ("bank.coreset_ratio", "mask_threshold", "k_ratio", "neighbours")
        ]
        found[category] = {str([row[name] for name in options]): row["objective"] for row in rows}
        assert result.contents[category]["best"]["objective"] == max(found[category].values())
    means = {key: (value + found["nut"][key]) / 2 for key, value in found["bolt"].items()}
    rows = {row["category"]: row for row in common["category_gain"]}
    assert rows["mean"]["common"] == pytest.approx(max(means.values()))
    assert rows["mean"]["own"] == pytest.approx(np.mean([max(values.values()) for values in found.values()]))
    asked = parse(
        train_options(), ["uniformaly", "--config", result.recipe, "--shards", "s", "--output", str(tmp_path / "m")]
    )
    assert asked.per_category
    for category, options in asked.category_options.items():
        best = result.contents[category]["best"]["values"]
        told = {f"bank.{k}": v for k, v in options.get("bank", {}).items()} | {
            k: v for k, v in options.items() if k != "bank"
        }
        assert told == {k: v for k, v in best.items() if told.get(k) == v or k in told}


def test_a_calibrator_of_a_campaign_is_that_of_its_recipe(here: list[str], shards: str, tmp_path: Path) -> None:
    train(tiny_training(shards, tmp_path / "model"))
    options = tune_options()["cada"](
        model=str(tmp_path / "model"),
        shards=shards,
        output=str(tmp_path / "c"),
        calibration=CalibrationConfig(iterations=20, batch_size=4),
        space={"alpha": [None, 0.1], "learning_rate": [0.01, 0.05], "statistics": None, "head.dropout": None},
        search="grid",
        validation=VALIDATION,
        objective={"union_image_auroc": 1.0, "union_pixel_ap": 1.0},
        runtime=ONE,
        tracking=UNTRACKED,
        diagnose=True,
    )
    result = tune(options)
    assert len(here) == 4
    (content,) = result.contents.values()
    assert content["counts"]["settings"] == 4 * 6
    arguments = ["--config", result.recipe, "--model", str(tmp_path / "model"), "--shards", shards]
    asked = dataclasses.replace(
        parse(CalibrateOptions, [*arguments, "--output", str(tmp_path / "again")]), runtime=ONE, tracking=UNTRACKED
    )
    calibrator, _ = fitted(asked)
    validation_set = ValidationSet(
        next(str(path.parent) for path in (tmp_path / "c" / "validation").glob("*/images.parquet")), 2
    )
    method = load_model(str(tmp_path / "model"), CPU).method
    scores, maps = [], []
    for images in validation_set.batches(options.batch_size, method.input, method.device):
        seen = method.predict(images)
        made = calibrator.calibrate(seen)
        scores.append(made.score.numpy())
        maps.append(validation_set.thinned(made.maps(seen.anomaly_map).numpy()))
    image = validation_set.image_table(np.concatenate(scores))
    pixel = validation_set.pixel_table(np.concatenate(maps), union=True)
    measured = validation_set.measured(image, pixel, options.objective)
    # scores that differ in their last bits may change places among the pixels
    assert measured.objective == pytest.approx(content["best"]["objective"], abs=1e-5)
    assert result.diagnosis is not None
    assert result.diagnosis["campaigns"]["bolt+nut"]["settings"]["n"] == 24


def fitted(options: CalibrateOptions) -> Any:
    """The calibrator that jobs/calibrate.py would make, in this process."""
    kept = EmbeddingCache.of(options.model, ShardSet.open(options.shards), options)
    kept.fill(options)
    actor = HeadActor(kept, options.calibration, None, "cpu", 1)
    actor.run(options.calibration.iterations)
    return actor.calibrator(), kept


def test_a_space_of_postprocess_options_alone_is_one_trial(here: list[str], shards: str, tmp_path: Path) -> None:
    trials = ("bank.coreset_ratio", "mask_threshold", "mask_kernel", "blocks")
    space = {**dict.fromkeys(trials), "k_ratio": [0.1, 1.0]}
    result = tune(memory_options(shards, tmp_path / "c", space=space, threshold_rates=(0.5, 0.9, 0.01)))
    assert here == ["{}"]
    (content,) = result.contents.values()
    assert content["counts"] == {
        "trials": 1,
        "done": 1,
        "stopped": 0,
        "failed": 0,
        "crashed": 0,
        "settings": 25,
    }  # 24 and the default
    assert [row["rate"] for row in content["threshold_rates"]] == [0.01, 0.5, 0.9]
    assert "balanced_accuracy" not in content["threshold_rates"][0], "six images support no rate of 1 %"
    assert not tune(memory_options(shards, tmp_path / "c", space=space, threshold_rates=(0.5, 0.9, 0.01))).fresh


@pytest.mark.parametrize(("lost", "runs", "crashed"), [(1, 2, 0), (9, 3, 1)])
def test_a_trial_that_crashed_is_run_again(
    here: list[str],
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
    runs: int,
    crashed: int,
) -> None:
    """Its process died before it wrote anything, in the first runs of the campaign's trials."""
    known: list[int] = []
    run_all = driver.Driver.run_trials

    def lose_one(self: Any, planned: list[dict[str, Any]], before: Any, budget: Any) -> None:
        known.append(len(before))
        alive = len(planned) - (len(known) <= lost)
        run_all(self, planned[:alive], before, budget)
        for values in planned[alive:]:
            write_early_end(self.campaign.trial_folder(values), values, CRASHED, "its process died")

    monkeypatch.setattr(driver.Driver, "run_trials", lose_one)
    result = tune(memory_options(shards, tmp_path / "c", trials=3))
    (content,) = result.contents.values()
    assert known == [0, 2, 2][:runs]
    assert content["counts"] | {"settings": 0} == {
        **{"trials": 3, "done": 3 - crashed, "stopped": 0, "failed": 0, "crashed": crashed, "settings": 0}
    }


def test_a_shorter_budget_ends_a_campaign_that_a_longer_one_continues(
    here: list[str], shards: str, tmp_path: Path
) -> None:
    tune(memory_options(shards, tmp_path / "c", trials=2))
    (tmp_path / "c" / "spent.json").write_text(json.dumps({"seconds": 3600.0, "trial_seconds": 3600.0}))
    stopped = tune(memory_options(shards, tmp_path / "c", trials=4, hours=1.0))
    assert len(here) == 2
    assert next(iter(stopped.contents.values()))["counts"] | {"settings": 0} == {
        **{"trials": 4, "done": 2, "stopped": 0, "failed": 0, "crashed": 0, "settings": 0}
    }
    tune(memory_options(shards, tmp_path / "c", trials=4, hours=2.0))
    assert len(set(here)) == 4


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"space": {"k_ratoi": [0.1]}}, r"no option 'k_ratoi'; did you mean 'k_ratio'"),
        ({"space": {"k_ratio": [2.0]}}, r"space.k_ratio: k_ratio=2.0 must be in"),
        ({"search": "pbt"}, "pbt changes options while"),
        ({"pareto": True}, "pareto is for --search tpe"),
        ({"gpu_hours": 1.0}, "gpu_hours needs"),
        ({"objective": {"auroc": 1.0}}, "unknown metric 'auroc'"),
        ({"trials": 0}, "trials=0"),
        ({"category_options": {"bolt": {"k_ratio": 0.1}}}, "category_options"),
        ({"threshold": ThresholdOptions(validation_fraction=0.0)}, "raise --threshold.validation_fraction"),
        ({"resume": True}, "no campaign to resume"),
        ({"space": {"blocks": {"low": 0, "high": 1}}}, "blocks"),
    ],
)
def test_what_cannot_be_is_refused(
    here: list[str], shards: str, tmp_path: Path, wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises((OptionError, DataError), match=sentence):
        tune(memory_options(shards, tmp_path / "c", **wrong))
    assert not here


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"search": "pbt"}, "pbt is for methods that are trained"),
        ({"gpu_hours": 1.0}, "gpu_hours needs"),
        ({"output": None}, "give --output"),
        ({"threshold_rates": (0.1,)}, "jobs/decide.py"),
        ({"calibration": CalibrationConfig(variant="labels")}, "has no head"),
    ],
)
def test_what_a_campaign_of_heads_cannot_be_is_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        tune_options()["cada"](**{"model": "m", "shards": "s", "output": "o", **wrong})


def test_trials_are_recorded_where_their_job_is(here: list[str], shards: str, tmp_path: Path) -> None:
    """Those of campaigns for single categories, too, whose folders lie deeper."""
    options = memory_options(shards, tmp_path / "c", trials=1, per_category=True, tracking=TrackingOptions())
    told = []

    def trials(self: Any, planned: list[dict[str, Any]], before: Any, budget: Any) -> None:
        store = str(Path(options.output).parent)
        for values in planned:
            record = run_trial(self.campaign, values, lambda report: None)
            progress = Progress("tune", 1, "trials")
            recorder = Recorder(self.campaign, None, options.tracking, store, self.tracking_run, budget, progress)  # type: ignore[arg-type]
            recorder.record_again([record])
            told.append(record["trial"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Driver, "run_trials", trials)
        tune(options)
    assert len(told) == 2
    assert list(tmp_path.rglob("mlflow.db")) == [tmp_path / "mlflow.db"]
    runs = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    (parent,) = [run for run in runs if run.data.tags["unianom.job"] == "tune"]
    of_trials = [run for run in runs if run.data.tags["unianom.job"] == "trial"]
    assert [run.data.tags["mlflow.parentRunId"] for run in of_trials] == [parent.info.run_id] * 2
    assert all("best/image_auroc" in run.data.metrics for run in of_trials)


def test_another_campaign_in_the_output_is_not_touched(here: list[str], shards: str, tmp_path: Path) -> None:
    tune(memory_options(shards, tmp_path / "c", trials=1))
    with pytest.raises(DataError, match=r"a campaign of another run \(differing in: objective\)"):
        tune(memory_options(shards, tmp_path / "c", trials=1, objective={"image_ap": 1.0}))


def test_time_is_counted_through_interruptions() -> None:
    assert not Budget(1.0, None, 0.0, 3500.0, 0.0).stop_all()
    assert Budget(1.0, None, 0.0, 3601.0, 0.0).stop_all()
    budget = Budget(None, 2.0, 0.5, 0.0, 7200.0)  # two hours on half a GPU are spent
    assert not budget.stop_all()
    budget("a", {"time_total_s": 3600.0})
    assert not budget.stop_all()
    budget("b", {"time_total_s": 3600.0})
    assert budget.stop_all()
    assert budget.spent()["trial_seconds"] == 14400.0


def test_halving_spares_the_trial_with_the_options_as_given() -> None:
    halving = Halving(
        lambda config: config["number"] == 0,
        time_attr="progress",
        metric="objective",
        mode="max",
        max_t=101,
        grace_period=20,
        reduction_factor=2,
    )
    trials = [SimpleNamespace(trial_id=str(number), config={"number": number}) for number in range(4)]
    for trial in trials:
        halving.on_trial_add(None, trial)

    def told(number: int, progress: int, objective: float) -> str:
        return halving.on_trial_result(None, trials[number], {"progress": progress, "objective": objective})

    assert told(1, 20, 0.9) == "CONTINUE"
    assert told(2, 20, 0.1) == "STOP"
    assert told(0, 20, 0.0) == "CONTINUE", "it is what the others are compared with"
    assert told(3, 20, 0.95) == "CONTINUE"
    assert told(3, 40, 0.5) == "CONTINUE"
    assert told(1, 40, 0.4) == "STOP"


DIMENSIONS = (
    Dimension("blocks", Choice(((0, 1), (2,)))),
    Dimension("rate", Range(1e-4, 1e-2, log=True)),
    Dimension("count", Range(1, 9, integer=True)),
)


def test_configs_of_optuna_stand_for_values_and_back() -> None:
    values = TrialValues(None, DIMENSIONS)
    told = {"blocks": (2,), "rate": 3e-3, "count": 4}
    outside = {"blocks": (5,), "rate": 3e-3, "count": 4}
    (point,) = values.points([told, to_plain(told), outside])
    assert point == {"blocks": 1, "rate": 3e-3, "count": 4}
    assert values.of(point) == told
    search = tree_parzen(values, [point], seed=0, pareto=False)
    assert values.of(search.suggest("first")) == told
    for number in range(20):
        search.on_trial_complete(
            f"{number}" if number else "first", {"objective": -abs(math.log(3e-3 / 1e-3)), "training_iteration": 1}
        )
        found = values.of(search.suggest(f"{number + 1}"))
        assert 1e-4 <= found["rate"] <= 1e-2
        assert found["count"] in range(1, 10)
        assert found["blocks"] in ((0, 1), (2,))


@pytest.mark.parametrize("pareto", [False, True])
def test_a_search_that_goes_on_draws_other_trials_than_at_its_beginning(pareto: bool) -> None:
    values = TrialValues(None, DIMENSIONS)
    reported = {"objective": 0.5, "latency_ms": 1.0, "memory_mb": 1.0, "training_iteration": 1}
    begun: list[dict[str, Any]] = [{"blocks": (0, 1), "rate": 1e-3, "count": 2}]
    for wanted in (3, 5, 8):
        points = values.points(begun)
        search = tree_parzen(values, points, seed=0, pareto=pareto)
        told = []
        for number in range(wanted):
            told.append(values.of(search.suggest(f"{number}")))
            search.on_trial_complete(f"{number}", reported)
        assert told[: len(begun)] == begun
        assert len({key_of(one) for one in told}) == wanted
        begun = told


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs" / "recipes" / "tuning").glob("*.yaml")), ids=str)
def test_recipes(path: Path) -> None:
    name = path.stem.split("_")[0]
    model = ["--model", "m"] if name == "cada" else []
    asked = parse(tune_options(), [name, "--config", str(path), *model, "--shards", "s", "--output", "o"])
    space = space_of(name, searched(asked), asked.space)
    assert {dimension.name for dimension in space} >= {option for option, tried in asked.space.items() if tried}
    assert f"jobs/tune.py {name} --config jobs/recipes/tuning/{path.name} " in path.read_text()


# ----------------------------------------------------------------------------------------------------------- with Ray
def trained_options(small: Small, output: Path, **changes: Any) -> Any:
    training = TrainingConfig(iterations=12, batch_size=4, learning_rate=1e-3)
    defaults: dict[str, Any] = {
        "method": dataclasses.replace(TINY["uniad"].config, training=training),
        # with 1e30 nothing stays finite
        "space": {"training.learning_rate": [1e-3, 2e-3, 1e30], "neighbours": None},
        "search": "grid",
        "early_stopping": EarlyStopping(enabled=False),
        "settings": 4,
        "validation": VALIDATION,
        "threshold": HELD_OUT,
        "validate_every": 6,
        "runtime": ONE,
        "diagnose": True,
        "tracking": TrackingOptions(mlflow_uri=f"sqlite:///{output.parent / 'mlflow.db'}"),
    }
    return tune_options()["uniad"](shards=str(small.shards), output=str(output), **{**defaults, **changes})


@pytest.mark.ray
def test_a_killed_campaign_goes_on_and_its_recipe_trains_the_best_trial_again(small: Small, tmp_path: Path) -> None:
    options = trained_options(small, tmp_path / "c")
    config = tmp_path / "options.yaml"
    config.write_text(yaml.safe_dump(to_plain(options)))
    process = subprocess.Popen([sys.executable, "jobs/tune.py", "uniad", "--config", str(config)], cwd=REPOSITORY)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("c/trials/*/record.json")):
        assert process.poll() is None, "the campaign ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_job(process)
    before = {path: path.read_bytes() for path in tmp_path.glob("c/trials/*/record.json")}

    result = tune(dataclasses.replace(options, resume=True))
    assert result.fresh
    assert {path: path.read_bytes() for path in before} == before
    (content,) = result.contents.values()
    assert content["counts"] == {"trials": 3, "done": 2, "stopped": 0, "failed": 1, "crashed": 0, "settings": 10}
    assert all("finite" in row["error"] for row in content["errors"])
    assert result.diagnosis is not None
    assert result.diagnosis["campaigns"]["cog+weave"]["settings"]["n"] == 10

    runs = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    (parent,) = [run for run in runs if run.data.tags["unianom.job"] == "tune"]
    trials = [run for run in runs if run.data.tags["unianom.job"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    statuses = sorted(run.data.tags["unianom.status"] for run in trials)
    assert statuses == ["done", "done", "failed"]
    assert parent.data.metrics["best/objective"] == content["best"]["objective"]

    arguments = ["uniad", "--config", result.recipe, "--shards", str(small.shards), "--output", str(tmp_path / "again")]
    asked = dataclasses.replace(parse(train_options(), arguments), tracking=UNTRACKED, runtime=ONE)
    (again,) = train(asked)
    kept = trained_model(str(tmp_path / "c" / "trials" / content["best"]["trial"]))
    weights = [Path(folder, "weights.safetensors").read_bytes() for folder in (again.folder, kept)]
    assert weights[0] == weights[1]
    assert load_model(again.folder, CPU).method.config.score_pool == content["best"]["values"]["score_pool"]


@pytest.mark.ray
def test_tpe_learns_again_what_it_knew(ray_cluster: None, small: Small, tmp_path: Path) -> None:
    options = memory_options(small.shards, tmp_path / "c", search="tpe", trials=3, pareto=True, diagnose=True)
    first = tune(options)
    (content,) = first.contents.values()
    assert content["counts"]["trials"] == 3
    assert content["default"] is not None
    assert content["front"]
    records = {path: path.stat().st_mtime_ns for path in tmp_path.glob("c/trials/*/record.json")}
    longer = tune(dataclasses.replace(options, trials=5))
    (content,) = longer.contents.values()
    assert {path: path.stat().st_mtime_ns for path in records} == records
    assert content["counts"]["done"] == len(list(tmp_path.glob("c/trials/*/record.json"))) <= 5
    # as measured in this process
    best = content["best"]
    model = train(
        dataclasses.replace(
            parse(
                train_options(),
                [
                    "uniformaly",
                    "--config",
                    longer.recipe,
                    "--shards",
                    str(small.shards),
                    "--output",
                    str(tmp_path / "m"),
                ],
            ),
            runtime=ONE,
            tracking=UNTRACKED,
        )
    )[0]
    method = load_model(model.folder, CPU).method
    assert method.config.bank.coreset_ratio == best["values"]["bank.coreset_ratio"]
    validation_set = ValidationSet(
        next(str(path.parent) for path in (tmp_path / "c" / "validation").glob("*/images.parquet")), 2
    )
    with torch.inference_mode():
        found = [method.predict(images) for images in validation_set.batches(8, method.input, method.device)]
    scores = np.concatenate([one.score.numpy() for one in found])
    maps = validation_set.thinned(np.concatenate([one.anomaly_map.numpy() for one in found]))
    measured = validation_set.measured(
        validation_set.image_table(scores), validation_set.pixel_table(maps), options.objective
    )
    assert measured.objective == pytest.approx(best["objective"], abs=1e-9)
