"""The model folder: what comes back is what was saved, what is damaged is named; and the forms of image it takes."""

from __future__ import annotations

import dataclasses
import io
import json
import pickletools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import unianom
from tests.methods.conftest import INPUT, SIDE, TINY, fit, tiny_method
from unianom import files
from unianom import model as model_module
from unianom.configs.backbone import BackboneConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.data.image import ImageLimits, spread_bits
from unianom.data.tensors import normalise
from unianom.errors import DataError, ImageError, ModelError, OptionError
from unianom.methods import METHODS, Method, Prediction
from unianom.methods.patchcore import PatchCore
from unianom.methods.uniformaly import UniFormaly
from unianom.model import ImageResult, Model, is_model, load, local_copy
from unianom.thresholds import Bands, DecisionRule, Threshold, fit_threshold


def threshold(value: float) -> Threshold:
    return Threshold(value, target_fpr=0.1, confidence=0.95, n_normals=60, rank=59, observed_fpr=1 / 60)


def pictures(count: int = 5) -> list[np.ndarray]:
    """H×W×3 uint8 of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (70 + 9 * number, 90, 3), dtype=np.uint8) for number in range(count)]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def same(one: list[ImageResult], other: list[ImageResult]) -> bool:
    """Equal to the bit."""
    return len(one) == len(other) and all(
        (a.score, a.decision) == (b.score, b.decision) and np.array_equal(a.anomaly_map, b.anomaly_map)
        for a, b in zip(one, other)
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_method("patchcore"), ["bolt", "nut"], threshold(1.0), {"seeds": {"split": 0}})


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes) -> None:
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description | changes))


def edit_config(folder: Path, **changes) -> None:
    edit(folder, config=json.loads((folder / "model.json").read_text())["config"] | changes)


# ----------------------------------------------------------------------------------------------------------- folding
def norms(model: Model) -> int:
    return sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.method.modules())


@pytest.mark.parametrize("name", ["uninet", "recontrast", "uniad"])
def test_a_folded_model_predicts_the_same(name):
    model = Model(fit(METHODS[name](TINY[name].config)), ["a", "b"])
    before, count = model.predict(pictures(2)), norms(model)
    model.fold()
    assert norms(model) < count / 3
    for one, other in zip(model.predict(pictures(2)), before):
        assert one.score == pytest.approx(other.score, rel=1e-4)
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-4 * other.anomaly_map.max())


def test_an_encoder_of_efficientnet_blocks_folds_with_its_activations():
    backbone = BackboneConfig("efficientnet_lite0", weights="random")
    config = dataclasses.replace(TINY["uniad"].config, backbone=backbone)
    model = Model(fit(METHODS["uniad"](config)))
    before, count = model.predict(pictures(1)), norms(model)
    model.fold()
    assert norms(model) == 0 < count
    assert model.predict(pictures(1))[0].score == pytest.approx(before[0].score, rel=1e-4)


def test_what_would_change_by_folding_is_refused(monkeypatch):
    model = Model(fit(METHODS["revdist"](TINY["revdist"].config)))

    def wrong(module: torch.nn.Module) -> int:
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.data.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
        return 1

    monkeypatch.setattr("unianom.model.fold_batch_norm", wrong)
    with pytest.raises(ModelError, match=r"batch norm of \S+ cannot be folded .* fold_batch_norm"):
        model.fold()


# ---------------------------------------------------------------------------------------------------- save and load
def test_a_loaded_model_is_the_saved_one(model, folder):
    loaded = unianom.load(folder)
    assert loaded.method.config == model.method.config
    assert loaded.categories == ["bolt", "nut"]
    assert loaded.threshold == model.threshold
    assert loaded.provenance == model.provenance
    assert loaded.digest == model.digest == files.sha256_file(folder / "model.json")
    assert not loaded.method.training
    assert same(loaded.predict(pictures()), model.predict(pictures()))


def test_the_digest_is_that_of_what_was_read(folder, monkeypatch):
    """A rule may be written into model.json while it is loaded."""
    read, before = model_module._read_state, files.sha256_file(folder / "model.json")
    path = folder / "model.json"

    def written_meanwhile(*arguments):
        path.write_text(path.read_text() + "\n")
        return read(*arguments)

    monkeypatch.setattr(model_module, "_read_state", written_meanwhile)
    assert load(folder).digest == before != files.sha256_file(path)


def test_thresholds_of_categories_and_their_scores_are_kept(model, tmp_path):
    own = replace(model, category_thresholds={"nut": threshold(2.5)}, normal_scores={"bolt": [0.5, 1.25], "nut": [2.5]})
    own.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.category_thresholds == {"nut": threshold(2.5)}
    assert loaded.normal_scores == {"bolt": [0.5, 1.25], "nut": [2.5]}
    value = model.threshold.value
    middle = (value + 2.5) / 2
    expected = {"nut": "fail" if middle > 2.5 else "pass", "bolt": "fail" if middle > value else "pass"}
    assert expected["nut"] != expected["bolt"]
    assert {name: loaded.decide(middle, None, name) for name in expected} == expected
    assert loaded.decide(middle, None, None) == loaded.decide(middle, None, "new") == expected["bolt"]
    edit(tmp_path, normal_scores={"bolt": ["high"]})
    with pytest.raises(ModelError, match=r"a threshold in .* is not valid"):
        load(tmp_path)


def test_a_model_of_before_has_neither(model, folder):
    description = json.loads((folder / "model.json").read_text())
    assert not {"category_thresholds", "normal_scores"} & set(description)
    assert not {"promised", "source"} & set(description["threshold"])
    assert not (folder / "bank" / "origins.parquet").exists()
    loaded = load(folder)
    assert (loaded.category_thresholds, loaded.normal_scores) == ({}, {})
    with pytest.raises(ModelError, match="does not tell which image"):
        loaded.method.bank.without_image(0)


def outlives_its_weights_file(method: Method, weights: Path, folder: Path) -> None:
    """The folder holds the weights, and remembers in its config where they came from."""
    model = Model(fit(method))
    model.save(folder)
    weights.unlink()
    loaded = load(folder)
    assert loaded.method.config == model.method.config
    assert loaded.method.config.backbone.weights == str(weights)
    assert same(loaded.predict(pictures()), model.predict(pictures()))


def test_a_model_outlives_its_weights_file(tmp_path):
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("resnet10t").state_dict(), weights)
    config = PatchCoreConfig(backbone=BackboneConfig("resnet10t", str(weights)), input=INPUT, dimension=96)
    outlives_its_weights_file(PatchCore(config), weights, tmp_path / "model")


@pytest.mark.real
@pytest.mark.parametrize(
    ("cls", "options", "name"),
    [(UniFormaly, {}, "vit_tiny_patch16_224"), (PatchCore, {"dimension": 128}, "resnet18_to_layer3")],
)
def test_a_model_with_real_weights_outlives_their_file(cls, options, name, real_data, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((real_data / "weights" / f"{name}.safetensors").read_bytes())
    backbone = BackboneConfig(name.removesuffix("_to_layer3"), str(weights))
    outlives_its_weights_file(cls(cls.Config(backbone=backbone, input=INPUT, **options)), weights, tmp_path / "model")


def test_saving_the_same_model_twice_gives_the_same_bytes(model, folder, tmp_path):
    model.save(tmp_path / "again")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()


def test_a_folder_can_be_saved_to_and_loaded_from_a_uri(model):
    model.save("memory://models/one")
    assert is_model("memory://models/one")
    assert same(load("memory://models/one").predict(pictures(1)), model.predict(pictures(1)))


@pytest.mark.parametrize("decides", ["nothing", "all", "each", "some", "rule", "rule of some"])
def test_many_images_are_decided_as_each_is(decides):
    one, other = (fit_threshold(np.arange(100.0) + first, 0.1) for first in (0, 30))
    bands = Bands(other, one, 1.0)
    model = Model(METHODS["patchcore"](TINY["patchcore"].config), threshold=one if decides in ("all", "each") else None)
    if decides in ("each", "some"):
        model.category_thresholds = {"a": other}
    if decides.startswith("rule"):
        model.decision_rule = DecisionRule("calibrated", None if "some" in decides else bands, {"a": bands})
    scores, common = np.random.default_rng(0).uniform(60, 140, (2, 90)).astype(np.float32)
    names = ["a", "b", None] * 30
    expected = [model.decide(float(s), float(c), name) for s, c, name in zip(scores, common, names)]
    assert model.decide_each(scores, common, names).tolist() == expected
    assert len(model.decide_each(scores[:0], common[:0], [])) == 0
    if decides != "nothing":
        assert {"pass", "fail"} <= set(expected)
        with pytest.raises(DataError, match="is nan"):
            model.decide_each(scores[:1] * np.nan, common[:1] * np.nan, ["a"])


def test_local_copy(folder, tmp_path):
    assert local_copy(str(folder), tmp_path) == str(folder)
    load(folder).save("memory://models/two")
    copied = local_copy("memory://models/two", tmp_path / "copy")
    assert is_model(copied)
    load(copied)


def test_no_file_is_a_pickle(folder):
    """Neither by its name nor by what it holds."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in names} == {".json", ".safetensors", ".faiss"}
    for path in names:
        content = path.read_bytes()
        assert not content.startswith((b"PK", b"\x80"))
        with pytest.raises(Exception, match=r"."):  # each file stops making sense as a pickle in its own way
            for _ in pickletools.genops(content):
                pass


def test_a_model_without_a_bank_leaves_none_of_the_one_before(folder):
    bare = METHODS["patchcore"](TINY["patchcore"].config)
    Model(bare).save(folder)
    assert not (folder / "bank").exists()
    with pytest.raises(ModelError, match="no memory bank"):
        load(folder).predict(pictures(1))


def test_a_folder_is_unfinished_until_its_description_is_there(model, tmp_path, monkeypatch):
    def stop(*_arguments):
        raise KeyboardInterrupt

    model.save(tmp_path)
    monkeypatch.setattr(files, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path)
    assert not is_model(tmp_path)


# -------------------------------------------------------------------------------------------------- damaged folders
def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"no model.json in .*nothing there \(found: nothing\)"):
        load(tmp_path / "nothing there")


def test_an_unfinished_folder_says_what_it_holds(folder):
    (folder / "model.json").unlink()
    with pytest.raises(ModelError, match=r"found: bank, weights.safetensors"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", '"model"'])
def test_a_broken_description_is_named(text, folder):
    (folder / "model.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.json (is damaged|has format version None)"):
        load(folder)


def test_a_description_with_a_part_missing_is_named(folder):
    (folder / "model.json").write_text('{"format_version": 1, "method": "patchcore"}')
    with pytest.raises(ModelError, match=r"model\.json is damaged: it has no config, categories, threshold"):
        load(folder)


def test_another_format_version_is_refused(folder):
    edit(folder, format_version=2)
    with pytest.raises(ModelError, match="format version 2, this unianom reads 1"):
        load(folder)


def test_an_unknown_method_is_refused(folder):
    edit(folder, method="patchcor")
    with pytest.raises(ModelError, match=r"'patchcor'; known: .*patchcore"):
        load(folder)


def test_a_bank_of_a_method_without_banks_is_refused(tmp_path):
    Model(tiny_method("revdist"), ["a"]).save(tmp_path / "model")
    edit(tmp_path / "model", bank_sha256="0" * 64)
    with pytest.raises(ModelError, match="names a memory bank, which revdist does not have"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", ["patchcore"]), ("categories", None), ("categories", [1]), ("categories", "nut"), ("provenance", None)],
)
def test_an_entry_of_another_shape_is_named(key, value, folder):
    edit(folder, **{key: value})
    with pytest.raises(ModelError, match=rf"model\.json is damaged: its {key} cannot be .*; copy it again or fit"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "words"), [("treshold", r" \(did you mean threshold\?\)"), ("postprocess", "")], ids=str
)
def test_an_unknown_key_beside_the_config_is_refused(key, words, folder):
    edit(folder, **{key: None})
    with pytest.raises(ModelError, match=rf"model\.json holds the unknown key '{key}'{words}; remove it"):
        load(folder)


def exchange_weights(folder: Path, content: bytes) -> None:
    """Other bytes, whose checksum the description tells."""
    (folder / "weights.safetensors").write_bytes(content)
    edit(folder, weights_sha256=files.sha256_of(content))


@pytest.mark.parametrize("content", [b"", b"no tensors", (1 << 40).to_bytes(8, "little") + b"{}", bytes(200)])
def test_weights_that_are_none_are_named_though_their_checksum_fits(content, folder):
    exchange_weights(folder, content)
    with pytest.raises(ModelError, match=r"weights\.safetensors holds no weights that can be read: .*; fit the model"):
        load(folder)


def test_a_cut_off_file_of_weights_is_named_though_its_checksum_fits(folder):
    exchange_weights(folder, (folder / "weights.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"weights\.safetensors holds no weights that can be read"):
        load(folder)


def test_damaged_weights_are_named(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.safetensors is damaged: its checksum"):
        load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights\.safetensors is missing"):
        load(folder)


def test_a_damaged_bank_is_named(folder):
    shard = next((folder / "bank").glob("*.faiss"))
    content = bytearray(shard.read_bytes())
    content[-7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ModelError, match=rf"{shard.name} is damaged"):
        load(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=rf"{shard.name} is missing"):
        load(folder)


def test_a_missing_or_exchanged_bank_is_named(folder):
    manifest = folder / "bank" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("flat", "flat "))
    with pytest.raises(ModelError, match=r"bank/manifest\.json is missing or not the one"):
        load(folder)
    for path in (folder / "bank").iterdir():
        path.unlink()
    with pytest.raises(ModelError, match=r"bank/manifest\.json is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"neighbors": 3}, "no option 'neighbors'; did you mean 'neighbours'"),
        ({"neighbours": 0}, "neighbours=0 must be at least 1"),
        ({"neighbours": "three"}, "neighbours='three' must be at least 1"),
        ({"preset": "poper"}, "preset='poper' must be one of paper, reference"),
        ({"input": None}, "input=None must be InputPolicy"),
        ({"backbone": {"name": "resnet9000"}}, "no such model"),
        ({"backbone": {}}, "name"),
        ({"input": {"resize": "stretch", "size": 1_000_000}}, "input.size=1000000"),
        ({"input": {"size": 1_000_000, "crop": 1_000_000}}, "must be a whole number in [1, 4096]"),
        ({"input": {"resize": "stretch", "size": 64, "pad": 1_000_000}}, "input.pad=1000000"),
    ],
    ids=str,
)
def test_an_edited_config_is_refused(changes, fault, folder):
    edit_config(folder, **changes)
    with pytest.raises(ModelError, match=rf"config in .*model\.json is not valid: .*{re.escape(fault)}"):
        load(folder)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("uniad", {"dim": 1 << 20, "heads": 1}),
        ("uniad", {"hidden": 1 << 40}),
        ("uniad", {"encoder_layers": 1 << 40}),
        ("unias", {"hidden": 1 << 40}),
    ],
    ids=str,
)
def test_a_network_beyond_its_weights_is_refused_before_it_is_made(method, changes, tmp_path):
    """Sizes that pass every other check; what would be made takes terabytes."""
    Model(tiny_method(method), ["nut"]).save(tmp_path)
    config = json.loads((tmp_path / "model.json").read_text())["config"]
    for key, value in changes.items():
        (config if key in config else config["transformer"])[key] = value
    edit(tmp_path, config=config)
    with pytest.raises(ModelError, match=r"config in .*model\.json is not valid: its network would need more than"):
        load(tmp_path)


def test_weights_of_another_network_are_refused(folder):
    edit_config(folder, taps=[4, 8])
    with pytest.raises(ModelError, match=r"does not fit the config in model\.json; unknown: encoder\.encoder\.layer3"):
        load(folder)


def test_an_edited_threshold_is_refused(folder):
    edit(folder, threshold={"value": 3})
    with pytest.raises(ModelError, match="threshold"):
        load(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_an_error(device, folder):
    with pytest.raises(OptionError, match=r"device cuda.*no usable CUDA GPU; use device=cpu"):
        load(folder, device)


def test_an_unknown_device_is_an_error(folder):
    with pytest.raises(OptionError, match="device gpu"):
        load(folder, "gpu")


# ----------------------------------------------------------------------------------------------------------- predict
def test_prepared_images_are_what_the_network_gets(model, tmp_path):
    images = pictures(3)
    (tmp_path / "second.png").write_bytes(png(images[1]))
    prepared = model.prepare([images[0], tmp_path / "second.png", png(images[2])])
    assert all(image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8 for image in prepared)
    prediction = model.method.predict(normalise(prepared, model.method.input))
    assert prediction.score.tolist() == [result.score for result in model.predict(images)]
    with pytest.raises(OptionError, match="put a single image into a list"):
        model.prepare(images[0])
    with pytest.raises(ImageError, match=r"images\[1\]"):
        model.prepare([images[0], tmp_path / "none.png"])


def test_every_form_of_image_gives_the_same_prediction(model, tmp_path):
    pixels = pictures(1)[0]
    path = tmp_path / "image.png"
    path.write_bytes(png(pixels))
    forms = [path, str(path), f"file://{path}", png(pixels), bytearray(png(pixels)), pixels, Image.open(path)]
    results = model.predict(forms, batch_size=1)
    assert len(results) == len(forms)
    for result in results:
        assert isinstance(result.score, float)
        assert result.anomaly_map.shape == (SIDE, SIDE)
        assert result.anomaly_map.dtype == np.float32
        assert same([result], results[:1])


def test_grey_images_are_taken_as_grey_rgb(model):
    grey = pictures(1)[0][..., 0]
    rgb = np.stack([grey] * 3, axis=2)
    results = model.predict([grey, rgb, Image.fromarray(grey), png(grey)], batch_size=1)
    assert all(same([result], results[:1]) for result in results)


def test_pillow_images_are_read_like_their_files(model, tmp_path):
    """A photograph that was taken upside down, and a palette with a transparent colour."""
    image = Image.fromarray(pictures(1)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    image.quantize(16).save(tmp_path / "palette.png", transparency=3)
    for name in ("turned.png", "palette.png"):
        from_file, from_pillow = model.predict([tmp_path / name, Image.open(tmp_path / name)], batch_size=1)
        assert same([from_file], [from_pillow])


def test_results_come_in_order_whatever_the_batch_size(model):
    """Nearly to the bit: the network rounds differently in batches of other sizes."""
    images = pictures(7)
    expected = model.predict(images, batch_size=1)
    assert len({result.score for result in expected}) == 7
    for batch_size in (2, 3, 7, 100):
        results = model.predict(images, batch_size=batch_size)
        assert [result.score for result in results] == pytest.approx([result.score for result in expected], rel=1e-5)
        for one, other in zip(results, expected, strict=True):
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-4, atol=1e-5)
    assert model.predict([]) == []


def test_decisions_are_by_the_threshold(model):
    """Above it fails, at it passes; without one there is no decision."""
    images = pictures(3)
    scores = sorted(result.score for result in model.predict(images, batch_size=1))
    at_middle = dataclasses.replace(model, threshold=threshold(scores[1]))
    for result in at_middle.predict(images, batch_size=1):
        assert result.decision == ("fail" if result.score > scores[1] else "pass")
    assert [r.decision for r in dataclasses.replace(model, threshold=None).predict(images)] == [None] * 3


def test_the_network_sees_the_normalised_image(model, monkeypatch):
    """(pixel / 255 − mean) / std of the backbone's weights, channels first."""
    seen = []

    def predict(_method: Method, images: torch.Tensor) -> Prediction:
        seen.append(images)
        maps = torch.zeros(len(images), SIDE, SIDE)
        return Prediction(maps, torch.zeros(len(images)), maps, maps[:, None])

    monkeypatch.setattr(type(model.method), "predict", predict)
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    model.predict([pixels])
    expected = (pixels.transpose(2, 0, 1) / 255 - np.array([[[0.485]], [[0.456]], [[0.406]]])) / np.array(
        [[[0.229]], [[0.224]], [[0.225]]]
    )
    np.testing.assert_allclose(seen[0][0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "single", ["a.png", Path("a.png"), b"bytes", pictures(1)[0], Image.new("RGB", (9, 9))], ids=type
)
def test_a_single_image_is_refused(single, model):
    with pytest.raises(OptionError, match="put a single image into a list"):
        model.predict(single)


def test_images_that_cannot_be_used_are_named(model, tmp_path):
    good = pictures(1)[0]
    with pytest.raises(ImageError, match=r"images\[1\]: no such file: .*none\.png") as raised:
        model.predict([good, tmp_path / "none.png"])
    assert raised.value.status == "missing"
    with pytest.raises(ImageError, match=r"images\[2\]: not an image") as raised:
        model.predict([good, good, b"text"], batch_size=1)
    assert raised.value.status == "corrupt"
    with pytest.raises(ImageError, match=r"images\[0\]: .*the limit is 100") as raised:
        model.predict([png(good)], limits=ImageLimits(max_pixels=100))
    assert raised.value.status == "too_large"


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (np.zeros((8, 8, 3), np.float32), r"uint8, got \(8, 8, 3\) float32"),
        (np.zeros((8, 8, 4), np.uint8), r"got \(8, 8, 4\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got \(2, 8, 8, 3\)"),
        (pictures(1)[0][500:400], r"images\[0\]: .*shape \(0, \d+, 3\) has no pixels"),
        (np.zeros((8, 0), np.uint8), r"shape \(8, 0\) has no pixels"),
        (np.full((8, 8, 3), np.nan), r"uint8, got \(8, 8, 3\) float64; scale its values"),
        (np.zeros((8, 8, 2), np.uint8), r"got \(8, 8, 2\) uint8"),
        (np.zeros(8, np.uint8), r"got \(8,\) uint8"),
        (torch.zeros(3, 8, 8), r"not Tensor of shape \(3, 8, 8\) and type torch.float32"),
        ({"image": "a.png"}, r"images\[0\]: an image is a path, .*, not dict"),
        (Image.new("RGB", (0, 8)), "0 × 8 has no pixels"),
        ("nosuch://bucket/a.png", "no file system for 'nosuch://'"),
        (None, "not NoneType"),
        (Image.new("I;16", (8, 8)), "mode I;16 would be clipped"),
        (Image.new("F", (8, 8)), "mode F would be clipped"),
    ],
)
def test_what_is_no_image_is_refused(image, fault, model):
    with pytest.raises(OptionError, match=fault):
        model.predict([image])


def cut(folder: Path, name: str, form: str = "PNG") -> Path:
    """A file of which the end is missing."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / name, form)
    (folder / name).write_bytes((folder / name).read_bytes()[:-4000])
    return folder / name


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
def test_pillow_images_that_cannot_be_read_are_named(model, tmp_path, form):
    """They are opened, but Pillow reads them only now."""
    file = cut(tmp_path, "cut", form) if form != "JPEG" else tmp_path / "cut"
    if form == "JPEG":
        Image.fromarray(pictures(1)[0]).save(file, form)
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ImageError, match=r"images\[1\]: cannot read the Pillow image of .*cut: ") as raised:
        model.predict([pictures(1)[0], Image.open(file)])
    assert raised.value.status == "corrupt"
    with pytest.raises(ImageError, match=rf"images\[0\]: {file}: cannot decode"):
        model.predict([file])


def test_closed_and_large_pillow_images_are_named(model, tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    with pytest.raises(ImageError, match=r"images\[0\]: cannot read the Pillow image"):
        model.predict([closed])
    with pytest.raises(ImageError, match=r"images\[0\]: .*the limit is 100") as raised:
        model.predict([Image.open(tmp_path / "a.png")], limits=ImageLimits(max_pixels=100))
    assert raised.value.status == "too_large"


@pytest.mark.parametrize("name", ["a.png/b.png", "", "x" * 300, "a\0b.png"])
def test_paths_that_lead_nowhere_are_missing(model, tmp_path, name):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"images\[0\]: ") as raised:
        model.predict([f"{tmp_path}/{name}"])
    assert raised.value.status == "missing"
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("images", "fault"),
    [
        (None, "got NoneType; make a list of it"),
        ({"a": "a.png"}, "got dict; make a list"),
        ({"a.png"}, "got set; make a list"),
        ((name for name in ("a.png",)), "got generator; make a list"),
        (7, "got int; make a list"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"ndarray of shape \(2, 8, 8, 3\) and type uint8; .*give a batch as a list"),
        (torch.zeros(2, 3, 8, 8), r"Tensor of shape \(2, 3, 8, 8\) and type torch.float32"),
    ],
)
def test_what_is_no_list_is_refused(images, fault, model):
    with pytest.raises(OptionError, match=fault):
        model.predict(images)


def test_other_lists_are_taken(model):
    one, two = pictures(2)
    expected = model.predict([one, two])
    column = pd.Series([one, two], index=[7, 9])
    assert same(model.predict((one, two)), expected)
    assert same(model.predict(column), expected)
    assert same(model.predict([one[:, ::-1][:, ::-1], two]), expected)


@pytest.mark.parametrize("categories", ["ab", None.__class__, 3, {"a", "b"}, {"a": 1, "b": 2}])
def test_categories_that_are_no_list_are_refused(model, categories):
    with pytest.raises(OptionError, match="give a list with one name for each image"):
        model.predict(pictures(2), categories=categories)


def test_bits_and_limits_of_another_type_are_refused(model):
    with pytest.raises(OptionError, match="bits='12' must lie in 9…16"):
        model.predict(pictures(1), bits="12")
    with pytest.raises(OptionError, match="limits is int; give an ImageLimits"):
        model.predict([png(pictures(1)[0])], limits=5)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_a_grey_image(model):
    grey = pictures(1)[0][..., 0]
    assert same(model.predict([np.matrix(grey)]), model.predict([grey]))


@pytest.mark.parametrize("size", [2.5, "8", None])
def test_a_batch_size_that_is_no_whole_number_is_refused(model, size):
    with pytest.raises(OptionError, match="must be a whole number"):
        model.predict(pictures(1), batch_size=size)


def test_a_wrong_batch_size_is_refused(model):
    with pytest.raises(OptionError, match="batch_size=0"):
        model.predict(pictures(1), batch_size=0)


def test_the_package_offers_load_and_its_types():
    assert (unianom.load, unianom.Model, unianom.ImageResult) == (load, Model, ImageResult)


def test_files_of_twelve_bits_in_sixteen(model, tmp_path):
    """Given their depth, they predict as the same picture in 8 bits does, and as ingest would store them."""
    values = (np.arange(80 * 90).reshape(80, 90) * 4095 // (80 * 90 - 1)).astype(np.uint16)
    deep, eight = tmp_path / "a::12.png", np.rint(values * (255 / 4095)).astype(np.uint8)
    deep.write_bytes(png(values))
    spread = spread_bits(png(values), 12)
    given = model.predict([str(deep), png(values), png(eight)], batch_size=1, bits=12)
    assert same(given, model.predict([spread, spread, eight], batch_size=1))
    assert given[0].score == pytest.approx(given[2].score, rel=0.02)
    assert model.predict([str(deep)])[0].score != given[0].score
    with pytest.raises(OptionError, match="bits=7"):
        model.predict([eight], bits=7)
