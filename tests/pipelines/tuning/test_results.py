"""What comes of a campaign: the choice, the threshold's rate, recipes that are parsed again, tables."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pipelines.data.options import ValidationOptions
from pipelines.data.splits import TrainValSplit
from pipelines.runtime.cli import parse
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.options import FitOptions, ThresholdOptions, TrainingOptions, train_options
from pipelines.tuning.category_gain import joined_settings
from pipelines.tuning.choice import select_trial
from pipelines.tuning.recipes import difference, minimal_options, recipe, recipe_text
from pipelines.tuning.records import SCORES
from pipelines.tuning.space import draw, space_of
from pipelines.tuning.tables import of_one_kind
from pipelines.tuning.threshold_rates import chosen_rate, try_rates
from pipelines.tuning.trial import Campaign
from unianom import files
from unianom.configs.backbone import BackboneConfig
from unianom.configs.bank import BankConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.configs.uninet import UniNetConfig
from unianom.data.image import InputPolicy
from unianom.methods import METHODS, MemoryMethod
from unianom.options import from_plain, merged, to_plain, with_values

# ---- the choice -----------------------------------------------------------------------------------------------------


def record(
    trial: str, objective: float | None, latency: float = 1.0, memory: float = 1.0, status: str = "done"
) -> dict[str, Any]:
    return {"trial": trial, "status": status, "objective": objective, "latency_ms": latency, "memory_mb": memory}


RECORDS = [
    record("broken", None, 0.1, 0.1, "failed"),
    record("poor", 0.80, 1.0, 1.0),
    record("good", 0.895, 5.0, 3.0),
    record("best", 0.90, 9.0, 9.0),
    record("as good", 0.90, 7.0, 8.0),
    record("stopped", None, 0.1, 0.1, "stopped"),
    record("fair", 0.87, 2.0, 4.0),
]


@pytest.mark.parametrize(
    ("prefer", "tolerance", "expected"),
    [
        ("accuracy", 0.5, "best"),  # of equals the one that was begun first
        ("latency", 0.0, "as good"),
        ("latency", 0.006, "good"),
        ("latency", 0.04, "fair"),
        ("latency", 1.0, "poor"),
        ("memory", 0.006, "good"),
        ("memory", 0.04, "good"),
        ("memory", 1.0, "poor"),
    ],
)
def test_the_best_trial_and_the_cheapest_of_the_good(prefer: str, tolerance: float, expected: str) -> None:
    assert select_trial(RECORDS, prefer, tolerance)["trial"] == expected


# ---- recipes --------------------------------------------------------------------------------------------------------

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For machines that others use, too."""

leaf = st.none() | st.booleans() | st.integers(2, 9) | st.floats(-0.9, 0.9) | st.text(max_size=2)
keys = st.sampled_from("abc")
inner = st.dictionaries(keys, leaf | st.lists(leaf, max_size=2), max_size=2)
tree = st.dictionaries(keys, leaf | inner | st.dictionaries(keys, leaf | inner, max_size=3), max_size=3)


@PATIENT
@given(before=tree, changes=tree)
def test_a_difference_and_merging_undo_each_other(before: dict[str, Any], changes: dict[str, Any]) -> None:
    after = merged(before, changes)
    told = difference(before, after)
    assert merged(before, told) == after
    assert difference(after, after) == {}
    assert leaves(told) <= leaves(changes), "nothing is told that was not changed"


def leaves(plain: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Paths to all that is no group, or an empty one."""
    found = set()
    for key, value in plain.items():
        path = (*prefix, key)
        found |= leaves(value, path) if isinstance(value, Mapping) and value else {path}
    return found


def campaign(name: str, config: Any, folder: str = "", **fit: Any) -> Campaign:
    kind = FitOptions if issubclass(METHODS[name], MemoryMethod) else TrainingOptions
    nothing: Any = None
    return Campaign(
        name=name,
        config=to_plain(config),
        options=kind(shards="/data/shards", output="/data/model", **fit),
        shards=nothing,
        categories=["bolt"],
        chosen=TrainValSplit(frozenset(), frozenset(map(str, range(99)))),
        settings=[],
        validation=ValidationOptions(),
        objective={"image_auroc": 1.0},
        folder=folder,
        keep_models=False,
    )


def parsed(name: str, plain: Mapping[str, Any], folder: Path) -> Any:
    """Options of jobs/train.py that a recipe stands for."""
    path = folder / "best.yaml"
    path.write_bytes(recipe_text(plain, ["what it is", "how it is used"]))
    return parse(train_options(), [name, "--config", str(path), "--shards", "/data/shards", "--output", "/data/model"])


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_of_the_defaults_says_nothing(name: str) -> None:
    assert recipe(campaign(name, METHODS[name].Config()), {}, None) == {"method": {}}


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_makes_the_options_of_the_trial(name: str, preset: str, tmp_path: Path) -> None:
    own = campaign(name, METHODS[name].Config(preset=preset), seed=3)
    for values in draw(space_of(name, own.config_of({}), {}), 2, 5):
        made = parsed(name, recipe(own, values, None), tmp_path)
        assert made.method == own.config_of(values)
        assert made.seed == 3


@pytest.mark.parametrize(
    "config",
    [
        # all of it the default of one preset, but not of the other
        PatchCoreConfig(preset="reference", reweight=True),
        PatchCoreConfig(reweight=False),
        # the lower limit hangs on the decision where it is not given
        UniNetConfig(decision="literal", beta=3e-5),
        UniNetConfig(decision="literal"),
    ],
)
def test_a_recipe_says_what_would_be_filled_in_otherwise(config: Any, tmp_path: Path) -> None:
    name = next(name for name, method in METHODS.items() if method.Config is type(config))
    assert parsed(name, recipe(campaign(name, config), {}, None), tmp_path).method == config
    assert from_plain(type(config), minimal_options(config)) == config


def test_a_recipe_keeps_options_of_options(tmp_path: Path) -> None:
    config = UniFormalyConfig(
        backbone=BackboneConfig("vit_tiny_patch16_224", weights="random", options={"patch_size": 8}),
        input=InputPolicy(resize="stretch", size=64, crop=None),
        bank=BankConfig(index="ivf_flat", nlist=9),
        blocks=(0, 1),
    )
    assert parsed("uniformaly", recipe(campaign("uniformaly", config), {}, None), tmp_path).method == config


def test_a_recipe_names_what_was_changed_and_no_more() -> None:
    assert minimal_options(UniFormalyConfig(k_ratio=0.1, bank=BankConfig(coreset_ratio=0.25))) == {
        "bank": {"coreset_ratio": 0.25},
        "k_ratio": 0.1,
    }
    config = with_values(UniFormalyConfig(), {"backbone.options": {"patch_size": 8}, "attention_block": 11})
    assert minimal_options(config)["backbone"] == {"options": {"patch_size": 8}}


def test_a_recipe_keeps_how_a_trial_was_fitted(tmp_path: Path) -> None:
    own = campaign(
        "uniformaly",
        UniFormalyConfig(),
        categories=("01", "Schräubchen"),
        few_shot=4,
        seed=7,
        batch_size=3,
        threshold=ThresholdOptions(validation_fraction=0.4, confidence=0.9),
        runtime=RuntimeOptions(workers=3, cpus_per_worker=2),
        overwrite=True,
    )
    plain = recipe(own, {"bank.coreset_ratio": 0.2, "k_ratio": 0.05}, 0.02)
    assert plain == {
        "categories": ["01", "Schräubchen"],
        "few_shot": 4,
        "seed": 7,
        "batch_size": 3,
        "threshold": {
            "target_fpr": 0.02,
            "confidence": 0.9,
            "source": "auto",
            "validation_fraction": 0.4,
            "per_category": True,
        },
        "runtime": {"cpus_per_worker": 2},
        "method": {"bank": {"coreset_ratio": 0.2}},
    }
    made = parsed("uniformaly", plain, tmp_path)
    for name in ("categories", "few_shot", "seed", "batch_size"):
        assert getattr(made, name) == getattr(own.options, name)
    assert made.threshold == dataclasses.replace(own.options.threshold, target_fpr=0.02)
    assert made.runtime == RuntimeOptions(cpus_per_worker=2)
    assert made.method == own.config_of({"bank.coreset_ratio": 0.2})
    assert recipe(own, {}, None)["threshold"]["target_fpr"] is None


def test_a_recipe_can_be_read() -> None:
    plain = {"categories": ["01", "ü"], "method": {"training": {"learning_rate": 3e-5}, "taps": [2, 4]}}
    text = recipe_text(plain, ["one", "two"]).decode()
    assert text.startswith("# one\n# two\n")
    assert "ü" in text
    assert yaml.safe_load(text) == plain
    assert list(yaml.safe_load(text)) == ["categories", "method"]


# ---- the threshold's rate -------------------------------------------------------------------------------------------


def test_the_rate_of_the_best_balanced_accuracy() -> None:
    rows: list[dict[str, Any]] = [
        {"rate": 0.01, "normals_needed": 299},
        {"rate": 0.05, "normals_needed": 59, "balanced_accuracy": 0.8},
        {"rate": 0.1, "normals_needed": 29, "balanced_accuracy": 0.9},
        {"rate": 0.2, "normals_needed": 14, "balanced_accuracy": 0.9},
    ]
    assert chosen_rate({"threshold_rates": rows}) == 0.1
    assert chosen_rate({"threshold_rates": rows[:1]}) is None
    assert chosen_rate({"threshold_rates": []}) is None


def plain_threshold(scores: list[float], rate: float, confidence: float) -> float:
    """The lowest score that at most `rate` of all normal images exceed, with this confidence: so few scores above it
    would be a rare chance if more did."""
    above = max(n for n in range(len(scores)) if binom.cdf(n, len(scores), rate) <= 1 - confidence)
    return sorted(scores)[len(scores) - 1 - above]


def write_validation_set(folder: Path, label: np.ndarray) -> str:
    """The table of a validation set, which is all that is read here."""
    count = len(label)
    columns = {"category": ["bolt"] * count, "recipe": ["normal" if one == 0 else "shade" for one in label]}
    folder.mkdir()
    pq.write_table(pa.table({**columns, "label": label, "masked": [True] * count}), folder / "images.parquet")
    return str(folder)


def test_rates_are_tried_on_the_half_they_were_not_fitted_to(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    label = np.array([0] * 41 + [1] * 25)[rng.permutation(66)]
    scores = (rng.normal(size=66) + 1.5 * label).astype(np.float32)
    own = campaign("uniformaly", UniFormalyConfig(), folder=str(tmp_path))
    values = {"bank.coreset_ratio": 0.1}
    files.write_array(files.join(own.trial_folder(values), f"best-{SCORES}"), scores)
    best = {"values": values, "proxy": write_validation_set(tmp_path / "validation", label)}
    options = SimpleNamespace(threshold_rates=(0.3, 0.02, 0.15), threshold=ThresholdOptions(confidence=0.8), seed=9)
    rows = try_rates(own, best, options)

    normal = [str(n) for n in range(66) if label[n] == 0]
    normal.sort(key=lambda name: hashlib.sha256(f"9:{name}".encode()).digest())
    halves = [[int(name) for name in normal[part::2]] for part in (0, 1)]
    anomalous = [n for n in range(66) if label[n] == 1]
    assert [row["rate"] for row in rows] == [0.02, 0.15, 0.3]
    # n images can tell where (1 − rate)^n ≤ 0.2: 80 for 2 %, which no half of 41 has
    assert rows[0] == {"rate": 0.02, "normals_needed": 80}
    for row, needed in zip(rows[1:], (10, 5), strict=True):
        assert row["normals_needed"] == needed
        met, caught = [], []
        for fitted, tried in ((halves[0], halves[1]), (halves[1], halves[0])):
            level = plain_threshold([float(scores[n]) for n in fitted], row["rate"], 0.8)
            met.append(sum(scores[n] > level for n in tried) / len(tried))
            caught.append(sum(scores[n] > level for n in anomalous) / len(anomalous))
        assert row["met"] == pytest.approx(sum(met) / 2)
        assert row["caught"] == pytest.approx(sum(caught) / 2)
        assert row["balanced_accuracy"] == pytest.approx((1 - sum(met) / 2 + sum(caught) / 2) / 2)
    assert try_rates(own, best, SimpleNamespace(threshold_rates=())) == []


def test_rates_that_the_model_itself_could_not_promise_are_not_tried(tmp_path: Path) -> None:
    """The validation images may be more than the held-out ones that its threshold will be fitted to."""
    own = campaign("uniformaly", UniFormalyConfig(), folder=str(tmp_path))
    files.write_array(files.join(own.trial_folder({}), f"best-{SCORES}"), np.arange(35, dtype=np.float32))
    options = SimpleNamespace(threshold_rates=(0.3,), threshold=ThresholdOptions(confidence=0.8), seed=0)
    best = {"values": {}, "proxy": write_validation_set(tmp_path / "validation", np.array([0] * 30 + [1] * 5))}
    assert "balanced_accuracy" in try_rates(own, best, options)[0]
    few = dataclasses.replace(own, chosen=TrainValSplit(frozenset(), frozenset("abcd")))
    assert try_rates(few, best, options) == [{"rate": 0.3, "normals_needed": 5}]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_settings_tried_for_several_categories_are_one() -> None:
    def row(trial: str, values: dict[str, Any], category: str, value: float) -> dict[str, Any]:
        return {"trial": trial, "values": values, "objective": value, "by_category": {category: value}}

    joined = joined_settings(
        {
            "bolt": [row("t", {"a": 1, "b": (2, 3)}, "bolt", 0.5), row("u", {"a": 2, "b": (2, 3)}, "bolt", 0.6)],
            "nut": [row("t", {"b": [2, 3], "a": 1}, "nut", 0.7), row("v", {"a": 3, "b": (2, 3)}, "nut", 0.8)],
        }
    )
    assert [(one["values"]["a"], one["by_category"]) for one in joined] == [
        (1, {"bolt": 0.5, "nut": 0.7}),
        (2, {"bolt": 0.6}),
        (3, {"nut": 0.8}),
    ]


def test_columns_of_several_kinds_survive_parquet() -> None:
    rows: list[dict[str, Any]] = [
        {"trial": "a", "neighbours": "half", "rate": 1, "fuse": "sum", "flag": True},
        {"trial": "b", "neighbours": 3, "rate": 0.5, "fuse": None, "flag": False},
        {"trial": "c", "neighbours": None, "rate": None, "extra": 2.5},
        {"trial": "d", "flag": 1, "extra": 3},
    ]
    table = pa.Table.from_pylist(of_one_kind(rows))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    buffer.seek(0)
    read = pq.read_table(buffer)
    assert read.to_pydict() == {
        "trial": ["a", "b", "c", "d"],
        "neighbours": ["half", "3", None, None],
        "rate": [1.0, 0.5, None, None],
        "fuse": ["sum", None, None, None],
        "flag": ["True", "False", None, "1"],
        "extra": [None, None, 2.5, 3.0],
    }
    assert pa.types.is_floating(read.schema.field("rate").type)
