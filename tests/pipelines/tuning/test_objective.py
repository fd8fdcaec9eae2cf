"""The search over postprocess options against methods made with each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.data.options import ValidationOptions
from pipelines.data.validation_set import Measured, ValidationSet, build_validation_set
from pipelines.tuning import objective as module
from pipelines.tuning.objective import (
    OBJECTIVE,
    TIMED_PREDICTIONS,
    ScoredSetting,
    best_setting,
    latency,
    memory,
    postprocess_all,
    score_settings,
)
from pipelines.tuning.objective_validation import ObjectiveValidation, ObjectiveValidator
from pipelines.tuning.raw_outputs import compute_raw_outputs, load_raw_outputs, save_raw_outputs
from tests.methods.conftest import TINY, fit, remade
from tests.pipelines.sharded import LIMITS, POLICY, SIDE, sample, write_shards
from unianom.data.drawing import draw_sample
from unianom.errors import DataError, OptionError
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.options import with_values

EVERYTHING = {
    "image_auroc": 1.0,
    "image_ap": 0.5,
    "pixel_auroc": 2.0,
    "pixel_ap": 1.0,
    "union_image_ap": 1.0,
    "union_pixel_ap": 0.5,
}

MOST_NEIGHBOURS = 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three cogs and two weaves, and shaded and pasted copies of them."""
    folder = tmp_path_factory.mktemp("raw_outputs")
    rows = [
        sample(category, "train", n, pixels=draw_sample(category, n, size=SIDE)[0])
        for category, count in (("cog", 3), ("weave", 2))
        for n in range(count)
    ]
    names = frozenset(row["sample_id"] for row in rows)
    options = ValidationOptions(recipes=("cutpaste_patch", "shade"))
    shards = write_shards(folder / "shards", [rows])
    return build_validation_set(shards, ["cog", "weave"], names, POLICY, options, LIMITS, str(folder / "made"))


@pytest.fixture(scope="module")
def fitted() -> dict[str, Method]:
    return {}


def method_of(name: str, fitted: dict[str, Method]) -> Method:
    if name not in fitted:
        fitted[name] = fit(METHODS[name](TINY[name].config))
    return fitted[name]


def raw_outputs_of(method: Method, validation_set: ValidationSet) -> dict[str, Tensor]:
    """Return raw outputs, of a memory method with more neighbours than its own options need."""
    batches = list(validation_set.batches(4, method.input, method.device))
    if not isinstance(method, MemoryMethod):
        return compute_raw_outputs(method, batches)
    with torch.inference_mode():
        found = [method.search_bank(method.embed(batch), MOST_NEIGHBOURS).tensors for batch in batches]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def predicted(method: Method, validation_set: ValidationSet) -> tuple[np.ndarray, np.ndarray]:
    """Scores and maps of all images, thinned, the ordinary way."""
    found = [method.predict(batch) for batch in validation_set.batches(4, method.input, method.device)]
    maps = torch.cat([one.anomaly_map for one in found]).numpy()
    return torch.cat([one.score for one in found]).numpy(), maps[:, 2::4, 2::4]


@pytest.mark.parametrize("name", TINY)
def test_settings_are_measured_as_methods_made_with_them(
    name: str, images: str, fitted: dict[str, Method], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 6)  # of 15
    method, validation_set = method_of(name, fitted), ValidationSet(images, 4)
    settings = [{}, *TINY[name].reading]
    raw_outputs = raw_outputs_of(method, validation_set)
    found = score_settings(method, raw_outputs, method.config, settings, validation_set, EVERYTHING)
    assert [one.values for one in found] == settings
    seen = set()
    for one in found:
        config = with_values(method.config, one.values)
        scores, maps = predicted(remade(method, config), validation_set)
        (again,), _ = postprocess_all(method, raw_outputs, [config], validation_set)
        np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-6)
        expected = validation_set.measured(
            validation_set.image_table(scores), validation_set.pixel_table(maps, union=True), EVERYTHING
        )
        assert one.measured is not None
        assert one.measured.metrics == pytest.approx(expected.metrics, abs=1e-3)
        assert one.measured.objective == pytest.approx(expected.objective, abs=1e-3)
        assert one.measured.by_category == pytest.approx(expected.by_category, abs=1e-3)
        assert one.measured.by_recipe == pytest.approx(expected.by_recipe, abs=1e-3)
        seen.add(one.measured.objective)
    assert len(seen) > 1, "settings that all do as well would compare nothing"


def test_more_neighbours_than_were_found_are_refused(images: str, fitted: dict[str, Method]) -> None:
    method, validation_set = method_of("uniformaly", fitted), ValidationSet(images, 4)
    with pytest.raises(OptionError, match="neighbours=6, but only 5 were searched"):
        score_settings(
            method,
            raw_outputs_of(method, validation_set),
            method.config,
            [{"neighbours": 6}],
            validation_set,
            {"image_auroc": 1.0},
        )


# ---- a made-up method -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Powers:
    """Options of the method below."""

    power: float = 1.0
    factor: float = 1.0


class Shell:
    """Maps are given values to a power, scores their largest times a factor; notes how often each was made."""

    map_options: ClassVar[tuple[str, ...]] = ("power",)

    def __init__(self) -> None:
        self.maps, self.scores = 0, 0

    def anomaly_maps(self, tensors: Mapping[str, Tensor], config: Any = None) -> tuple[Tensor, Tensor]:
        self.maps += 1
        made = tensors["levels"] ** config.power
        return made, made

    def image_scores(self, tensors: Mapping[str, Tensor], anomaly_map: Tensor, config: Any = None) -> Tensor:
        self.scores += 1
        return anomaly_map.amax((1, 2)) * config.factor


@pytest.fixture(scope="module")
def levels(images: str) -> dict[str, Tensor]:
    """Random levels above zero, higher where something is marked."""
    masks = torch.from_numpy(np.load(f"{images}/masks.npy"))
    noise = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    return {"levels": 0.1 + noise + 0.3 * masks}


def search(
    images: str, levels: dict[str, Tensor], settings: Sequence[Mapping[str, Any]], objective: Mapping[str, float]
) -> tuple[list[ScoredSetting], Shell]:
    shell = Shell()
    return score_settings(shell, levels, Powers(), settings, ValidationSet(images, 4), objective), shell


def test_a_setting_without_finite_scores_spoils_no_other(images: str, levels: dict[str, Tensor]) -> None:
    settings = [{"factor": float("nan")}, {"factor": 2.0}, {"factor": float("inf")}, {"factor": -1.0}]
    found, _ = search(images, levels, settings, EVERYTHING)
    assert [one.measured is None for one in found] == [True, False, True, False]
    assert best_setting(found)[0] is found[1]
    alone, _ = search(images, levels, [{"factor": 2.0}], EVERYTHING)
    assert alone[0] == found[1]


def test_settings_come_in_their_order_and_share_maps(images: str, levels: dict[str, Tensor]) -> None:
    settings = [{"power": power, "factor": factor} for factor, power in itertools.product((1.0, -1.0, 2.0), (2.0, 0.5))]
    found, shell = search(images, levels, settings, EVERYTHING)
    assert [one.values for one in found] == settings
    assert (shell.maps, shell.scores) == (2, 6)
    for one in found:
        alone, _ = search(images, levels, [one.values], EVERYTHING)
        assert alone == [one]


def test_maps_are_not_measured_where_nobody_asks(
    images: str, levels: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = search(images, levels, [{}], EVERYTHING)
    monkeypatch.setattr(ValidationSet, "pixel_table", None)
    found, _ = search(images, levels, [{}], {"union_image_auroc": 1.0})
    assert found[0].measured is not None
    assert expected[0].measured is not None
    kept = {name: value for name, value in expected[0].measured.metrics.items() if "pixel" not in name}
    assert found[0].measured.metrics == kept


def test_maps_that_are_not_finite_are_refused(images: str, levels: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match="maps of validation images hold NaN"):
        search(images, levels, [{"power": 1e30}], {"image_auroc": 1.0})


def scored(number: int, objective: float | None) -> ScoredSetting:
    measured = None if objective is None else Measured(objective, {}, {}, {})
    return ScoredSetting({"number": number}, measured)


def test_of_equals_the_first_is_best() -> None:
    found = [scored(n, value) for n, value in enumerate([None, 0.5, 0.75, 0.2, 0.75, None])]
    assert best_setting(found)[0].values == {"number": 2}
    with pytest.raises(DataError, match="no setting gives finite scores"):
        best_setting([scored(0, None)])


# ---- kept raw outputs ------------------------------------------------------------------------------------------------


def test_raw_outputs_are_kept(tmp_path: Path) -> None:
    raw_outputs = {
        "distances": torch.rand(3, 4, 2),
        "row": torch.arange(6).reshape(3, 2),
        "level.1": torch.rand(3, 1),
    }
    save_raw_outputs(str(tmp_path), raw_outputs, 1.5)
    again, milliseconds = load_raw_outputs(str(tmp_path))
    assert milliseconds == 1.5
    assert list(again) == list(raw_outputs)
    for name, value in raw_outputs.items():
        assert again[name].dtype == value.dtype
        assert torch.equal(again[name], value)


def comparison(images: str, folder: Path) -> ObjectiveValidation:
    return ObjectiveValidation(images, 4, {"image_auroc": 1.0, "pixel_ap": 3.0}, str(folder))


def test_a_method_in_training_is_compared_by_its_own_options(
    images: str, fitted: dict[str, Method], tmp_path: Path
) -> None:
    method = method_of("uniad", fitted)
    compared = comparison(images, tmp_path)
    comparer = ObjectiveValidator(compared, method, batch_size=4)
    told = comparer.run()
    validation_set = ValidationSet(images, 4)
    scores, maps = predicted(method, validation_set)
    expected = validation_set.measured(
        validation_set.image_table(scores), validation_set.pixel_table(maps), compared.objective
    )
    assert told == pytest.approx({OBJECTIVE: expected.objective, **expected.metrics}, abs=1e-3)
    assert told[OBJECTIVE] == pytest.approx((told["image_auroc"] + 3 * told["pixel_ap"]) / 4)
    assert not list(tmp_path.iterdir())
    comparer.cache_outputs()
    kept, milliseconds = load_raw_outputs(str(tmp_path))
    assert milliseconds > 0
    for name, value in compute_raw_outputs(method, validation_set.batches(4, method.input, method.device)).items():
        torch.testing.assert_close(kept[name], value)


def test_a_method_gone_astray_in_training_is_told(images: str, tmp_path: Path, monkeypatch: Any) -> None:
    method = fit(METHODS["uniad"](TINY["uniad"].config))
    nothing = torch.full((15,), torch.nan)
    monkeypatch.setattr(
        method, "image_scores", lambda raw_outputs, *rest: nothing[: len(next(iter(raw_outputs.values())))]
    )
    with pytest.raises(DataError, match="lower the learning rate"):
        ObjectiveValidator(comparison(images, tmp_path), method, 4).run()


# ---- cost -----------------------------------------------------------------------------------------------------------


class Little(MemoryMethod):
    """A layer of eight numbers, and a buffer."""

    def __init__(self, bank: MemoryBank | None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        self.bank = bank


def test_memory_is_that_of_weights_and_bank() -> None:
    assert memory(Little(None)) == pytest.approx((8 * 4 + 5 * 8) / 1e6)
    vectors = np.random.default_rng(0).random((7, 6), np.float32)
    for shards in (1, 3):
        bank = MemoryBank.build(vectors, shards=shards)
        assert memory(Little(bank)) == pytest.approx((8 * 4 + 5 * 8 + 7 * 6 * 4) / 1e6)


def test_latency_is_a_median_without_the_first_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes = iter(itertools.accumulate(_steps())), []

    def predict(image: Tensor) -> Any:
        sizes.append(tuple(image.shape))
        return SimpleNamespace(score=torch.zeros(1))

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    method: Any = SimpleNamespace(input=SimpleNamespace(side=8), device=torch.device("cpu"), predict=predict)
    assert latency(method) == pytest.approx(1000 * (TIMED_PREDICTIONS + 1) / 2)
    assert sizes == [(1, 3, 8, 8)] * (TIMED_PREDICTIONS + 1)


def _steps() -> Sequence[float]:
    """Seconds from one look at the clock to the next: predictions take 1000, then 9, 8, … seconds, pauses 50."""
    taken = [1000.0, *map(float, range(TIMED_PREDICTIONS, 0, -1))]
    return [step for seconds in taken for step in (50.0, seconds)]
