"""Trials in one process: what is recorded, what is told again, and the bank against that of jobs/train.py."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

import unianom
from pipelines.data import feature_cache, image_source
from pipelines.data.options import ValidationOptions
from pipelines.data.splits import choose_samples
from pipelines.data.validation_set import ValidationSet
from pipelines.runtime.cli import parse
from pipelines.runtime.models import load_memory_method
from pipelines.training.memory_bank import fit_banks
from pipelines.training.options import FitOptions, ThresholdOptions, train_options
from pipelines.training.ray_training import WorkersLostError
from pipelines.tuning import encodings, trial
from pipelines.tuning.campaign_run import CampaignRun, read_settings
from pipelines.tuning.encodings import EncodedImages, encode_once
from pipelines.tuning.memory_trials import MemoryCampaign, encoding_key, fit_bank, is_bank_option
from pipelines.tuning.raw_outputs import save_raw_outputs
from pipelines.tuning.recipes import recipe, recipe_text
from pipelines.tuning.records import read_record, read_reports, trial_id, write_early_end
from pipelines.tuning.space import key_of
from pipelines.tuning.trained_trials import Reports
from pipelines.tuning.trial import Campaign, FittedTrial, TrialContext, run_trial
from tests.methods import conftest as methods
from tests.methods.conftest import remade
from tests.pipelines.conftest import MODULES, ONE, UNTRACKED, run_inline, tiny_method
from tests.pipelines.sharded import SIDE, sample, write_shards
from unianom import files
from unianom.configs.bank import BankConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.data.drawing import draw_sample
from unianom.data.shards import ShardSet
from unianom.errors import DataError, OptionError, UnianomError
from unianom.execution import CPU
from unianom.memory.coreset import random_projection
from unianom.methods import METHODS, MemoryMethod
from unianom.methods.uniformaly import UniFormaly
from unianom.options import to_plain

sharp_vit = methods.sharp_vit
"""The fixture of that name."""

OBJECTIVE = {"image_auroc": 1.0, "pixel_ap": 1.0}

SETTINGS: list[dict[str, Any]] = [
    {"neighbours": 1, "k_ratio": 0.05, "blur_sigma": 4.0},
    {"neighbours": 3, "k_ratio": 0.05, "blur_sigma": 4.0},
    {"neighbours": 1, "k_ratio": 0.5, "blur_sigma": 4.0},
    {"neighbours": 2, "k_ratio": 0.5, "blur_sigma": 1.0},
]

VALUES: dict[str, Any] = {"bank.coreset_ratio": 0.1, "mask_threshold": 0.9}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """54 weaves and 8 cogs in parts of 50 and 12, and a part of test images."""
    weaves = [sample("weave", "train", n, pixels=draw_sample("weave", n, size=SIDE)[0]) for n in range(54)]
    cogs = [sample("cog", "train", n, pixels=draw_sample("cog", n, size=SIDE)[0]) for n in range(8)]
    unread = [{**sample("cog", "test", n, n % 2), "image": b"no image"} for n in range(4)]
    folder = tmp_path_factory.mktemp("trials") / "shards"
    return write_shards(folder, [weaves[:50], unread, weaves[50:] + cogs])


def config(sharp: str, **changes: Any) -> UniFormalyConfig:
    """The tiny method with weights whose attention masks something."""
    backbone = dataclasses.replace(
        tiny_method().backbone, weights=sharp, options={"patch_size": 8, "embed_dim": 48, "num_heads": 3}
    )
    return tiny_method(backbone=backbone, bank=BankConfig(coreset_ratio=0.5, projection=16), **changes)


def fit_options(shards: ShardSet, **changes: Any) -> FitOptions:
    threshold = ThresholdOptions(target_fpr=0.5, source="held_out", validation_fraction=0.25)
    defaults: dict[str, Any] = {"seed": 3, "batch_size": 5, "threshold": threshold, "runtime": ONE}
    return FitOptions(shards.uri, "/nowhere", **{**defaults, **changes})


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """As `inline`, for the fixture below."""
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            for name, stand_in in (("run_tasks", run_inline), ("connect", lambda _: None)):
                if hasattr(module, name):
                    patch.setattr(module, name, stand_in)
        patch.setattr(image_source, "RANGE_ROWS", 7)
        yield


@pytest.fixture(scope="module")
def prepared(
    in_this_process: None, shards: ShardSet, sharp_vit: str, tmp_path_factory: pytest.TempPathFactory
) -> MemoryCampaign:
    """A campaign whose images are encoded; tests give it folders of their own."""
    folder = str(tmp_path_factory.mktemp("campaign"))
    options, own = fit_options(shards), config(sharp_vit)
    chosen, _ = choose_samples(shards, ["cog", "weave"], options.split, validate=True)
    made = MemoryCampaign(
        name="uniformaly",
        config=to_plain(own),
        options=options,
        shards=shards,
        categories=["cog", "weave"],
        chosen=chosen,
        settings=SETTINGS,
        validation=ValidationOptions(recipes=("cutpaste_patch", "shade"), pixel_stride=2),
        objective=OBJECTIVE,
        folder=folder,
        keep_models=False,
    )
    validation_set = made.validation_set_of(UniFormaly(own))
    made.encodings[encoding_key({}, "uniformaly")] = encode(made, own, validation_set)
    return made


def encode(campaign: MemoryCampaign, own: Any, validation_set: str) -> EncodedImages:
    learn, folder = campaign.chosen.learn, f"{campaign.folder}/encodings"
    return encode_once(
        campaign.name, own, campaign.options, campaign.shards, campaign.categories, learn, validation_set, folder
    )


@pytest.fixture
def campaign(prepared: MemoryCampaign, tmp_path: Path) -> MemoryCampaign:
    return dataclasses.replace(prepared, folder=str(tmp_path / "own"))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all work of a trial fail."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("worked again")

    monkeypatch.setattr(MemoryCampaign, "fit", never)
    monkeypatch.setattr(trial, "score_settings", never)


def run(campaign: Campaign, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    return run_trial(campaign, values, told.append), told


# ---- a trial of a memory method -------------------------------------------------------------------------------------


def test_a_record_tells_the_best_setting(campaign: MemoryCampaign) -> None:
    record, told = run(campaign, VALUES)
    folder = campaign.trial_folder(VALUES)
    rows = pq.read_table(f"{folder}/settings.parquet").to_pylist()
    assert [json.loads(row["values"]) for row in rows] == SETTINGS
    objectives = [row["objective"] for row in rows]
    assert len(set(objectives)) > 1
    place = int(np.argmax(objectives))
    assert (record["status"], record["error"], record["objective"]) == ("done", None, objectives[place])
    assert record["best"] == {"values": SETTINGS[place], **json.loads(rows[place]["measured"])}
    assert record["default"] == {"values": SETTINGS[0], **json.loads(rows[0]["measured"])}
    assert record["values"] == VALUES
    assert record["trial"] == trial_id(VALUES) == Path(folder).name
    assert record == read_record(folder)
    assert min(record["latency_ms"], record["memory_mb"], record["seconds"]) > 0
    cost = {"latency_ms": record["latency_ms"], "memory_mb": record["memory_mb"]}
    assert told == [{"objective": objectives[place], "progress": 100, **cost}]

    # the kept scores are those that the objective was measured by
    validation_set, scores = ValidationSet(record["proxy"]), np.load(f"{folder}/best-scores.npy")
    aurocs = []
    for category in ("cog", "weave"):
        for kind in ("cutpaste_patch", "shade"):
            own = (validation_set.category == category) & (
                (validation_set.label == 0) | (validation_set.recipe == kind)
            )
            aurocs.append(roc_auc_score(validation_set.label[own], scores[own]))
    assert record["best"]["metrics"]["image_auroc"] == pytest.approx(np.mean(aurocs))
    assert record["best"]["metrics"]["union_image_auroc"] == pytest.approx(
        np.mean([_union(validation_set, scores, kind) for kind in ("cutpaste_patch", "shade")])
    )


def _union(validation_set: ValidationSet, scores: np.ndarray, kind: str) -> float:
    own = (validation_set.label == 0) | (validation_set.recipe == kind)
    return float(roc_auc_score(validation_set.label[own], scores[own]))


def test_a_trial_run_again_tells_the_same_without_work(
    campaign: MemoryCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(campaign, VALUES)
    forbid(monkeypatch)
    before = {path.name: path.read_bytes() for path in Path(campaign.trial_folder(VALUES)).iterdir()}
    assert run(campaign, dict(reversed(VALUES.items()))) == first
    assert {path.name: path.read_bytes() for path in Path(campaign.trial_folder(VALUES)).iterdir()} == before
    with pytest.raises(AssertionError, match="worked again"):
        run(campaign, {**VALUES, "mask_threshold": 0.8})


def test_all_settings_of_finished_trials_are_read(campaign: MemoryCampaign) -> None:
    records = [run(campaign, {"bank.coreset_ratio": ratio})[0] for ratio in (0.1, 0.5)]
    stopped = write_early_end(
        campaign.trial_folder({"bank.coreset_ratio": 0.3}), {"bank.coreset_ratio": 0.3}, "stopped"
    )
    ran = CampaignRun(campaign, [*records, stopped], 3, 1.0, True)
    settings = read_settings(ran)
    assert [one["trial"] for one in settings] == [record["trial"] for record in records for _ in SETTINGS]
    for place, record in enumerate(records):
        own = settings[4 * place : 4 * place + 4]
        assert [one["values"] for one in own] == [{**record["values"], **values} for values in SETTINGS]
        assert [one["reading"] for one in own] == [key_of(values) for values in SETTINGS]
        assert max(one["objective"] for one in own) == record["objective"]
        assert own[0]["metrics"] == record["default"]["metrics"]
        assert own[0]["by_category"] == record["default"]["by_category"]


@pytest.mark.parametrize(
    "values",
    [VALUES, {"bank.coreset_ratio": 1.0, "mask": "off"}, {"mask": "soft"}, {"bank": {"projection": 0, "seed": 4}}],
)
def test_a_recipe_makes_the_bank_of_the_trial(
    inline: None, campaign: MemoryCampaign, values: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, and with it the scores."""
    record, _ = run(campaign, values)
    bank = fit_bank(campaign, values).bank
    assert bank is not None
    path = tmp_path / "best.yaml"
    path.write_bytes(recipe_text(recipe(campaign, {**values, **record["best"]["values"]}, None), ["a recipe"]))
    given = ["--config", str(path), "--shards", campaign.shards.uri, "--output", str(tmp_path / "model")]
    options = parse(train_options(), ["uniformaly", *given])
    assert options.method == campaign.config_of({**values, **record["best"]["values"]})
    fit_banks("uniformaly", options.method, dataclasses.replace(options, tracking=UNTRACKED))
    model = unianom.load(tmp_path / "model")
    assert isinstance(model.method, MemoryMethod)
    assert model.method.bank is not None
    np.testing.assert_array_equal(bank.vectors(), model.method.bank.vectors())
    assert bank.rows > 0
    validation_set = ValidationSet(record["proxy"])
    batches = validation_set.batches(5, model.method.input, torch.device("cpu"))
    scores = np.concatenate([model.method.predict(batch).score.numpy() for batch in batches])
    kept = np.load(f"{campaign.trial_folder(values)}/best-scores.npy")
    np.testing.assert_allclose(kept, scores, rtol=1e-4, atol=1e-6)


def test_patches_are_projected_part_by_part(campaign: MemoryCampaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs/train.py does it: products of other shapes differ in their last bits, and so may the coreset."""
    monkeypatch.setattr(encodings, "MASKED_AT_ONCE", 2)
    made, own = campaign.encoding_of({}), campaign.config_of({"mask": "off"})
    features = made.cache.open()
    arrays = features.arrays("patches", features.parts_of("learned"))
    assert len(arrays) > 2
    assert len(arrays[0]) > 2
    matrix = random_projection(48, 16, seed=0)
    expected = np.concatenate([array.reshape(-1, 48) @ matrix for array in arrays])
    method = load_memory_method(made.encoder, CPU)
    np.testing.assert_array_equal(made.bank_patches(method, own).projected(16, 0), expected)


def test_masks_of_a_trial_count(campaign: MemoryCampaign) -> None:
    """The values above do mask something, or the banks would be compared for nothing."""
    made = campaign.encoding_of({})
    method = load_memory_method(made.encoder, CPU)
    patches = {
        threshold: made.bank_patches(method, campaign.config_of({"mask_threshold": threshold})).rows
        for threshold in (0.0, 0.9)
    }
    everything = made.bank_patches(method, campaign.config_of({"mask": "off"})).rows
    assert 0 < patches[0.9] < patches[0.0] <= everything
    assert everything == len(campaign.chosen.learn) * 64


# ---- encoded images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"mask_threshold": 0.9, "mask_kernel": 1}, {"mask": "off"}, {"mask": "soft"}])
def test_encoded_images_are_what_the_method_embeds(campaign: MemoryCampaign, values: dict[str, Any]) -> None:
    made = campaign.encoding_of({})
    encoder, own = load_memory_method(made.encoder, CPU), campaign.config_of(values)
    method = remade(encoder, own)
    assert isinstance(method, MemoryMethod)
    found = list(made.compared_patches(encoder, own))
    validation_set = ValidationSet(made.validation_set)
    batches = list(validation_set.batches(7, method.input, torch.device("cpu")))
    with torch.inference_mode():
        expected = [method.embed(batch) for batch in batches]
    torch.testing.assert_close(
        torch.cat([one.patches for one in found]), torch.cat([one.patches for one in expected]), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(torch.cat([one.keep for one in found]), torch.cat([one.keep for one in expected]))
    assert len(found) > 1


def test_images_are_encoded_once_for_all_banks(
    prepared: MemoryCampaign, in_this_process: None, sharp_vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared.encoding_of({})

    class Never:
        def __init__(self, **_: Any) -> None:
            raise AssertionError("encoded again")

    monkeypatch.setattr(feature_cache, "CacheWriter", Never)
    other = {"bank.coreset_ratio": 0.2, "mask_threshold": 0.5, "mask": "soft", "k_ratio": 0.3, "neighbours": 9}
    assert encode(prepared, prepared.config_of(other), made.validation_set) == made
    with pytest.raises(AssertionError, match="encoded again"):
        encode(prepared, prepared.config_of({"blocks": [0]}), made.validation_set)
    # without a mask the network is not asked for its attention
    with pytest.raises(AssertionError, match="encoded again"):
        encode(prepared, prepared.config_of({"mask": "off"}), made.validation_set)


def test_a_killed_encoding_goes_on(
    prepared: MemoryCampaign, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, own = prepared.encoding_of({}), prepared.config_of({})
    elsewhere = dataclasses.replace(prepared, folder=str(tmp_path))
    writer, left = feature_cache.CacheWriter, [4]

    class Mortal(writer):  # type: ignore[misc, valid-type]
        def run(self, task: dict[str, Any]) -> dict[str, Any]:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return super().run(task)

    monkeypatch.setattr(feature_cache, "CacheWriter", Mortal)
    with pytest.raises(KeyboardInterrupt):
        encode(elsewhere, own, whole.validation_set)
    left[0] = 10**9
    again = encode(elsewhere, own, whole.validation_set)
    names = [name for name in files.list_names(whole.cache.uri) if name.endswith(".npy")]
    assert len(names) > 8
    assert [name for name in files.list_names(again.cache.uri) if name.endswith(".npy")] == names
    for name in names:
        assert Path(again.cache.uri, name).read_bytes() == Path(whole.cache.uri, name).read_bytes()
    tasks = whole.cache.open().parts
    assert 10**9 - left[0] == len(tasks) - 4, "what was encoded is not encoded again"


def test_what_acts_behind_the_network_shares_encoded_images() -> None:
    name = "uniformaly"
    key = encoding_key({"bank.coreset_ratio": 0.1, "mask_threshold": 0.2, "blocks": (0, 1)}, name)
    assert key == encoding_key({"blocks": [0, 1], "bank": {"seed": 3}, "mask": "off"}, name)
    assert key != encoding_key({"blocks": [0, 2]}, name)
    assert encoding_key({"bank.seed": 1}, "patchcore") == encoding_key({}, "patchcore")
    assert encoding_key({"patch_size": 1}, "patchcore") != encoding_key({}, "patchcore")
    assert is_bank_option(UniFormaly, "bank.index")
    assert not is_bank_option(METHODS["patchcore"], "banks")  # type: ignore[arg-type]


# ---- how trials end -------------------------------------------------------------------------------------------------


class Levels:
    """Reads a score for each image, times `k_ratio`, from what was found."""

    map_options = ("neighbours", "blur_sigma")

    def anomaly_maps(
        self, tensors: Mapping[str, torch.Tensor], config: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        maps = torch.zeros(len(tensors["level"]), 8, 8)
        return maps, maps

    def image_scores(self, tensors: Mapping[str, torch.Tensor], anomaly_map: torch.Tensor, config: Any = None) -> Any:
        return tensors["level"] * (torch.nan if config.k_ratio > 0.5 else config.k_ratio)


@dataclasses.dataclass(frozen=True)
class Made(Campaign):
    """A campaign whose trials find a level in each image, or fail."""

    validation_set: str = ""
    error: BaseException | None = None
    fitted: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def fit(self, values: Mapping[str, Any], folder: str, context: TrialContext) -> FittedTrial:
        self.fitted.append(dict(values))
        if self.error is not None:
            raise self.error
        level = torch.arange(len(ValidationSet(self.validation_set)), dtype=torch.float32)
        reader: Any = Levels()
        return FittedTrial(reader, {"level": level}, self.validation_set, 2.0, 3.0)


@pytest.fixture
def made(prepared: MemoryCampaign, tmp_path: Path) -> Made:
    fields = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(Campaign)}
    changes = {"folder": str(tmp_path), "objective": {"image_auroc": 1.0}, "settings": [{}, {"k_ratio": 0.4}]}
    return Made(**{**fields, **changes}, validation_set=prepared.encoding_of({}).validation_set)


def fails(campaign: Campaign, error: type[BaseException], words: str | None) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    with pytest.raises(error, match=words):
        run_trial(campaign, {}, told.append)
    return told


def test_a_setting_without_finite_scores_is_passed_over(made: Made) -> None:
    record, _ = run(dataclasses.replace(made, settings=[{"k_ratio": 0.9}, {"k_ratio": 0.2}, {}]), {})
    assert record["default"] is None
    assert record["best"]["values"] == {"k_ratio": 0.2}, "of equals the first"
    table = pq.read_table(f"{made.trial_folder({})}/settings.parquet").to_pydict()
    assert table["objective"][0] is None
    assert table["measured"][0] is None
    assert table["objective"][1] == table["objective"][2] == record["objective"]


def test_values_without_finite_scores_fail_once(made: Made) -> None:
    broken = dataclasses.replace(made, settings=[{"k_ratio": 0.9}, {"k_ratio": 1.0}])
    assert fails(broken, DataError, "no setting gives finite scores") == []
    record = read_record(made.trial_folder({}))
    assert record is not None
    assert (record["status"], record["objective"], record["best"]) == ("failed", None, None)
    assert record["error"] == "no setting gives finite scores on the validation images"
    assert fails(broken, UnianomError, "no setting gives finite scores") == []
    assert made.fitted == [{}], "fitted a single time"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("this is wrong; mend it"), "this is wrong; mend it"),
        (OptionError("k must be 1"), "k must be 1"),
        (ValueError("first line\n\nlast line"), "ValueError: first line last line"),
        (ZeroDivisionError(), "ZeroDivisionError: no message"),
    ],
)
def test_a_fault_of_its_values_is_recorded_and_told_again(made: Made, error: Exception, words: str) -> None:
    broken = dataclasses.replace(made, error=error)
    fails(broken, type(error), None)
    record = read_record(made.trial_folder({}))
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", words)
    assert record["values"] == {}
    healed = dataclasses.replace(broken, error=None)
    with pytest.raises(UnianomError, match=f"^{words}$"):
        run_trial(healed, {}, lambda _: None)
    assert made.fitted == [{}]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (WorkersLostError("workers died"), "workers died"),
        (OSError(errno.ENOSPC, "no space"), "the disk is full; free space"),
        (ConnectionResetError("reset by peer"), "ConnectionResetError: reset by peer"),
    ],
)
def test_a_trial_whose_machine_failed_is_tried_again(made: Made, error: Exception, words: str) -> None:
    fails(dataclasses.replace(made, error=error), type(error), None)
    folder = made.trial_folder({})
    assert read_record(folder) is None
    crashed = files.read_json(f"{folder}/record.json")
    assert crashed["status"] == "crashed"
    assert crashed["error"].startswith(words)
    begun = files.read_json(f"{folder}/values.json")
    record, _ = run(made, {})
    assert (record["status"], len(made.fitted)) == ("done", 2)
    assert read_record(folder) == record
    assert files.read_json(f"{folder}/values.json") == begun


def test_an_interrupted_trial_has_no_record(made: Made) -> None:
    fails(dataclasses.replace(made, error=KeyboardInterrupt()), KeyboardInterrupt, None)
    assert files.list_names(made.trial_folder({})) == ["values.json"]
    assert run(made, {})[0]["status"] == "done"


def test_a_stopped_trial_tells_its_reports_and_no_end(made: Made) -> None:
    folder = made.trial_folder({})
    reports = [{"progress": 20, "objective": 0.5}, {"progress": 40, "objective": 0.6}]
    files.write_json(f"{folder}/reports.json", reports)
    ended = write_early_end(folder, {}, "stopped")
    assert (ended["status"], ended["reports"], ended["trial"]) == ("stopped", reports, trial_id({}))
    assert run(made, {}) == (ended, reports)
    assert made.fitted == []


def test_what_was_reported_before_an_interruption_is_told_first(made: Made) -> None:
    reports = [{"progress": 20, "objective": 0.5}]
    files.write_json(f"{made.trial_folder({})}/reports.json", reports)
    record, told = run(made, {})
    assert told[:1] == reports
    assert told[1:] == [{"objective": record["objective"], "progress": 100, "latency_ms": 2.0, "memory_mb": 3.0}]
    assert record["reports"] == reports
    assert run(made, {}) == (record, told)


@pytest.mark.parametrize("keep", [False, True])
def test_models_are_kept_on_demand_and_raw_outputs_never(made: Made, keep: bool) -> None:
    folder = made.trial_folder({})
    files.write_bytes(f"{folder}/_work/trained/model.json", b"{}")
    save_raw_outputs(f"{folder}/readings", {"level": torch.zeros(2)}, 1.0)
    run(dataclasses.replace(made, keep_models=keep), {})
    names = {"record.json", "values.json", "settings.parquet"}
    names |= {f"{which}-{what}.npy" for which in ("best", "given") for what in ("scores", "maps")}
    assert set(files.list_names(folder)) == names | ({"_work"} if keep else set())


def test_validations_of_a_training_are_reports(tmp_path: Path) -> None:
    reports = Reports(str(tmp_path), 40)
    reports.metrics({"loss": 3.0}, 5)
    assert read_reports(str(tmp_path)) == []
    reports.metrics({"validation/objective": 0.5, "validation/image_auroc": 0.75, "loss": 2.0}, 10)
    reports.metrics({"validation/objective": 0.6, "validation/image_auroc": 0.7}, 30)
    expected = [
        {"progress": 25, "objective": 0.5, "image_auroc": 0.75},
        {"progress": 75, "objective": 0.6, "image_auroc": 0.7},
    ]
    assert read_reports(str(tmp_path)) == expected
    # a training that went on from an earlier checkpoint tells from there on again
    again = {"progress": 50, "objective": 0.8}
    reports.metrics({"validation/objective": 0.8}, 20)
    assert read_reports(str(tmp_path)) == [expected[0], again]
