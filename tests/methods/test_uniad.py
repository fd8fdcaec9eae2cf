"""UniAD against a plain second implementation, its published size, and what learns."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.methods.conftest import RECONSTRUCTION, SIDE, random_images, training_batch
from tests.methods.plain_reconstruction import Plain, enlarged, largest_window_mean, shaken
from unianom.configs.backbone import BackboneConfig
from unianom.configs.training import TrainingConfig
from unianom.configs.transformer import TransformerConfig
from unianom.configs.uniad import UniADConfig
from unianom.errors import OptionError
from unianom.methods.trained import TrainingBatch
from unianom.methods.uniad import UniAD
from unianom.options import flatten, from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"


def configure(**changes) -> UniADConfig:
    return UniADConfig(**{**RECONSTRUCTION, "neighbours": 3, **changes})


def make(**changes) -> UniAD:
    torch.manual_seed(0)
    return UniAD(configure(**changes))


# --------------------------------------------------------------------------------------------- the published model
@pytest.fixture(scope="module")
def published() -> UniAD:
    return UniAD(UniADConfig(backbone=BackboneConfig("tf_efficientnet_b4.aa_in1k", weights="random"))).eval()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_published_size(published):
    assert count(published) == 7_717_392
    assert [count(layer) for layer in published.transformer.encoder] == [789_760] * 4
    assert [count(layer) for layer in published.transformer.decoder.layers] == [1_053_440 + 196 * 256] * 4
    assert published.input.mean == (0.485, 0.456, 0.406)
    assert published.input.std == (0.229, 0.224, 0.225)
    assert published.config.training.steps(3629) == round(1000 * 3629 / 64)


def test_published_shapes(published):
    images = random_images(2, side=224)
    features = published.frozen_features(images)
    assert features.keys() == {"neck"}
    assert features["neck"].shape == (2, 272, 14, 14)
    with torch.inference_mode():
        tokens = published.transformer.encode(features["neck"])
        assert tokens.shape == (2, 196, 256)
        assert published.transformer.decode(tokens).shape == (2, 272, 14, 14)
    prediction = published.predict(images)
    assert prediction.anomaly_map.shape == (2, 224, 224)
    assert prediction.score.shape == (2,)


def test_published_start(published):
    """Xavier-uniform linear layers with zero biases, standard normal queries."""
    transformer = published.transformer
    for layer in (transformer.project, transformer.restore, transformer.encoder[0].feed_forward.layers[0]):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=2e-2)
        assert not layer.bias.any()
    queries = torch.cat([layer.queries for layer in transformer.decoder.layers])
    assert queries.std().item() == pytest.approx(1, rel=1e-2)


# ---------------------------------------------------------------------------------------------- the forward pass
def plain_maps(method: UniAD, images: torch.Tensor) -> list[np.ndarray]:
    """The second implementation's maps."""
    config = method.config
    plain = Plain(method.state_dict(), config.transformer.heads, method.neck.grid, config.neighbours)
    maps = []
    for neck in method.frozen_features(images)["neck"].double().numpy():
        memory = plain.encode(neck, "encoder" in config.masked)
        masked = "decoder_1" in config.masked, "decoder_2" in config.masked
        error = (plain.restore(plain.query_decoder(memory, masked=masked)) - neck) ** 2
        if config.map_form == "norm":
            maps.append(enlarged(np.sqrt(error.sum(0)), SIDE))
        else:
            maps.append(enlarged(error.mean(0), SIDE, corners=False))
    return maps


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"neighbours": 0},
        {"masked": ("encoder",)},
        {"masked": ("decoder_1",)},
        {"masked": ("decoder_2",)},
        {"map_form": "squared"},
        {"taps": (4, 8, 16, 32)},
    ],
    ids=str,
)
def test_maps_are_those_of_the_second_implementation(changes):
    method = shaken(make(**changes))
    images = random_images(2)
    prediction = method.predict(images)
    for found, expected in zip(prediction.anomaly_map.numpy(), plain_maps(method, images), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_where_attention_is_masked_makes_a_difference():
    """Else the test above could not tell one mask from another."""
    images = random_images(1)
    choices = [(), ("encoder",), ("decoder_1",), ("decoder_2",), ("encoder", "decoder_1", "decoder_2")]
    maps = [shaken(make(masked=masked)).predict(images).anomaly_map for masked in choices]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(maps, 2))


@pytest.mark.parametrize("reduce", ["max", "mean", "std"])
@pytest.mark.parametrize("score_pool", [1, 5, 16])
def test_scores(reduce, score_pool):
    method = shaken(make(reduce=reduce, score_pool=score_pool))
    prediction = method.predict(random_images(2))
    for score, anomaly_map in zip(prediction.score, prediction.anomaly_map.double().numpy()):
        by_name = {
            "max": lambda values: largest_window_mean(values, score_pool),
            "mean": np.mean,
            "std": np.std,
        }
        assert score.item() == pytest.approx(by_name[reduce](anomaly_map), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- learning
def test_loss_is_the_mean_squared_error_of_the_second_implementation():
    method = shaken(make())
    batch = training_batch(method)
    plain = Plain(method.state_dict(), method.config.transformer.heads, method.neck.grid, 3)
    errors = []
    for neck in method.frozen_features(batch.images)["neck"].double().numpy():
        errors.append(((plain.restore(plain.query_decoder(plain.encode(neck))) - neck) ** 2).mean())
    losses = method.training_loss(batch)
    assert losses.keys() == {"loss"}
    assert losses["loss"].item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_kept_features_stand_for_images():
    method = make().eval()
    batch = training_batch(method)
    kept = TrainingBatch(batch.category, features=method.frozen_features(batch.images))
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(kept)["loss"])


def test_the_target_is_not_jittered():
    """Of a transformer that gives zeros, the loss is the clean features' mean square, however strong the jitter."""
    method = make()
    batch = training_batch(method)
    with torch.no_grad():
        method.transformer.restore.weight.zero_()
    clean = method.frozen_features(batch.images)["neck"]
    assert method.train().training_loss(batch)["loss"].item() == pytest.approx(clean.square().mean().item(), rel=1e-6)


def test_jitter_is_for_training_only():
    method = make(transformer=dataclasses.replace(RECONSTRUCTION["transformer"], dropout=0.0))
    batch = training_batch(method)
    method.eval()
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(batch)["loss"])
    method.train()
    assert not torch.equal(method.training_loss(batch)["loss"], method.training_loss(batch)["loss"])
    quiet = dataclasses.replace(method.config.transformer, jitter_probability=0.0)
    method = make(transformer=quiet).train()
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(batch)["loss"])


def test_losses_are_float32_under_autocast():
    method = make().eval()
    batch = training_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.training_loss(batch)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(method.training_loss(batch)["loss"].item(), rel=0.05)


def test_one_batch_can_be_learned():
    method = make(transformer=dataclasses.replace(RECONSTRUCTION["transformer"], dim=32, jitter_scale=1.0)).train()
    batch = TrainingBatch(torch.zeros(4), features=method.frozen_features(random_images(4)))
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(100):
        loss = method.training_loss(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


# ------------------------------------------------------------------------------------------------------- options
def test_presets_differ_in_the_padding_of_the_encoder_alone():
    paper, reference = (flatten(dataclasses.asdict(UniADConfig(preset=preset))) for preset in ("paper", "reference"))
    assert {key: (paper[key], reference[key]) for key in paper if paper[key] != reference[key]} == {
        "preset": ("paper", "reference"),
        "backbone.padding_side": (None, 380),
    }


def test_a_window_that_hides_everything_is_refused():
    with pytest.raises(OptionError, match=r"neighbours=7.*4×4"):
        make(neighbours=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 0},
        {"dim": 30, "heads": 4},
        {"dim": 5, "heads": 1},
        {"encoder_layers": 0},
        {"dropout": 1.0},
        {"jitter_probability": 1.5},
        {"jitter_scale": -1.0},
        {"jitter_scale": float("nan")},
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(changes):
    with pytest.raises(OptionError, match="must be"):
        TransformerConfig(**changes)


@pytest.mark.parametrize(
    ("name", "changes", "training"),
    [
        ("uniad_mvtec", {}, {}),
        ("uniad_cifar10", {"taps": (2, 4, 8, 16, 32), "reduce": "mean"}, {"batch_size": 128, "seed": 131}),
        ("uniad_cada", {"map_form": "squared"}, {"iterations": 50_000, "learning_rate": 3e-4}),
    ],
)
def test_recipes(name, changes, training):
    config = from_plain(UniADConfig, yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["method"])
    assert config == UniADConfig(**changes, training=TrainingConfig(**training))
