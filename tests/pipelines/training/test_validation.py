"""Validation during training: what is shown to the method, and what is told of its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from pipelines.training.validation import Validation
from tests.pipelines.sharded import LIMITS, POLICY, SIDE, forbid_test_rows, picture, sample, write_shards
from unianom.data.image import InputPolicy
from unianom.data.schema import NORMAL
from unianom.data.shards import Selection, ShardSet
from unianom.data.synthesis import Synthetic
from unianom.methods import Method, Prediction


class Brightness(Method):
    """The map is an image's mean over channels, the score the mean of that."""

    name = "brightness"

    def __init__(self, policy: InputPolicy = POLICY) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.policy = policy
        self.seen: list[np.ndarray] = []
        self.batches: list[int] = []

    @property
    def input(self) -> InputPolicy:
        return self.policy

    def predict(self, images: Tensor) -> Prediction:
        assert torch.is_inference_mode_enabled()
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.policy.mean, self.policy.std))
        pixels = torch.round((images * std + mean) * 255).to(torch.uint8)
        self.seen += list(pixels.permute(0, 2, 3, 1).numpy())
        self.batches.append(len(images))
        levels = pixels.float().mean(1)
        return Prediction(levels, levels.mean((1, 2)), levels, levels[:, None])


def images(category: str, split: str, count: int, label: int | None = 0, masked: bool = True) -> list[dict[str, Any]]:
    """Rows of S×S images; anomalous ones have a mask, different from image to image."""
    rows = []
    for number in range(count):
        pixels = picture([*category.encode(), *split.encode(), number, label or 0], SIDE, SIDE)
        mask = np.zeros((SIDE, SIDE), bool)
        mask[number : number + 9, 5 : 20 + number] = True
        rows.append(sample(category, split, number, label, pixels, mask if label and masked else None))
        rows[-1] |= {"pixels": pixels, "truth": mask if label else np.zeros_like(mask)}
    return rows


def shard_set(folder: Path, rows: list[dict[str, Any]]) -> ShardSet:
    stored = [{key: value for key, value in row.items() if key not in ("pixels", "truth")} for row in rows]
    return write_shards(folder, [stored[::2], stored[1::2]])


def validation(shards: ShardSet, method: Method, held_out: Any = None, **changes: Any) -> Validation:
    """With the normals of the "val" split held out, as training does it, unless others are named."""
    if held_out is None:
        held_out = shards.table(Selection(("val",), (), (NORMAL,)), ["sample_id"])["sample_id"].to_pylist()
    arguments: dict[str, Any] = {
        "categories": shards.categories,
        "held_out": frozenset(held_out),
        "synthesiser": None,
        "count": 1000,
        "batch_size": 4,
        "limits": LIMITS,
        "seed": 3,
    }
    return Validation(shards=shards, method=method, **{**arguments, **changes})


def expected(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over categories of scikit-learn's figures, each over the categories where it is defined."""
    figures: dict[str, list[float]] = {"image_auroc": [], "pixel_auroc": [], "pixel_ap": []}
    for category in sorted({row["category"] for row in rows}):
        mine = [row for row in rows if row["category"] == category]
        scores, labels = [row["pixels"].mean() for row in mine], [row["label"] for row in mine]
        if len(set(labels)) == 2:
            figures["image_auroc"].append(roc_auc_score(labels, scores))
        known = [row for row in mine if not row["label"] or row["mask"] is not None]
        truth = np.concatenate([row["truth"].ravel() for row in known])
        if truth.any():
            levels = np.concatenate([row["pixels"].mean(2).astype(np.float32).ravel() for row in known])
            figures["pixel_auroc"].append(roc_auc_score(truth, levels))
            figures["pixel_ap"].append(average_precision_score(truth, levels))
    return {name: float(np.mean(values)) for name, values in figures.items() if values}


def same_images(seen: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    """Whether both hold the same images, in whatever order."""
    return sorted(image.tobytes() for image in seen) == sorted(image.tobytes() for image in wanted)


def chosen(seen: list[np.ndarray], rows: list[dict[str, Any]]) -> list[str]:
    """Names of the images seen."""
    names = {row["pixels"].tobytes(): row["sample_id"] for row in rows}
    return [names[image.tobytes()] for image in seen]


# ---- a labelled split ---------------------------------------------------------------------------------------------

TRAIN = images("cog", "train", 3) + images("nut", "train", 3)
TEST = images("cog", "test", 3) + images("cog", "test", 3, label=1) + images("nut", "test", 3, label=1)


def test_a_labelled_split_is_used_and_its_figures_are_scikit_learns(tmp_path, monkeypatch):
    labelled = images("cog", "val", 5) + images("cog", "val", 4, label=1)
    labelled += images("nut", "val", 3) + images("nut", "val", 6, label=1)
    unknown = images("nut", "val", 2, label=None)
    rows = TEST + TRAIN + labelled
    shards = shard_set(tmp_path, rows + unknown)
    forbid_test_rows(monkeypatch)
    method = Brightness()
    figures = validation(shards, method).run()
    assert same_images(method.seen, [row["pixels"] for row in labelled])
    assert figures == pytest.approx(expected(labelled), abs=1e-6)
    assert figures.keys() == {"image_auroc", "pixel_auroc", "pixel_ap"}
    assert method.batches == [4, 4, 4, 4, 2]


def test_anomalous_images_without_mask_count_as_images_but_not_as_pixels(tmp_path):
    labelled = images("cog", "val", 4) + images("cog", "val", 3, label=1)
    labelled += images("nut", "val", 3) + images("nut", "val", 3, label=1, masked=False)
    labelled[-7]["mask"] = None  # the last anomalous cog
    figures = validation(shard_set(tmp_path, labelled), Brightness()).run()
    assert figures == pytest.approx(expected(labelled), abs=1e-6)


def test_masks_go_where_the_images_go(tmp_path):
    """A centre crop leaves out the border of both."""
    size = SIDE + 16
    pixels = [picture([number], size, size) for number in range(4)]
    masks = [np.zeros((size, size), bool) for _ in range(4)]
    for number in (2, 3):
        masks[number][:30, number : number + 20] = True
    labels = (0, 0, 1, 1)
    shown = [sample("cog", "val", n, labels[n], pixels[n], masks[n] if labels[n] else None) for n in range(4)]
    policy = InputPolicy("short_side", size, SIDE, mean=POLICY.mean, std=POLICY.std)
    inside = np.s_[8:-8, 8:-8]
    truth = [{**row, "pixels": p[inside], "truth": m[inside]} for row, p, m in zip(shown, pixels, masks, strict=True)]
    figures = validation(write_shards(tmp_path, [shown]), Brightness(policy)).run()
    assert figures == pytest.approx(expected(truth), abs=1e-6)


def test_without_masks_there_are_only_image_figures(tmp_path):
    labelled = images("cog", "val", 4) + images("cog", "val", 3, label=1, masked=False)
    figures = validation(shard_set(tmp_path, labelled), Brightness()).run()
    assert figures == pytest.approx(expected(labelled), abs=1e-6)
    assert figures.keys() == {"image_auroc"}


def test_categories_of_which_nothing_can_be_told_do_not_count(tmp_path):
    told = images("cog", "val", 4) + images("cog", "val", 3, label=1)
    untold = images("nut", "val", 5) + images("washer", "val", 2, label=1, masked=False)
    assert validation(shard_set(tmp_path, told + untold), Brightness()).run() == pytest.approx(expected(told), abs=1e-6)


@pytest.mark.parametrize("others", [[], images("cog", "val", 4) + images("cog", "val", 3, label=1)])
def test_without_normal_images_there_are_pixel_figures(tmp_path, others):
    """As of polyps: every image shows one."""
    polyps = images("polyp", "val", 4, label=1)
    method = Brightness()
    figures = validation(shard_set(tmp_path, images("polyp", "train", 2, label=1) + polyps + others), method).run()
    assert figures == pytest.approx(expected(polyps + others), abs=1e-6)
    assert ("image_auroc" in figures) == bool(others)
    assert same_images(method.seen, [row["pixels"] for row in polyps + others])


def test_categories_not_asked_for_are_not_looked_at(tmp_path):
    cogs = images("cog", "val", 4) + images("cog", "val", 3, label=1)
    nuts = images("nut", "val", 4) + images("nut", "val", 3, label=1)
    method = Brightness()
    figures = validation(shard_set(tmp_path, cogs + nuts), method, categories=["nut"]).run()
    assert figures == pytest.approx(expected(nuts), abs=1e-6)
    assert same_images(method.seen, [row["pixels"] for row in nuts])


def test_every_category_and_label_has_an_even_share_of_the_images(tmp_path):
    rows = images("cog", "val", 9) + images("cog", "val", 9, label=1)
    rows += images("nut", "val", 2) + images("nut", "val", 9, label=1)
    shards = shard_set(tmp_path, rows)
    draws = []
    for seed in (0, 0, 1):
        method = Brightness()
        validation(shards, method, count=15, seed=seed).run()
        draws.append(chosen(method.seen, rows))
        groups = [name.rsplit("/", 1)[0] for name in draws[-1]]
        assert {group: groups.count(group) for group in groups} == {
            "set/cog/val/0": 3,
            "set/cog/val/1": 3,
            "set/nut/val/0": 2,
            "set/nut/val/1": 3,
        }
    assert draws[0] == draws[1] != draws[2]


# ---- synthetic anomalies ------------------------------------------------------------------------------------------


def spot(image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Synthetic:
    """A bright square at a random place."""
    mask, copy = np.zeros(image.shape[:2], bool), image.copy()
    top, left = rng.integers(0, SIDE - 12, 2)
    mask[top : top + 12, left : left + 12] = True
    copy[mask] = 255
    return Synthetic(copy, mask, "cutpaste_patch")


def test_held_out_normals_and_anomalies_made_of_them_take_the_place_of_labels(tmp_path, monkeypatch):
    rows = images("cog", "train", 8) + images("nut", "train", 7)
    held_out = rows[2:7] + rows[9:13]
    made: list[dict[str, Any]] = []

    def synthesise(image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Synthetic:
        assert np.array_equal(image, other)
        result = spot(image, rng, other)
        (row,) = [row for row in held_out if np.array_equal(row["pixels"], image)]
        made.append({**row, "label": 1, "pixels": result.image, "truth": result.mask, "mask": b""})
        return result

    shards = shard_set(tmp_path, TEST + rows)
    forbid_test_rows(monkeypatch)
    method = Brightness()
    run = validation(shards, method, [row["sample_id"] for row in held_out], synthesiser=synthesise)
    figures = run.run()
    assert len(made) == len(held_out) == 9
    assert same_images(method.seen[:9], [row["pixels"] for row in held_out])
    assert same_images(method.seen[9:], [row["pixels"] for row in made])
    assert figures == pytest.approx(expected(held_out + made), abs=1e-6)
    before = method.seen
    method.seen = []
    assert run.run() == figures  # the same images at every call
    assert all(np.array_equal(now, then) for now, then in zip(method.seen, before, strict=True))
    assert len(made) == 9


def test_normals_of_a_val_split_without_anomalies_are_held_out_normals(tmp_path):
    val = images("cog", "val", 4)
    method = Brightness()
    shards = shard_set(tmp_path, images("cog", "train", 5) + val + images("cog", "val", 2, label=None))
    figures = validation(shards, method, [row["sample_id"] for row in val], synthesiser=spot).run()
    assert same_images(method.seen[:4], [row["pixels"] for row in val])
    assert len(method.seen) == 8
    assert 0.5 < figures["image_auroc"] <= 1


def test_a_copy_without_any_changed_pixel_is_normal(tmp_path):
    rows = images("cog", "train", 6)
    first = iter([True] * 2)

    def synthesise(image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Synthetic:
        if next(first, False):
            return Synthetic(image.copy(), np.zeros(image.shape[:2], bool), "draem_self")
        return spot(np.zeros_like(image), rng, other)  # darker than any normal image

    names = [row["sample_id"] for row in rows]
    figures = validation(shard_set(tmp_path, rows), Brightness(), names, synthesiser=synthesise).run()
    assert figures["image_auroc"] == 0.0  # the two copies, labelled anomalous, would lie among the normals


def test_half_of_the_images_are_normal_and_every_category_has_its_share(tmp_path):
    rows = images("cog", "train", 9) + images("nut", "train", 9)
    held_out = rows[:6] + rows[9:11]
    shards = shard_set(tmp_path, rows)
    draws = []
    for seed in (0, 0, 1):
        method = Brightness()
        validation(shards, method, [row["sample_id"] for row in held_out], synthesiser=spot, count=13, seed=seed).run()
        names = chosen(method.seen[:5], held_out)
        assert sum("cog" in name for name in names) == 3
        assert sum("nut" in name for name in names) == 2
        assert len(method.seen) == 10
        draws.append(method.seen)
    assert all(np.array_equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not same_images(draws[0][5:], draws[2][5:])  # other spots


def test_without_a_synthesiser_the_images_are_their_own_textures(tmp_path):
    rows = images("cog", "train", 10)
    names = [row["sample_id"] for row in rows]
    shards = shard_set(tmp_path, rows)
    method, again = Brightness(), Brightness()
    figures = validation(shards, method, names).run()
    assert validation(shards, again, names).run() == figures
    assert all(0 <= value <= 1 for value in figures.values())
    normal, copies = method.seen[:10], method.seen[10:]
    # a Perlin blob may be empty, so a copy may be its original
    changed = [not np.array_equal(a, b) for a, b in zip(normal, copies, strict=True)]
    assert sum(changed) >= 5


def test_nothing_is_told_where_nothing_is_known(tmp_path):
    shards = shard_set(tmp_path, TEST + TRAIN)
    method = Brightness()
    assert validation(shards, method, held_out=()).run() == {}
    assert method.seen == []
