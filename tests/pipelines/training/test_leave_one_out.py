"""Which normal images thresholds are chosen from, what they promise, and who is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unianom
from jobs.train import main
from pipelines.data.options import SplitOptions
from pipelines.data.splits import choose_samples
from pipelines.inference.decide import decide
from pipelines.inference.options import DecideOptions, ScoreOptions
from pipelines.inference.score import score
from pipelines.runtime.options import RuntimeOptions
from pipelines.training.options import ThresholdOptions, TrainJobOptions, train_options
from pipelines.training.train import train
from tests.pipelines.conftest import ONE, UNTRACKED, Small, tiny_method, tiny_training
from tests.pipelines.sharded import LIMITS, NORMALS, samples, write_shards
from unianom.configs.bank import BankConfig
from unianom.data.image import decode_prepared
from unianom.data.shards import ScoreSet, ShardSet
from unianom.data.tensors import normalise
from unianom.errors import DataError, OptionError
from unianom.memory.coreset import random_projection
from unianom.memory.cover import cover_without_images
from unianom.memory.index import MemoryBank
from unianom.methods import MemoryMethod

LEARNED = [row for rows in NORMALS for row in rows if row["split"] == "train"]
"""30 images: 13 bolts, 9 nuts and 8 washers."""


@pytest.fixture(autouse=True)
def serial(inline: None) -> None:
    """No test here has Ray."""


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_shards(tmp_path / "shards")


def fit(shards: ShardSet, folder: Path, **changes: Any) -> Any:
    given = {"threshold": ThresholdOptions(), "batch_size": 3, **changes}
    (result,) = train(tiny_training(Path(shards.uri), folder, **given))
    return result


def pixels(rows: list[dict[str, Any]], method: MemoryMethod) -> torch.Tensor:
    return normalise([decode_prepared(row["image"], method.input, LIMITS) for row in rows], method.input)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_a_model_keeps_the_scores_of_its_images_by_banks_without_them(
    shards: ShardSet, tmp_path: Path, scope: str
) -> None:
    method = tiny_method(mask="binary", mask_scope=scope, neighbours=2, bank=BankConfig(coreset_ratio=1))
    fit(shards, tmp_path / "model", method=method)
    model = unianom.load(tmp_path / "model")
    own = model.method
    assert isinstance(own, MemoryMethod)
    bank = own.bank
    assert bank is not None
    assert bank.origins is not None
    assert list(bank.origins.images) == [row["sample_id"] for row in LEARNED]
    for number in (0, 8, 29):  # each vector is one of the patches of the image that it is said to be of
        vectors = bank.vectors()[bank.origins.rows == number]
        part = [row for row in LEARNED[number : number + 1]]
        patches = own.embed(pixels(part, own)).patches[0].detach().numpy()
        nearest = ((vectors[:, None] - patches[None]) ** 2).sum(2).min(1)
        known = nearest < 1e-6
        assert len(vectors) > 0
        assert known.all() if scope == "image" else known.any()  # in batch scope some patches are zeros
    expected: dict[str, list[float]] = {}
    for number, row in enumerate(LEARNED):
        own.bank = MemoryBank.build(bank.vectors()[bank.origins.rows != number])
        expected.setdefault(row["category"], []).append(float(own.predict(pixels([row], own)).score))
    assert sorted(model.normal_scores) == sorted(expected) == ["bolt", "nut", "washer"]
    for name, scores in expected.items():
        np.testing.assert_allclose(model.normal_scores[name], sorted(scores), rtol=1e-4)
    assert model.threshold is not None
    every = [score for scores in model.normal_scores.values() for score in scores]
    assert model.threshold.value == sorted(every)[-3], "30 normals promise 0.2 with two above"
    assert (model.threshold.n_normals, model.threshold.rank, model.threshold.source) == (30, 28, "leave_one_out")
    assert model.threshold.target_fpr == 0.2
    assert model.category_thresholds == {}  # 13 images support no rate of 20 %
    made = model.provenance
    assert (made["bank"]["images"], made["held_out_normals"]) == (30, 0)
    assert made["notice"].startswith(
        "the threshold promises a false-positive rate of 0.2, since 30 normal images are few"
    )


def test_what_an_image_leaves_uncovered_is_covered_again(shards: ShardSet, tmp_path: Path) -> None:
    config = BankConfig(coreset_ratio=0.2, projection=16)
    fit(shards, tmp_path / "model", method=tiny_method(mask="off", bank=config))
    model = unianom.load(tmp_path / "model")
    own = model.method
    assert isinstance(own, MemoryMethod)
    bank = own.bank
    assert bank is not None
    assert bank.origins is not None
    patches = torch.cat([own.embed(pixels([row], own)).patches for row in LEARNED]).detach().numpy()  # 30 16 D
    flat, images = patches.reshape(-1, patches.shape[2]), np.repeat(np.arange(30, dtype=np.int32), patches.shape[1])
    chosen = np.array([((flat - vector) ** 2).sum(1).argmin() for vector in bank.vectors()])
    assert (images[chosen] == bank.origins.rows).all()
    features = flat @ random_projection(flat.shape[1], 16, seed=0)
    added = cover_without_images(features, chosen, images, 30, bank.metadata["cover_radius"])
    assert sum(map(len, added)) > 20
    expected = []
    for number, row in enumerate(LEARNED):
        others = bank.vectors()[bank.origins.rows != number]
        own.bank = MemoryBank.build(np.concatenate([others, flat[added[number]]]))
        expected.append(float(own.predict(pixels([row], own)).score))
    found = [score for scores in model.normal_scores.values() for score in scores]
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=1e-4)


def test_the_number_of_workers_changes_no_byte(shards: ShardSet, tmp_path: Path) -> None:
    for workers in (1, 3):
        fit(shards, tmp_path / str(workers), runtime=RuntimeOptions(workers=workers))
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("1", "3")]
    names = [
        [str(path.relative_to(tmp_path / name)) for path in found] for name, found in zip("13", files, strict=True)
    ]
    assert names[0] == names[1]
    assert "bank/origins.parquet" in names[0]
    same = [
        one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True) if one.name != "plan.json"
    ]
    assert all(same)


def test_categories_with_enough_images_get_thresholds_of_their_own(tmp_path: Path, capsys: Any) -> None:
    rows = samples("bolt", "train", 20) + samples("nut", "train", 6) + samples("bolt", "test", 3)
    shards = write_shards(tmp_path / "shards", [rows])
    options = tiny_training(Path(shards.uri), tmp_path / "model", threshold=ThresholdOptions())
    main(options)
    said = " ".join(capsys.readouterr().out.split())
    model = unianom.load(tmp_path / "model")
    assert model.threshold is not None
    assert list(model.category_thresholds) == ["bolt"]
    bolt = model.category_thresholds["bolt"]
    assert (bolt.value, bolt.n_normals) == (max(model.normal_scores["bolt"]), 20)
    assert bolt.target_fpr == 0.2
    assert f"threshold of bolt {bolt.value:.6g}: at most 20 % of normal images fail, at 95 % confidence" in said
    assert "from 26 normal images, each scored without its own vectors" in said
    between = (bolt.value + model.threshold.value) / 2
    if bolt.value < model.threshold.value:
        assert model.decide(between, None, "bolt") == "fail"
        assert model.decide(between, None, "nut") == model.decide(between, None, None) == "pass"
    one = dataclasses.replace(options, output=str(tmp_path / "one"), threshold=ThresholdOptions(per_category=False))
    assert train(one)[0].category_thresholds == {}


def test_few_images_give_a_threshold_without_a_promise_and_decisions(small: Small, tmp_path: Path) -> None:
    shards = ShardSet.open(small.shards)
    result = fit(shards, tmp_path / "model", few_shot=2)
    assert result.threshold.promised is False
    assert result.threshold.n_normals == result.metrics["images"] == 4
    assert result.threshold.value == max(map(max, unianom.load(tmp_path / "model").normal_scores.values()))
    assert "the threshold promises nothing: 4 normal images are too few, 14 support" in result.notice
    assert "no promise, from too few scores: about 1 in 5 normal images" in result.threshold_lines()[0]
    score(ScoreOptions(str(tmp_path / "model"), shards.uri, output=str(tmp_path / "scores"), runtime=ONE))
    how: dict[str, Any] = {"runtime": ONE, "tracking": UNTRACKED}
    found = decide(DecideOptions(str(tmp_path / "scores"), str(tmp_path / "decisions"), **how))
    assert found.rule.common is not None
    assert found.rule.common.fail == found.rule.common.review == result.threshold
    assert found.summary["promised"] is False
    assert found.summary["notes"][0].startswith("cog: no promise")
    text = json.loads((tmp_path / "decisions" / "section.json").read_text())["text"]
    assert "each scored without its own vectors; promised is: nothing" in text[0]
    with pytest.raises(OptionError, match=r"cannot support a false-positive rate of 0.05"):
        decide(DecideOptions(str(tmp_path / "scores"), str(tmp_path / "strict"), target_fpr=0.05, **how))
    with pytest.raises(DataError, match=r"held no normal image out.*--threshold.source held_out"):
        decide(DecideOptions(str(tmp_path / "scores"), str(tmp_path / "x"), scores_kind="calibrated", **how))
    assert ScoreSet.open(tmp_path / "scores").manifest["models"][0]["normal_scores"]


def test_a_bank_too_small_without_an_image_has_no_threshold(tmp_path: Path) -> None:
    method = tiny_method(mask="off", neighbours=5, bank=BankConfig(coreset_ratio=0.2))  # six vectors of two images
    result = fit(write_shards(tmp_path / "shards", [samples("bolt", "train", 2)]), tmp_path / "model", method=method)
    assert result.threshold is None
    assert "the bank has fewer of others than scores need" in result.notice


# ------------------------------------------------------------------------------------------------ which images count
def split(shards: ShardSet, **changes: Any) -> Any:
    usual: dict[str, Any] = {
        "few_shot": None,
        "seed": 0,
        "validation_fraction": 0.2,
        "target_fpr": None,
        "confidence": 0.95,
    }
    validate = changes.pop("validate", False)
    return choose_samples(shards, shards.categories, SplitOptions(**{**usual, **changes}), validate)


@pytest.mark.parametrize(
    ("rows", "changes", "source", "learned", "held_out"),
    [
        # of 620 a fifth is 124, which support 5 % with two scores above the threshold
        ([("bolt", "train", 620)], {}, "held_out", 496, 124),
        ([("bolt", "train", 615)], {}, "leave_one_out", 615, 0),
        # every category is to have that many, unless there is one threshold for all
        ([("bolt", "train", 620), ("nut", "train", 40)], {}, "leave_one_out", 660, 0),
        ([("bolt", "train", 620), ("nut", "train", 40)], {"per_category": False}, "held_out", 528, 132),
        ([("bolt", "train", 40)], {"target_fpr": 0.4}, "held_out", 32, 8),
        ([("bolt", "train", 40)], {"target_fpr": 0.2}, "leave_one_out", 40, 0),
        # a val split that suffices, one that does not, and one that is larger than the bank
        ([("bolt", "train", 80), ("bolt", "val", 124)], {}, "held_out", 80, 124),
        ([("bolt", "train", 80), ("bolt", "val", 60)], {}, "leave_one_out", 80, 0),
        ([("bolt", "train", 10), ("bolt", "val", 20)], {}, "held_out", 10, 20),
        # said by name, and where images to validate with are needed
        ([("bolt", "train", 40)], {"source": "held_out"}, "held_out", 32, 8),
        ([("bolt", "train", 295)], {"source": "leave_one_out"}, "leave_one_out", 295, 0),
        ([("bolt", "train", 40)], {"validate": True}, "held_out", 32, 8),
        ([("bolt", "train", 40)], {"few_shot": 5}, "leave_one_out", 5, 0),
    ],
)
def test_normal_images_are_held_out_where_they_suffice(
    tmp_path: Path, rows: Any, changes: Any, source: str, learned: int, held_out: int
) -> None:
    made = [{**row, "image": b"none"} for category, name, count in rows for row in plain(category, name, count)]
    chosen, _ = split(write_shards(tmp_path / "shards", [made]), **changes)
    assert (chosen.source, len(chosen.learn), len(chosen.held_out)) == (source, learned, held_out)
    assert not chosen.learn & chosen.held_out


def plain(category: str, name: str, count: int) -> list[dict[str, Any]]:
    """Rows that all have the same image."""
    (row,) = samples(category, name, 1)
    return [{**row, "sample_id": f"{category}/{name}/{number:03d}.png"} for number in range(count)]


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (
            31,
            {"target_fpr": 0.05},
            r"31 normal images cannot support a false-positive rate of 0.05 at 95 % confidence "
            r"\(they support 0.0922 at best, 59 are needed\); leave --threshold.target_fpr out",
        ),
        (
            31,
            {"target_fpr": 0.1, "source": "held_out"},
            r"6 held-out normal images .* 0.394 at best, 29 are needed.*"
            r"--threshold.validation_fraction, take all 31 by --threshold.source leave_one_out, or add",
        ),
        (
            31,
            {"target_fpr": 0.1, "validate": True},
            r"6 held-out .*raise it or --threshold.validation_fraction, or add",
        ),
    ],
)
def test_a_rate_asked_for_and_not_supported_is_refused(tmp_path: Path, count: int, changes: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        split(write_shards(tmp_path / "shards", [plain("bolt", "train", count)]), **changes)


@pytest.mark.parametrize(
    ("count", "changes", "notice"),
    [
        (124, {}, ""),
        (123, {}, "the threshold promises a false-positive rate of 0.1, since 123 normal images are few; more of them"),
        (31, {}, "the threshold promises a false-positive rate of 0.2, since 31 normal images are few; more of them"),
        (31, {"target_fpr": 0.1}, ""),
        (
            13,
            {},
            "the threshold promises nothing: 13 normal images are too few, 14 support a false-positive rate of 0.2 "
            "at 95 % confidence",
        ),
        (5, {"validate": True}, "the threshold promises nothing: 1 held-out normal image is too few"),
        (5, {"few_shot": 1}, "no threshold: by leave_one_out the bank needs a second normal image; add normal images"),
        (1, {"validate": True}, "no threshold: no normal image is held out to choose it from; raise"),
        (9, {"validate": True, "validation_fraction": 0}, "no threshold: no normal image is held out"),
    ],
)
def test_what_too_few_images_lead_to_is_said(tmp_path: Path, count: int, changes: Any, notice: str) -> None:
    _, said = split(write_shards(tmp_path / "shards", [plain("bolt", "train", count)]), **changes)
    assert said.startswith(notice)
    assert bool(said) == bool(notice)


def test_a_method_without_a_bank_has_no_images_to_leave_out(shards: ShardSet, tmp_path: Path) -> None:
    options: TrainJobOptions = train_options()["uniad"](
        shards=shards.uri, output=str(tmp_path / "model"), threshold=ThresholdOptions(source="leave_one_out")
    )
    with pytest.raises(
        OptionError, match=r"source=leave_one_out is for methods with a memory bank, and uniad has none"
    ):
        train(options)
    assert not (tmp_path / "model").exists()


def test_what_is_to_be_calibrated_holds_images_out() -> None:
    options = train_options()["patchcore"](shards="s", output="o", calibrate="cada")
    assert options.split.source == "held_out"
    assert dataclasses.replace(options, calibrate=None).split.source == "auto"
    asked = dataclasses.replace(options, threshold=ThresholdOptions(source="leave_one_out"))
    assert asked.split.source == "leave_one_out"
