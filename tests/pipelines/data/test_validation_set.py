"""Validation images: what is chosen and made, and metrics on them against scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from pipelines.data import validation_set as module
from pipelines.data.options import METRICS, ValidationOptions, check_objective
from pipelines.data.validation_set import (
    Measured,
    ValidationSet,
    build_tests,
    build_validation_set,
    choose_validation_images,
)
from pipelines.training.validation import Validation
from pipelines.tuning.objective import gain_interval
from tests.pipelines.sharded import (
    LIMITS,
    POLICY,
    SIDE,
    Row,
    forbid_test_rows,
    masked,
    sample,
    samples,
    truth,
    write_shards,
)
from unianom import files
from unianom.data.drawing import draw_sample
from unianom.data.image import InputPolicy, decode_prepared, encode_png
from unianom.data.shards import ShardSet
from unianom.data.synthesis import Synthetic
from unianom.data.tensors import normalise
from unianom.errors import DataError, OptionError
from unianom.methods import Method, Prediction

RECIPES = ("cutpaste_patch", "cutpaste_scar", "texture", "shade")

OBJECTIVE = {"image_auroc": 1.0, "pixel_ap": 1.0}


DEFAULT = ValidationOptions()


def drawn(category: str, split: str, count: int) -> list[Row]:
    return [sample(category, split, n, pixels=draw_sample(category, n, size=SIDE)[0]) for n in range(count)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Nine cogs and five weaves to learn from; test images are there, but no file of one can be read."""
    poisoned = [{**row, "image": b"no image"} for row in samples("cog", "test", 3) + masked("weave", "test", 2)]
    cogs, weaves = drawn("cog", "train", 9), drawn("weave", "train", 5)
    parts = [poisoned[:2] + cogs[:4], weaves[:2] + poisoned[2:], cogs[4:] + weaves[2:]]
    return write_shards(tmp_path_factory.mktemp("proxy") / "shards", parts)


def held_out(shards: ShardSet) -> dict[str, list[str]]:
    """All normal images of a set by category."""
    names: dict[str, list[str]] = {}
    for row in shards.table(columns=["sample_id", "category", "split", "label"]).to_pylist():
        if row["split"] != "test" and row["label"] == 0:
            names.setdefault(row["category"], []).append(row["sample_id"])
    return names


def build(shards: ShardSet, folder: Path, options: ValidationOptions = DEFAULT, **changes: Any) -> str:
    groups = held_out(shards)
    defaults: dict[str, Any] = {
        "categories": sorted(groups),
        "held_out": frozenset(name for names in groups.values() for name in names),
        "policy": POLICY,
        "limits": LIMITS,
    }
    return build_validation_set(shards, options=options, folder=str(folder), **{**defaults, **changes})


def rows_of(uri: str) -> list[dict[str, Any]]:
    return pq.read_table(f"{uri}/images.parquet").to_pylist()


def arrays_of(uri: str) -> tuple[np.ndarray, np.ndarray]:
    return files.read_array(f"{uri}/pixels.npy"), files.read_array(f"{uri}/masks.npy")


def bytes_of(uri: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(uri).iterdir() if path.suffix in (".npy", ".parquet")}


def by_hash(names: list[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


# ---- what is made ---------------------------------------------------------------------------------------------------


def test_a_seed_says_every_byte(shards: ShardSet, tmp_path: Path) -> None:
    first, again = build(shards, tmp_path / "a"), build(shards, tmp_path / "b")
    assert bytes_of(first) == bytes_of(again)
    assert len(bytes_of(first)) == 3
    other = build(shards, tmp_path / "a", ValidationOptions(seed=1))
    assert other != first
    assert bytes_of(other)["pixels.npy"] != bytes_of(first)["pixels.npy"]


def test_every_recipe_has_a_copy_of_every_normal_image(shards: ShardSet, tmp_path: Path) -> None:
    uri = build(shards, tmp_path)
    rows = rows_of(uri)
    groups = held_out(shards)
    wanted = sorted((name, category) for category, names in groups.items() for name in names)
    for recipe in ("normal", *RECIPES):
        own = [row for row in rows if row["recipe"] == recipe]
        assert sorted((row["sample_id"], row["category"]) for row in own) == wanted
        assert {row["label"] for row in own} == {int(recipe != "normal")}
    assert len(rows) == 5 * 14
    assert all(row["masked"] for row in rows)
    kinds = files.read_json(f"{uri}/_manifest.json")["kinds"]
    assert kinds == {kind: 14 for kind in ("normal", *RECIPES)}


def test_masks_say_where_copies_differ(shards: ShardSet, tmp_path: Path) -> None:
    uri = build(shards, tmp_path)
    rows, (pixels, masks) = rows_of(uri), arrays_of(uri)
    normal = {row["sample_id"]: n for n, row in enumerate(rows) if row["recipe"] == "normal"}
    images = {row["sample_id"]: row["image"] for part in shards.parts for row in _all_rows(shards, part)}
    for number, row in enumerate(rows):
        original = pixels[normal[row["sample_id"]]]
        np.testing.assert_array_equal(original, decode_prepared(images[row["sample_id"]], POLICY))
        np.testing.assert_array_equal(masks[number], (pixels[number] != original).any(2))
        assert masks[number].any() == (row["recipe"] != "normal")


def _all_rows(shards: ShardSet, part: str) -> list[dict[str, Any]]:
    return [row for batch in shards.read(part, columns=["sample_id", "image"]) for row in batch.to_pylist()]


def test_copies_of_images_without_contrast_are_anomalous_too(tmp_path: Path) -> None:
    """White stays white where a white piece is pasted: drawn again until something differs, or left out."""
    half = np.full((64, 64, 3), 255, np.uint8)
    half[:, :32] = 0
    parts = [
        [sample("cog", "train", 0, pixels=half)],
        [sample("cog", "train", n, pixels=np.full((64, 64, 3), 255, np.uint8)) for n in range(1, 9)],
    ]
    uri = build(write_shards(tmp_path / "shards", parts), tmp_path / "made")
    rows, (pixels, masks) = rows_of(uri), arrays_of(uri)
    normal = {row["sample_id"]: n for n, row in enumerate(rows) if row["recipe"] == "normal"}
    for number, row in enumerate(rows):
        if row["recipe"] != "normal":
            different = (pixels[number] != pixels[normal[row["sample_id"]]]).any(2)
            assert different.any()
            np.testing.assert_array_equal(masks[number], different)
    assert {row["recipe"] for row in rows} == {"normal", *RECIPES}


def test_fewer_recipes_leave_the_others_as_they_are(shards: ShardSet, tmp_path: Path) -> None:
    all_of_them, few = build(shards, tmp_path), build(shards, tmp_path, ValidationOptions(recipes=("shade",)))
    rows, (pixels, masks) = rows_of(all_of_them), arrays_of(all_of_them)
    kept = [n for n, row in enumerate(rows) if row["recipe"] in ("normal", "shade")]
    assert rows_of(few) == [rows[n] for n in kept]
    np.testing.assert_array_equal(arrays_of(few)[0], pixels[kept])
    np.testing.assert_array_equal(arrays_of(few)[1], masks[kept])


def test_textures_come_from_their_folder(shards: ShardSet, tmp_path: Path) -> None:
    textures = tmp_path / "textures"
    textures.mkdir()
    flat = np.full((40, 40, 3), (250, 10, 10), np.uint8)
    (textures / "red.png").write_bytes(encode_png(flat))
    recipes: Any = ("texture",)
    own = build(shards, tmp_path, ValidationOptions(recipes=recipes))
    red = build(shards, tmp_path, ValidationOptions(recipes=recipes, textures=str(textures)))
    assert own != red
    pixels, masks = arrays_of(red)
    normals = pixels[:14].astype(int)
    # every pixel is a blend of the original and of one colour, the same in a copy: what is added lies on a line
    for copy, normal, mask in zip(pixels[14:].astype(int), normals, masks[14:], strict=True):
        blended, before = copy[mask], normal[mask]
        for channel in range(3):
            slope, level = np.polyfit(before[:, channel], blended[:, channel], 1)
            np.testing.assert_allclose(slope * before[:, channel] + level, blended[:, channel], atol=1.5)
    with pytest.raises(DataError, match=r"--validation.textures: .*missing"):
        build(shards, tmp_path, ValidationOptions(textures=str(tmp_path / "missing")))


@pytest.mark.parametrize(("count", "cogs", "weaves"), [(8, 4, 4), (7, 3, 3), (14, 7, 5), (1, 1, 1)])
def test_categories_have_even_shares(shards: ShardSet, tmp_path: Path, count: int, cogs: int, weaves: int) -> None:
    uri = build(shards, tmp_path, ValidationOptions(normals=count, seed=5))
    chosen = {row["sample_id"] for row in rows_of(uri)}
    groups = held_out(shards)
    assert chosen == {*by_hash(groups["cog"], 5)[:cogs], *by_hash(groups["weave"], 5)[:weaves]}


def test_only_held_out_images_are_taken(shards: ShardSet, tmp_path: Path) -> None:
    groups = held_out(shards)
    some = frozenset([*groups["cog"][:2], *groups["weave"][-1:]])
    uri = build(shards, tmp_path, held_out=some)
    assert {row["sample_id"] for row in rows_of(uri)} == some
    cogs = build(shards, tmp_path, categories=["cog"])
    assert {row["sample_id"] for row in rows_of(cogs)} == set(groups["cog"])


def test_no_test_image_is_looked_at(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = held_out(shards)
    forbid_test_rows(monkeypatch)
    every = frozenset(name for names in groups.values() for name in names)
    uri = build_validation_set(shards, sorted(groups), every, POLICY, ValidationOptions(), LIMITS, str(tmp_path))
    assert {row["sample_id"] for row in rows_of(uri)} == every
    with pytest.raises(DataError, match="read test rows"):
        build_tests(shards, sorted(groups), POLICY, LIMITS, str(tmp_path))


def test_what_is_made_is_found_again(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = held_out(shards)
    uri = build(shards, tmp_path)
    before = bytes_of(uri)
    Path(uri, "_manifest.json").unlink()  # as a killed process leaves it
    Path(uri, "pixels.npy").unlink()
    assert build(shards, tmp_path) == uri
    assert bytes_of(uri) == before
    every = frozenset(name for names in groups.values() for name in names)
    monkeypatch.setattr(ShardSet, "read", None)
    for options in (ValidationOptions(), ValidationOptions(pixel_stride=2), ValidationOptions(labelled=False)):
        assert build_validation_set(shards, sorted(groups), every, POLICY, options, LIMITS, str(tmp_path)) == uri


def test_copies_are_drawn_by_seed_number_and_kind(shards: ShardSet) -> None:
    """Hand-computed: training's own kind has no name, so that its copies go by seed and number alone."""
    groups = held_out(shards)
    every = frozenset(name for names in groups.values() for name in names)

    def dot(pixels: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Synthetic:
        made, mask = other.copy(), np.zeros((SIDE, SIDE), bool)
        mask[tuple(rng.integers(0, SIDE, 2))] = rng.random() < 0.7  # else it is as it was
        made[mask] = 255
        return Synthetic(made, mask, "shade")

    images = choose_validation_images(
        shards,
        sorted(groups),
        every,
        POLICY,
        LIMITS,
        normals=8,
        anomalous=None,
        labelled=False,
        makers={"": dot, "dot": dot},
        seed=5,
    )
    normal = images[:8]
    assert {image.sample_id for image in normal} == {
        *by_hash(groups["cog"], 5)[:4],
        *by_hash(groups["weave"], 5)[:4],
    }
    assert [(image.recipe, image.label, image.mask is not None) for image in normal] == [("normal", 0, True)] * 8
    assert len(images) == 24
    for kind, copies in (("", images[8:16]), ("dot", images[16:])):
        for number, copy in enumerate(copies):
            rng = np.random.default_rng([5, number, *kind.encode()])
            expected = dot(normal[number].pixels, normal[number - 1].pixels, rng)
            np.testing.assert_array_equal(copy.pixels, expected.image)
            np.testing.assert_array_equal(copy.mask, expected.mask)
            assert (copy.recipe, copy.label) == (kind, int(expected.mask.any()))
            assert (copy.sample_id, copy.category) == (normal[number].sample_id, normal[number].category)
    assert {image.label for image in images[8:]} == {0, 1}


def test_campaigns_and_trainings_choose_the_same_normal_images(shards: ShardSet, tmp_path: Path) -> None:
    groups = held_out(shards)
    every = frozenset(name for names in groups.values() for name in names)
    uri = build(shards, tmp_path, ValidationOptions(normals=7, seed=3, recipes=("shade",)))
    chosen = [row["sample_id"] for row in rows_of(uri) if row["recipe"] == "normal"]
    shown = Shown()
    Validation(shards, sorted(groups), every, shown, None, 14, 4, LIMITS, 3).run()
    assert len(shown.images) == 2 * len(chosen)
    wanted = np.stack([image for n, image in enumerate(arrays_of(uri)[0]) if rows_of(uri)[n]["recipe"] == "normal"])
    torch.testing.assert_close(torch.stack(shown.images[: len(chosen)]), normalise(list(wanted), POLICY))


class Shown(Method):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images: list[torch.Tensor] = []

    @property
    def input(self) -> InputPolicy:
        return POLICY

    def predict(self, images: torch.Tensor) -> Prediction:
        self.images += list(images)
        maps = images.mean(1)
        return Prediction(maps, images.mean((1, 2, 3)), maps, images)


# ---- labelled images ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Nuts with a labelled "val" split, one image of it without a mask, and bolts without any."""
    parts = [
        masked("nut", "val", 3) + samples("nut", "val", 2) + samples("nut", "train", 3),
        [sample("nut", "val", 9, 1), *masked("nut", "test", 2), *masked("nut", "train", 2), *samples("bolt", "val", 2)],
    ]
    return write_shards(tmp_path_factory.mktemp("labelled") / "shards", parts)


VAL = [*masked("nut", "val", 3), sample("nut", "val", 9, 1)]


@pytest.mark.parametrize("wish", [None, True])
def test_labelled_images_take_the_place_of_synthetic_ones(
    labelled: ShardSet, tmp_path: Path, wish: bool | None
) -> None:
    uri = build(labelled, tmp_path, ValidationOptions(labelled=wish), categories=["nut"])
    rows, (pixels, masks) = rows_of(uri), arrays_of(uri)
    anomalous = {row["sample_id"]: n for n, row in enumerate(rows) if row["label"] == 1}
    assert set(anomalous) == {row["sample_id"] for row in VAL}
    assert {rows[n]["recipe"] for n in anomalous.values()} == {"labelled"}
    for row in VAL:
        number = anomalous[row["sample_id"]]
        np.testing.assert_array_equal(pixels[number], decode_prepared(row["image"], POLICY))
        assert rows[number]["masked"] == (row["mask"] is not None)
        expected = np.zeros((SIDE, SIDE), bool) if row["mask"] is None else truth(row)
        np.testing.assert_array_equal(masks[number], expected)
    assert {row["sample_id"] for row in rows if row["label"] == 0} == set(held_out(labelled)["nut"])


def test_labelled_images_are_left_out_on_demand(labelled: ShardSet, tmp_path: Path) -> None:
    uri = build(labelled, tmp_path, ValidationOptions(labelled=False))
    assert {row["recipe"] for row in rows_of(uri)} == {"normal", *RECIPES}
    assert {row["sample_id"] for row in rows_of(uri)} == {n for names in held_out(labelled).values() for n in names}


def test_labelled_images_that_are_not_there_are_refused(shards: ShardSet, labelled: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no anomalous image in a "val" split; leave out --validation\.labelled'):
        build(shards, tmp_path, ValidationOptions(labelled=True))
    with pytest.raises(DataError, match=r"no anomalous image .* category bolt; .*--validation\.labelled false"):
        build(labelled, tmp_path)


def test_a_category_without_held_out_images_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no normal image .* category weave; .*--threshold\.validation_fraction"):
        build(shards, tmp_path, held_out=frozenset(held_out(shards)["cog"]))


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    rows = samples("bolt", "train", 3)
    rows[1] = {**rows[1], "image": b"no image"}
    with pytest.raises(DataError, match=r"set/bolt/train/0/001\.png: not an image"):
        build(write_shards(tmp_path / "shards", [rows]), tmp_path / "made")


@pytest.mark.parametrize(
    "options", [{"normals": 0}, {"pixel_stride": 0}, {"recipes": ()}, {"recipes": ("shade", "shade")}]
)
def test_nonsense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"^{next(iter(options))}"):
        ValidationOptions(**options)


def test_the_test_split_in_the_form_of_validation_images(
    labelled: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = samples("bolt", "test", 6) + masked("bolt", "test", 5) + samples("bolt", "train", 2)
    uri = build_tests(write_shards(tmp_path / "s", [rows]), ["bolt"], POLICY, LIMITS, str(tmp_path / "all"))
    assert [row["sample_id"] for row in rows_of(uri)] == [row["sample_id"] for row in rows[:11]]
    assert [row["recipe"] for row in rows_of(uri)] == ["normal"] * 6 + ["test"] * 5
    np.testing.assert_array_equal(arrays_of(uri)[1][6:], [truth(row) for row in rows[6:11]])
    monkeypatch.setattr(module, "MOST_TEST_IMAGES", 6)
    few = build_tests(ShardSet.open(tmp_path / "s"), ["bolt"], POLICY, LIMITS, str(tmp_path / "few"))
    assert [row["label"] for row in rows_of(few)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="no normal image in a labelled test split"):
        build_tests(labelled, ["nut"], POLICY, LIMITS, str(tmp_path / "none"))


# ---- reading them ---------------------------------------------------------------------------------------------------


def test_batches_are_the_normalised_pixels_in_order(shards: ShardSet, tmp_path: Path) -> None:
    uri = build(shards, tmp_path, ValidationOptions(recipes=("shade",)))
    pixels, masks = arrays_of(uri)
    validation_set = ValidationSet(uri, 4)
    assert len(validation_set) == len(pixels) == 28
    whole = list(validation_set.batches(5, POLICY, torch.device("cpu")))
    assert [len(batch) for batch in whole] == [5, 5, 5, 5, 5, 3]
    expected = normalise(list(pixels), POLICY)
    torch.testing.assert_close(torch.cat(whole), expected, rtol=0, atol=0)
    np.testing.assert_array_equal(validation_set.pixels, pixels)
    maps = np.arange(28 * SIDE * SIDE, dtype=np.float32).reshape(28, SIDE, SIDE)
    thinned = validation_set.thinned(maps)
    assert thinned.shape == (28, 16, 16)
    assert thinned[3, 2, 1] == maps[3, 2 + 4 * 2, 2 + 4 * 1]
    np.testing.assert_array_equal(ValidationSet(uri, 1).thinned(masks), masks)


# ---- metrics --------------------------------------------------------------------------------------------------------


def plain_metrics(
    validation_set: ValidationSet, masks: np.ndarray, scores: np.ndarray, maps: np.ndarray
) -> dict[Any, Any]:
    """Image and pixel metrics by category and recipe, by scikit-learn; the category of unions is None."""
    found: dict[Any, Any] = {}
    for category in [None, *sorted(set(validation_set.category))]:
        for recipe in sorted(set(validation_set.recipe) - {"normal"}):
            own = [
                n
                for n in range(len(validation_set))
                if category in (None, validation_set.category[n]) and validation_set.recipe[n] in ("normal", recipe)
            ]
            labels = [int(validation_set.label[n]) for n in own]
            if len(set(labels)) < 2:
                continue
            row = {
                "image_auroc": roc_auc_score(labels, scores[own]),
                "image_ap": average_precision_score(labels, scores[own]),
            }
            marked = [n for n in own if validation_set.masked[n]]
            if masks[marked].any():
                row["pixel_auroc"] = roc_auc_score(masks[marked].ravel(), maps[marked].ravel())
                row["pixel_ap"] = average_precision_score(masks[marked].ravel(), maps[marked].ravel())
            found[category, recipe] = row
    return found


def plain_objective(table: Mapping[Any, Any], objective: Mapping[str, float]) -> float:
    total = 0.0
    for name, weight in objective.items():
        union, own = name.startswith("union_"), name.removeprefix("union_")
        values = [row[own] for (category, _), row in table.items() if (category is None) == union and own in row]
        total += weight * sum(values) / len(values)
    return total / sum(objective.values())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, shards: ShardSet) -> str:
    return build(shards, tmp_path_factory.mktemp("mixed"))


def measure(
    validation_set: ValidationSet, scores: np.ndarray, maps: np.ndarray, objective: Mapping[str, float]
) -> Measured:
    return validation_set.measured(
        validation_set.image_table(scores), validation_set.pixel_table(maps, union=True), objective
    )


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVE,
        {"image_ap": 3.0},
        {"image_auroc": 1.0, "image_ap": 2.0, "pixel_auroc": 0.5, "pixel_ap": 4.0},
        {"union_image_auroc": 1.0, "union_image_ap": 0.25, "pixel_auroc": 1.0},
        {"union_pixel_auroc": 1.0, "union_pixel_ap": 3.0},
    ],
)
def test_metrics_are_those_of_a_plain_loop(mixed: str, stride: int, objective: dict[str, float]) -> None:
    validation_set, rng = ValidationSet(mixed, stride), np.random.default_rng(7)
    masks = arrays_of(mixed)[1][:, stride // 2 :: stride, stride // 2 :: stride]
    # few levels, so that scores tie
    scores = rng.integers(0, 6, len(validation_set)).astype(np.float32) + validation_set.label
    maps = (rng.integers(0, 9, masks.shape) + 2 * masks).astype(np.float32)
    measured = measure(validation_set, scores, maps, objective)
    table = plain_metrics(validation_set, masks, scores, maps)
    assert len(table) == 3 * 4
    for name in METRICS:
        assert measured.metrics[name] == pytest.approx(plain_objective(table, {name: 1.0}))
    assert measured.objective == pytest.approx(plain_objective(table, objective))
    own = {name.removeprefix("union_"): weight for name, weight in objective.items()}
    assert set(measured.by_category) == {"cog", "weave"}
    for category, value in measured.by_category.items():
        rows = {key: row for key, row in table.items() if key[0] == category}
        assert value == pytest.approx(plain_objective(rows, own))
    assert set(measured.by_recipe) == set(RECIPES)
    for recipe, value in measured.by_recipe.items():
        rows = {key: row for key, row in table.items() if key[0] is not None and key[1] == recipe}
        assert value == pytest.approx(plain_objective(rows, own))


def test_perfect_and_opposite_scores(mixed: str) -> None:
    validation_set = ValidationSet(mixed)
    masks = arrays_of(mixed)[1].astype(np.float32)
    best = measure(validation_set, validation_set.label.astype(np.float32), masks, {name: 1.0 for name in METRICS})
    assert best.objective == 1
    assert set(best.metrics.values()) == {1.0}
    worst = measure(
        validation_set, -validation_set.label.astype(np.float32), -masks, {"image_auroc": 1.0, "pixel_auroc": 1.0}
    )
    assert worst.objective == 0


def test_a_union_asks_for_scores_on_one_scale(mixed: str) -> None:
    """Each category is perfect on its own scale; together they are not."""
    validation_set = ValidationSet(mixed)
    scores = (validation_set.label + 10 * (validation_set.category == "cog")).astype(np.float32)
    measured = measure(validation_set, scores, arrays_of(mixed)[1].astype(np.float32), OBJECTIVE)
    assert measured.metrics["image_auroc"] == 1
    # of the 9 + 5 normal images 9 lie above all 5 anomalous weaves: 5 · 9 of 14 · 14 pairs are lost for each recipe
    assert measured.metrics["union_image_auroc"] == pytest.approx(1 - 45 / 196)


def test_unions_of_pixels_are_measured_on_demand(mixed: str) -> None:
    validation_set = ValidationSet(mixed, 4)
    scores, maps = np.arange(70, dtype=np.float32), np.random.default_rng(1).random((70, 16, 16), np.float32)
    image, alone, both = (
        validation_set.image_table(scores),
        validation_set.pixel_table(maps),
        validation_set.pixel_table(maps, union=True),
    )
    assert {key: row for key, row in both.items() if key[0]} == alone
    assert {key for key in both if not key[0]} == {("", recipe) for recipe in RECIPES}
    assert set(validation_set.measured(image, alone, OBJECTIVE).metrics) == set(METRICS) - {
        "union_pixel_auroc",
        "union_pixel_ap",
    }
    with pytest.raises(DataError, match="the objective needs union_pixel_ap"):
        validation_set.measured(image, alone, {"union_pixel_ap": 1.0})


def test_images_without_a_mask_count_in_image_metrics_alone(labelled: ShardSet, tmp_path: Path) -> None:
    uri = build(labelled, tmp_path, categories=["nut"])
    validation_set, masks, rng = ValidationSet(uri), arrays_of(uri)[1], np.random.default_rng(0)
    scores, maps = rng.random(len(validation_set)).astype(np.float32), rng.random(masks.shape).astype(np.float32)
    measured = measure(validation_set, scores, maps, OBJECTIVE)
    table = plain_metrics(validation_set, masks, scores, maps)
    assert measured.metrics["pixel_ap"] == pytest.approx(plain_objective(table, {"pixel_ap": 1.0}))
    assert measured.metrics["image_auroc"] == pytest.approx(roc_auc_score(validation_set.label, scores))
    (without,) = np.flatnonzero(~validation_set.masked)
    maps[without] = 1e6
    assert measure(validation_set, scores, maps, OBJECTIVE).metrics == measured.metrics
    scores[without] = -1
    assert measure(validation_set, scores, maps, OBJECTIVE).metrics["image_auroc"] < measured.metrics["image_auroc"]


def test_an_objective_these_images_cannot_tell_is_refused(tmp_path: Path) -> None:
    rows = samples("nut", "val", 2) + samples("nut", "val", 2, label=1, first=5) + samples("nut", "train", 1)
    validation_set = ValidationSet(build(write_shards(tmp_path / "shards", [rows]), tmp_path / "made"))
    scores, maps = np.arange(5, dtype=np.float32), np.zeros((5, SIDE, SIDE), np.float32)
    assert validation_set.pixel_table(maps) == {}
    with pytest.raises(DataError, match=r"the objective needs pixel_ap, .*\(no anomalous image has a mask\)"):
        measure(validation_set, scores, maps, OBJECTIVE)
    assert measure(validation_set, scores, maps, {"image_auroc": 1.0}).metrics.keys() == {
        "image_auroc",
        "image_ap",
        "union_image_auroc",
        "union_image_ap",
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(mixed: str, value: float) -> None:
    validation_set = ValidationSet(mixed)
    scores = np.zeros(len(validation_set), np.float32)
    scores[[3, 5]] = value
    with pytest.raises(DataError, match="2 of 70 validation scores are not finite"):
        validation_set.image_table(scores)


def test_objectives_of_known_metrics_with_weights_are_taken() -> None:
    check_objective(OBJECTIVE)
    check_objective({name: 0.5 for name in METRICS})
    for objective, words in (
        ({}, "at least"),
        ({"image_auroc": 0.0}, "weight above 0"),
        ({"image_auroc": 1.0, "pixel_ap": -1.0}, "weight above 0"),
        ({"image_auroc": float("nan")}, "weight above 0"),
        ({"aupro": 1.0}, "unknown metric 'aupro'; known: image_auroc"),
    ):
        with pytest.raises(OptionError, match=words):
            check_objective(objective)


# ---- is a gain beyond chance ----------------------------------------------------------------------------------------


def test_images_drawn_anew_keep_the_size_of_every_kind(mixed: str) -> None:
    validation_set = ValidationSet(mixed)
    drawn = validation_set.resampled(np.random.default_rng(0))
    changed = 0
    for category in ("", *validation_set.categories):
        for recipe in validation_set.recipes:
            before, after = validation_set._groups[category, recipe], drawn._groups[category, recipe]
            for own, again in zip(before, after, strict=True):
                assert len(own) == len(again)
                assert set(again) <= set(own)
                changed += sorted(again) != sorted(own)
    assert changed, "they are drawn with replacement"
    for category in validation_set.categories:
        normal = {tuple(drawn._groups[category, recipe][0]) for recipe in validation_set.recipes}
        assert len(normal) == 1, "the same normal images for every recipe"


def test_the_interval_of_a_gain(mixed: str) -> None:
    validation_set = ValidationSet(mixed)
    objective = {"image_auroc": 1.0}
    maps = np.zeros((len(validation_set), 2, 2), np.float32)
    right = (validation_set.label + np.linspace(0, 0.5, len(validation_set))).astype(np.float32)
    assert gain_interval(validation_set, (right, maps), (right, maps), objective) == (0.0, 0.0)
    # every draw tells the two apart wholly
    assert gain_interval(validation_set, (right, maps), (-right, maps), objective) == (1.0, 1.0)
    noise = np.random.default_rng(5).normal(size=(2, len(validation_set))).astype(np.float32)
    low, high = gain_interval(validation_set, (noise[0], maps), (noise[1], maps), objective)
    plain = []
    rng = np.random.default_rng(0)
    for _ in range(100):
        drawn = validation_set.resampled(rng)
        rows = [
            [
                roc_auc_score(np.repeat([0, 1], [len(n), len(a)]), np.concatenate([scores[n], scores[a]]))
                for category in validation_set.categories
                for n, a in [drawn._groups[category, recipe]]
            ]
            for scores in noise
            for recipe in validation_set.recipes
        ]
        half = len(validation_set.recipes)
        plain.append(np.mean(rows[:half]) - np.mean(rows[half:]))
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=1e-9)
    assert low < 0 < high, "noise has no gain over noise"
