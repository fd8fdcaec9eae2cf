"""One command from a folder to a report: what it makes of labelled and unlabelled folders, of new images, and again."""

from __future__ import annotations

import csv
import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.inspect.inspect import inspect
from pipelines.inspect.model import hidden_share, with_bounded_bank
from pipelines.inspect.options import InspectOptions
from pipelines.runtime.options import RuntimeOptions
from unianom.configs.patchcore import PatchCoreConfig
from unianom.data.drawing import draw_corpus
from unianom.data.image import InputPolicy
from unianom.data.shards import ScoreSet, ShardSet
from unianom.errors import DataError, ModelError, OptionError, WeightsError
from unianom.files import read_json

HERE = RuntimeOptions(local=True, workers=1)

RECIPE = """
method:
  backbone: {name: resnet10t, weights: random}
  input: {resize: stretch, size: 64, crop: null}
  bank: {coreset_ratio: 0.1}
  dimension: 32
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PatchCore on a small network with random weights."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty good pictures and four bad ones, in folders of these names."""
    root = tmp_path_factory.mktemp("own") / "parts"
    draw_corpus(root.parent / "drawn", ("cog",), train=20, good=1, per_defect=2, size=64)
    (root / "bad").mkdir(parents=True)
    (root.parent / "drawn/cog/train/good").rename(root / "OK")
    defects = (path for path in (root.parent / "drawn/cog/test").glob("*/*.png") if path.parent.name != "good")
    for number, image in enumerate(sorted(defects)[:4]):
        image.rename(root / "bad" / f"{number}.png")
    return root


def options(folder: Path, output: Path, recipe: str, **changes: Any) -> InspectOptions:
    return InspectOptions(str(folder), str(output), recipes=(recipe,), runtime=HERE, **changes)


@pytest.fixture(scope="module")
def inspected(folder: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("inspected") / "parts"
    report = inspect(options(folder, output, recipe))
    assert report == str(output / "report.html")
    return output


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_folders_of_good_and_bad_images(inspected: Path) -> None:
    shards = ShardSet.open(inspected / "shards")
    found = {(row["split"], row["label"]): row["count"] for row in shards.manifest["counts"]}
    assert found == {("train", 0): 16, ("test", 0): 4, ("test", 1): 4}
    model = read_json(str(inspected / "patchcore/model/model.json"))
    assert (model["threshold"]["source"], model["threshold"]["n_normals"]) == ("leave_one_out", 16)
    listed = rows(inspected / "patchcore/decisions.csv")
    scores = [float(row["score"]) for row in listed]
    assert len(listed) == 8
    assert scores == sorted(scores, reverse=True)
    for row in listed:
        assert row["decision"] == ("fail" if np.float32(row["score"]) > model["threshold"]["value"] else "pass")
    stored = ScoreSet.open(inspected / "patchcore/scores").table(columns=["sample_id", "score"]).to_pylist()
    assert {row["sample_id"]: float(row["score"]) for row in listed} == {r["sample_id"]: r["score"] for r in stored}
    caught = sum(row["decision"] == "fail" for row in listed if row["label"] == "1")
    page = " ".join(re.sub(r"<[^>]+>", " ", (inspected / "report.html").read_text()).split())
    assert f"It finds {caught} of 4 anomalous images and flags" in page or not caught
    assert all(row["sample_id"] in page for row in listed if row["label"] == "1" and row["decision"] == "pass")


def test_again_nothing_is_done_anew(
    folder: Path, recipe: str, inspected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in inspected.rglob("*") if path.is_file()}
    inspect(options(folder, inspected, recipe))
    assert {path: path.stat().st_mtime_ns for path in inspected.rglob("*") if path.is_file()} == before
    assert f"report:     {inspected}/report.html" in capsys.readouterr().out


def test_a_broken_off_run_goes_on(folder: Path, recipe: str, inspected: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipelines.inspect.inspect.score", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    output = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        inspect(options(folder, output, recipe))
    fitted = (output / "patchcore/model/model.json").stat().st_mtime_ns
    monkeypatch.undo()
    inspect(options(folder, output, recipe))
    assert (output / "patchcore/model/model.json").stat().st_mtime_ns == fitted
    for name in ("decisions.csv", "evaluation/categories.csv"):
        assert (output / "patchcore" / name).read_bytes() == (inspected / "patchcore" / name).read_bytes()


def test_new_images_are_scored_with_the_model(folder: Path, recipe: str, inspected: Path, tmp_path: Path) -> None:
    """All of them, whatever their folder is called, and none is learned from."""
    new = tmp_path / "line 7"
    new.mkdir()
    for number in range(3):
        (new / f"{number}.png").write_bytes((folder / "OK" / f"{number:03d}.png").read_bytes())
    (new / "9.png").write_bytes((folder / "bad" / "0.png").read_bytes())
    model = inspected / "patchcore/model"
    report = Path(inspect(options(new, tmp_path / "out", recipe, model=str(model))))
    listed = rows(tmp_path / "out/model/decisions.csv")
    assert sorted(row["sample_id"] for row in listed) == [f"line 7/{name}.png" for name in (0, 1, 2, 9)]
    assert {row["label"] for row in listed} == {""}
    before = {Path(row["uri"]).name: row["score"] for row in rows(inspected / "patchcore/decisions.csv")}
    assert next(row["score"] for row in listed if row["uri"].endswith("9.png")) == before["0.png"]
    assert not (tmp_path / "out/model/evaluation").exists()
    assert report.read_text().index("line 7/") > 0


def test_images_without_labels_are_ranked(folder: Path, recipe: str, tmp_path: Path) -> None:
    """A fifth of a flat folder is scored, the most anomalous first."""
    inspect(options(folder / "OK", tmp_path / "out", recipe))
    listed = rows(tmp_path / "out/patchcore/decisions.csv")
    assert len(listed) == 4
    assert not (tmp_path / "out/patchcore/evaluation").exists()
    assert (tmp_path / "out/report.html").exists()


def test_several_methods_stand_in_one_report(folder: Path, recipe: str, tmp_path: Path) -> None:
    vit = tmp_path / "vit.yaml"
    backbone = "{name: vit_tiny_patch16_224, weights: random}"
    vit.write_text(
        f"method: {{backbone: {backbone}, input: {{resize: stretch, size: 64, crop: null}}, blocks: [0, 1], "
        f"attention_block: 2}}"
    )
    given = options(folder, tmp_path / "out", recipe)
    inspect(dataclasses.replace(given, methods=("patchcore", "uniformaly"), recipes=(recipe, str(vit))))
    page = (tmp_path / "out/report.html").read_text()
    assert "patchcore" in page
    assert "uniformaly" in page
    assert len(rows(tmp_path / "out/uniformaly/decisions.csv")) == 8


def test_a_folder_without_normal_images_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set/bad").mkdir(parents=True)
    (tmp_path / "set/bad/0.png").write_bytes((folder / "bad/0.png").read_bytes())
    with pytest.raises((DataError, OptionError), match="normal"):
        inspect(options(tmp_path / "set", tmp_path / "out", "offline/patchcore"))
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_named_and_the_others_inspected(
    folder: Path, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "set")
    (tmp_path / "set/OK/broken.png").write_bytes((folder / "OK/000.png").read_bytes()[:200])
    inspect(options(tmp_path / "set", tmp_path / "out", recipe))
    assert "rejected: 1 corrupt" in capsys.readouterr().out
    shards = ShardSet.open(tmp_path / "out/shards")
    assert [row["sample_id"] for row in shards.rejected().to_pylist()] == ["set/OK/broken.png"]
    with pytest.raises(DataError, match=r"more than --max-reject-fraction 0\.02 allows"):
        inspect(options(tmp_path / "set", tmp_path / "strict", recipe, max_reject_fraction=0.02))


def test_what_is_missing_shows_before_anything_is_written(folder: Path, recipe: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    missing.write_text(RECIPE.replace("random", str(tmp_path / "none.safetensors")))
    with pytest.raises(WeightsError, match="no weights file at"):
        inspect(options(folder, tmp_path / "out", str(missing)))
    with pytest.raises(ModelError, match="no model in"):
        inspect(options(folder, tmp_path / "out", recipe, model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("uniad",)}, r"methods=\['uniad'\] must be different ones of patchcore, uniformaly"),
        ({"methods": ("patchcore", "patchcore")}, "must be different ones"),
        ({"methods": ()}, "must be different ones"),
        ({"recipes": ("a", "b")}, "recipes has 2 entries for 1 methods; give one each"),
        ({"layout_options": {"normal": "ok"}}, "layout_options need --layout"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        InspectOptions("folder", **changes)


def test_the_share_of_an_image_that_a_crop_hides() -> None:
    cropped = PatchCoreConfig(input=InputPolicy(size=256, crop=224))
    assert hidden_share(cropped, 256, 256) == pytest.approx(1 - (224 / 256) ** 2)
    assert hidden_share(cropped, 512, 1024) == pytest.approx(1 - 224**2 / (256 * 512))
    assert hidden_share(PatchCoreConfig(input=InputPolicy(resize="stretch", crop=None)), 512, 1024) == 0


def test_a_bank_stays_small_enough_to_be_chosen_in_minutes() -> None:
    config, grid = PatchCoreConfig(), (28, 28)
    assert with_bounded_bank(config, grid, images=20) == config, "1,568 of 15,680 patches"
    # 78,400 patches: 2,000 vectors are 2.6 %
    assert with_bounded_bank(config, grid, images=100).bank.coreset_ratio == 0.026
    # 784,000 patches: 1e9 comparisons allow 1,275 vectors, 0.16 %
    assert with_bounded_bank(config, grid, images=1000).bank.coreset_ratio == 0.0016
