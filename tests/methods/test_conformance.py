"""One contract for every registered method. A new method joins by an entry in `TINY` (conftest.py)."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from tests.methods.conftest import INVALID_BANKS, SIDE, TINY, Tiny, fit, random_images, remade
from unianom.backbones import CnnBackbone, VitBackbone
from unianom.errors import OptionError
from unianom.methods import METHODS, MaskedPatches, MemoryMethod, Method, Prediction
from unianom.methods.uniformaly import UniFormaly
from unianom.model import Model, load
from unianom.options import from_plain, to_plain, with_values

BATCH_TOLERANCE = 1e-5
"""Relative to the largest value. Predictions are not bit-equal across batch sizes: matrix products and convolutions
cut a batch into blocks by its size, and float32 sums round by their order."""

MOST_NEIGHBOURS = 5
"""Bank vectors found for each patch, enough for all raw outputs that are tried."""

DEVICE_TOLERANCE = 1e-3
"""Relative to the largest value, between CPU and GPU kernels in float32."""


# ---------------------------------------------------------------------------------------------------- the contract
def check_method(cls: type[Method], tiny: Tiny, folder: Path) -> None:
    """Hold a method to the contract; an AssertionError says where it breaks it.

    Args:
        cls: the method.
        tiny: a small form of it.
        folder: empty, to write model folders to.
    """
    check_options(cls, tiny)
    method = fit(cls(tiny.config))
    check_prediction(method)
    check_determinism(cls, tiny)
    check_batches(method)
    check_refusals(method)
    check_frozen(cls, tiny)
    check_saving(method, folder)
    inert = check_reading(method, tiny)
    assert not inert, f"{inert} change neither map nor score"
    if isinstance(method, MemoryMethod):
        check_embedding(method)
        check_masking(method, tiny)


def check_prediction(method: Method) -> None:
    """Maps of the input's size before and after smoothing, a score, and an embedding, which tell images
    apart; float32, finite, without gradients; images stay."""
    images = random_images(3)
    before = images.clone()
    prediction = method.predict(images)
    assert isinstance(prediction, Prediction)
    assert prediction.anomaly_map.shape == (3, SIDE, SIDE)
    assert prediction.score.shape == (3,)
    assert prediction.raw_map.shape == (3, SIDE, SIDE)
    assert prediction.embedding.ndim == 4
    assert len(prediction.embedding) == 3
    for part in prediction:
        assert part.dtype == torch.float32, "predictions are float32"
        assert torch.isfinite(part).all()
        assert not part.requires_grad
    assert torch.equal(images, before), "predict changed its input"
    for name in ("score", "embedding"):
        first, second, _ = getattr(prediction, name)
        assert not torch.equal(first, second), f"different images have the same {name}"


def check_determinism(cls: type[Method], tiny: Tiny) -> None:
    """The same config gives the same method, a trained one under the same seed; the same images the same bits."""
    images = random_images(3)
    predictions = []
    for seed in (0, 1) if issubclass(cls, MemoryMethod) else (0, 0):
        torch.manual_seed(seed)
        method = fit(cls(tiny.config))
        predictions += [method.predict(images), method.predict(images)]
    assert all(same(predictions[0], other) for other in predictions[1:]), "not deterministic"


def check_batches(method: Method) -> None:
    """A prediction does not depend on which images share the batch."""
    images = random_images(5)
    together = method.predict(images)
    for batch in ([0], [1], [2], [3], [4], [3, 0], [4, 4, 2]):
        alone = method.predict(images[batch])
        for one, other in zip(alone, together):
            assert_close(one, other[batch], BATCH_TOLERANCE, "in another batch")


def check_refusals(method: Method) -> None:
    """What is not a batch of this method's input is refused in words."""
    images = random_images(2)
    for value in (float("nan"), float("inf")):
        broken = images.clone()
        broken[1, 2, 3, 4] = value
        refuses(method, broken)
    refuses(method, images[0])
    refuses(method, images[:, :2])
    refuses(method, images[:, :, :-8])
    refuses(method, random_images(2, side=2 * SIDE))
    refuses(method, images.double())
    refuses(method, (images * 9).to(torch.uint8))


def check_frozen(cls: type[Method], tiny: Tiny) -> None:
    """Gradients reach what is trained and nothing else; frozen encoders stay in evaluation mode, unchanged."""
    method = fit(cls(tiny.config)).train()
    encoders = [module for module in method.modules() if isinstance(module, CnnBackbone | VitBackbone)]
    assert encoders
    frozen = [encoder for encoder in encoders if not encoder.trainable]
    for encoder in frozen:
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters()), "a frozen encoder is trained"
    before = [{key: value.clone() for key, value in encoder.state_dict().items()} for encoder in frozen]
    if isinstance(method, MemoryMethod):
        assert not any(parameter.requires_grad for parameter in method.parameters())
        images = random_images(2).requires_grad_()
        method.embed(images).patches.square().mean().backward()
        assert images.grad is not None
    else:
        assert tiny.training_batch is not None, "a trained method needs a training_batch in its tiny form"
        losses: dict[str, Tensor] = method.training_loss(tiny.training_batch(method))
        assert losses
        assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()
        trained = [p for p in method.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained), "a parameter is never trained"
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)
    for encoder, state in zip(frozen, before):
        assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


def check_saving(method: Method, folder: Path) -> None:
    """A model folder gives the same method back: config, weights and predictions, bit for bit."""
    images = random_images(3)
    Model(method, ["a", "b"]).save(folder / "model")
    loaded = load(folder / "model")
    assert type(loaded.method) is type(method)
    assert loaded.method.config == method.config
    assert not loaded.method.training
    state = method.state_dict()
    assert loaded.method.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.method.state_dict().items())
    assert same(loaded.method.predict(images), method.predict(images)), "predicts otherwise once loaded"


def check_reading(method: Method, tiny: Tiny) -> list[dict[str, Any]]:
    """A prediction is postprocessed raw outputs; postprocessed by other options they are what a method made with these
    options predicts. Gives the changes that make no difference."""
    check_names(method.config, method.postprocess_options, tiny.reading)
    assert set(method.map_options) <= set(method.postprocess_options)
    images = random_images(3)
    inert = []
    with torch.inference_mode():
        own, found = method.predict(images), method.forward(images)
        for value in found.tensors.values():
            assert len(value) == 3
            assert value.dtype in (torch.float32, torch.int64)
        assert same(method.postprocess(found), own), "a prediction is not its postprocessed raw outputs"
        if isinstance(method, MemoryMethod):
            found = method.search_bank(method.embed(images), neighbours=MOST_NEIGHBOURS)
            assert same(method.postprocess(found), own), "more neighbours found than needed change the result"
        for changes in tiny.reading:
            config = changed(method.config, changes)
            other = method.postprocess(found, config)
            assert same(other, remade(method, config).predict(images)), f"{changes} act before the reading, too"
            if not changes.keys() & set(method.map_options):
                assert torch.equal(other.anomaly_map, own.anomaly_map), f"{changes} change the map"
                assert torch.equal(other.raw_map, own.raw_map), f"{changes} change the map"
            if same(other, own):
                inert.append(changes)
    return inert


def check_masking(method: MemoryMethod, tiny: Tiny) -> None:
    """Patches masked by other options are those of a method made with these options; and no reading by more neighbours
    than were found."""
    assert "bank" in method.bank_options
    check_names(method.config, [name for name in method.bank_options if name != "bank"], tiny.masking)
    images = random_images(3)
    with torch.inference_mode():
        encoded, own = method.encode(images), method.embed(images)
        kept = []
        for changes in tiny.masking:
            config = changed(method.config, changes)
            other = remade(method, config)
            kept.append(method.mask_patches(encoded, config))
            assert same(kept[-1], other.embed(images)), f"{changes} act elsewhere than in mask_patches"
            for_bank = method.mask_bank_patches(encoded, config)
            assert same(for_bank, other.embed_for_bank(images)), f"{changes} act elsewhere than in mask_bank_patches"
        assert not kept or any(not same(each, own) for each in kept)
        few = method.search_bank(own, neighbours=1).tensors
    more = dataclasses.replace(method.config, neighbours=2)
    with pytest.raises(OptionError, match="neighbours=2"):
        method.anomaly_maps(few, more)
    with pytest.raises(OptionError, match="neighbours=2"):
        method.image_scores(few, torch.zeros(3, SIDE, SIDE), more)


def check_names(config: Any, names: Sequence[str], changes: Sequence[dict[str, Any]]) -> None:
    """These are options of the config, and the changes try them all."""
    for name in names:
        part = config
        for step in name.split("."):
            assert hasattr(part, step), f"there is no option {name}"
            part = getattr(part, step)
    tried = {name for each in changes for name in each}
    assert tried == set(names), f"the tiny form tries {sorted(tried)} of {sorted(names)}"


def check_embedding(method: MemoryMethod) -> None:
    """Patches of one grid, float32, with a mask; scoring an embedding is predicting."""
    images = random_images(3)
    with torch.inference_mode():
        embedding, for_bank = method.embed(images), method.embed_for_bank(images)
        assert same(method.postprocess(method.search_bank(embedding)), method.predict(images))
    for made in (embedding, for_bank):
        assert isinstance(made, MaskedPatches)
        assert made.patches.dtype == torch.float32
        assert made.keep.dtype == torch.bool
        assert made.patches.ndim == 3
        assert made.patches.shape[:2] == made.keep.shape == (3, embedding.keep.shape[1])
    bank = method.require_bank()
    assert bank.dimension == embedding.patches.shape[2]
    # an image of the bank itself lies at distance zero
    method.bank = type(bank).build(embedding.patches.flatten(0, 1).numpy())
    assert_close(method.predict(images).anomaly_map, torch.zeros(3, SIDE, SIDE), 1e-6, "for an image of the bank")
    method.bank = bank


def check_options(cls: type[Method], tiny: Tiny) -> None:
    """The config is frozen, survives JSON, documents every option and refuses wrong values."""
    config = tiny.config
    assert isinstance(config, cls.Config)
    assert from_plain(cls.Config, json.loads(json.dumps(to_plain(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.preset = "paper"
    for nested in configs_in(config):
        options = [field.name for field in dataclasses.fields(nested)]
        assert documented(type(nested)) == options, f"docstring and fields of {type(nested).__name__} differ"
    with pytest.raises(OptionError, match="presett"):
        from_plain(cls.Config, {"presett": "paper"})
    presets = get_args(get_type_hints(cls.Config)["preset"])
    assert presets[:2] == ("paper", "reference")
    assert config.preset == "paper"
    for preset in presets:
        made = cls.Config(preset=preset)
        unset = [field.name for field in dataclasses.fields(made) if getattr(made, field.name) is None]
        assert not unset, f"preset {preset} leaves {unset} open"
    for path in wrong_choices(config):
        with pytest.raises(OptionError, match="^" + re.escape(f"{path}='other' must be ")):
            with_values(config, {path: "other"})
    assert tiny.invalid
    for changes in tiny.invalid:
        with pytest.raises(OptionError):
            dataclasses.replace(config, **changes)


# ---------------------------------------------------------------------------------------------------------- helpers
def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other))


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """The config with other values of options by dotted names."""
    for name, value in changes.items():
        group, _, rest = name.partition(".")
        value = changed(getattr(config, group), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{group: value})
    return config


def assert_close(one: Tensor, other: Tensor, tolerance: float, where: str) -> None:
    """Nowhere farther apart than `tolerance` times the largest value (at least 1)."""
    largest = max(1.0, other.abs().max().item())
    worst = (one - other).abs().max().item()
    assert worst <= tolerance * largest, f"{where}: off by {worst:.3g}, largest value {largest:.3g}"


def refuses(method: Method, images: Tensor) -> None:
    """The method says in one sentence, with its name, that it does not take these images."""
    try:
        method.predict(images)
    except OptionError as error:
        if method.name not in str(error):
            raise AssertionError(f"the refusal does not name the method: {error}") from error
    except Exception as error:
        raise AssertionError(f"wrong input is not refused but fails with {error}") from error
    else:
        raise AssertionError("wrong input is not refused")


def configs_in(config: Any) -> Iterator[Any]:
    """A config and those nested in it."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from configs_in(value)


def documented(cls: type) -> list[str]:
    """Options that the Args section of a docstring describes, in order; several may share an entry."""
    section = re.search(r"\n    Args:\n(.*?)(?:\n\n|\n    \"\"\"|\n    [A-Z]\w+:\n|$)", cls.__doc__ or "", re.S)
    assert section, f"{cls.__name__} has no Args section"
    entries = re.findall(r"^ {8}(\w+(?:, \w+)*): \S", section.group(1), re.M)
    return [name for entry in entries for name in entry.split(", ")]


def wrong_choices(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted name of every option with a fixed choice of values, nested ones too."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            yield from wrong_choices(value, f"{prefix}{field.name}.")
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if any(get_origin(kind) is Literal for kind in kinds):
            yield f"{prefix}{field.name}"


# ------------------------------------------------------------------------------------------------------------ tests
def test_every_method_has_a_tiny_form():
    assert TINY.keys() == METHODS.keys()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_keeps_the_contract(name, tmp_path):
    assert METHODS[name].name == name
    check_method(METHODS[name], TINY[name], tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("uninet", {"task": "video"}),
        ("uninet", {"task": "classification"}),
        ("uninet", {"task": "segmentation"}),
        ("onenip", {"refiner": False}),
        ("onenip", {"prompt": "none"}),
        ("uniformaly", {"mask": "off"}),
        ("uniformaly", {"mask_kernel": 1, "mask_threshold": 0.985}),
    ],
    ids=str,
)
def test_other_forms_of_methods_are_read_by_the_same_options(name, changes):
    config = dataclasses.replace(TINY[name].config, **changes)
    check_reading(fit(METHODS[name](config)), TINY[name])


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU to compare with its CPU")
def test_cpu_and_gpu_agree(name, tmp_path):
    method = fit(METHODS[name](TINY[name].config))
    Model(method).save(tmp_path)
    images = random_images(3)
    on_gpu = load(tmp_path, "cuda").method.predict(images.to("cuda"))
    for gpu, cpu in zip(on_gpu, method.predict(images)):
        assert gpu.device.type == "cuda"
        assert_close(gpu.cpu(), cpu, DEVICE_TOLERANCE, "on the GPU")


@pytest.mark.parametrize("changes", INVALID_BANKS, ids=str)
def test_a_bank_refuses_wrong_options(changes):
    with pytest.raises(OptionError, match="must be"):
        dataclasses.replace(TINY["patchcore"].config.bank, **changes)


# ------------------------------------------------------------------------------------- the suite finds broken methods
class RanksInBatch(UniFormaly):
    def predict(self, images):
        found = super().predict(images)
        return found._replace(score=found.score / found.score.max())


class TakesAnything(UniFormaly):
    def check_images(self, images):
        pass


class TrainsItsEncoder(UniFormaly):
    def __init__(self, config, bank=None):
        super().__init__(config, bank)
        self.encoder.requires_grad_(True)


class DrawsItsScale(UniFormaly):
    def predict(self, images):
        found = super().predict(images)
        return found._replace(score=found.score * torch.rand(1))


class ForgetsItsScale(UniFormaly):
    """Learns something when it is fitted that is in no state dict."""

    scale = 1.0

    def embed_for_bank(self, images):
        self.scale = 2.0
        return super().embed_for_bank(images)

    def predict(self, images):
        found = super().predict(images)
        return found._replace(score=found.score * self.scale)


class FindsByItsRatio(UniFormaly):
    def search_bank(self, embedding, neighbours=None):
        found = super().search_bank(embedding, neighbours)
        return found._replace(tensors={name: value * self.config.k_ratio for name, value in found.tensors.items()})


class BlursUnsaid(UniFormaly):
    map_options = ("neighbours",)


class MisnamesAnOption(UniFormaly):
    postprocess_options = ("neighbours", "k_ratio", "blur")


class MasksInItsNetwork(UniFormaly):
    def encode(self, images):
        encoded = super().encode(images)
        return encoded._replace(patches=encoded.patches * self.config.mask_threshold)


class HalfPrecision(UniFormaly):
    def predict(self, images):
        return Prediction(*(part.half() for part in super().predict(images)))


@dataclasses.dataclass(frozen=True)
class Undocumented(UniFormaly.Config):
    """Options.

    Args:
        preset: the only one that is described.
    """


BROKEN = {
    RanksInBatch: "in another batch: off by",
    TakesAnything: "wrong input is not refused",
    TrainsItsEncoder: "a frozen encoder is trained",
    DrawsItsScale: "not deterministic",
    ForgetsItsScale: "predicts otherwise once loaded",
    FindsByItsRatio: "act before the reading, too",
    BlursUnsaid: "change the map",
    MisnamesAnOption: "there is no option blur",
    MasksInItsNetwork: "act elsewhere than in mask_patches",
    HalfPrecision: "predictions are float32",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda cls: cls.__name__)
def test_the_suite_finds_a_broken_method(broken, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "uniformaly", broken)  # what its model folder is loaded as
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check_method(broken, TINY["uniformaly"], tmp_path)


def test_the_suite_finds_an_undocumented_option(tmp_path):
    class Method(UniFormaly):
        Config = Undocumented

    config = Undocumented(
        **{f.name: getattr(TINY["uniformaly"].config, f.name) for f in dataclasses.fields(Undocumented)}
    )
    with pytest.raises(AssertionError, match="docstring and fields of Undocumented differ"):
        check_method(Method, dataclasses.replace(TINY["uniformaly"], config=config), tmp_path)
