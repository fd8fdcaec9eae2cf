"""RevDist against a plain second implementation, its published size, and what learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.methods.conftest import INPUT, SIDE, random_images, tiny_method, training_batch
from tests.methods.plain_distillation import distance, map_and_score, position_distances
from tests.methods.plain_reconstruction import shaken
from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig
from unianom.configs.revdist import RevDistConfig
from unianom.configs.training import TrainingConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.methods.revdist import RevDist
from unianom.methods.trained import TrainingBatch
from unianom.model import Model, load
from unianom.options import from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
MULTICLASS_MAP = DistanceMapConfig(fuse="mean", blur="box", score_share=0.01)


def make(backbone: str = "resnet10t", **changes) -> RevDist:
    torch.manual_seed(0)
    return RevDist(RevDistConfig(backbone=BackboneConfig(backbone, weights="random"), input=INPUT, **changes))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ the published model
def test_published_size():
    backbone = BackboneConfig("wide_resnet50_2.tv_in1k", weights="random")
    with torch.device("meta"):  # but for the blur, which SciPy makes
        method = RevDist(RevDistConfig(backbone=backbone, map=DistanceMapConfig(blur="none")))
    assert count(method.encoder) == 24_862_528
    assert count(method.bottleneck) == 58_885_120
    assert count(method.decoder) == 24_917_504
    assert method.input.side == 256
    assert method.input.mean == (0.485, 0.456, 0.406)
    assert method.input.std == (0.229, 0.224, 0.225)


def test_published_training():
    config = RevDistConfig()
    assert config.training.steps(209) == round(200 * 209 / 16)  # bottle
    ((optimiser, schedule),) = ((o.optimiser, o.schedule) for o in make().optimizers(100))
    assert type(optimiser) is torch.optim.Adam
    (group,) = optimiser.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (5e-3, (0.5, 0.999), 0, 1e-8)
    for _ in range(100):
        optimiser.step()
        schedule.step()
    assert group["lr"] == 5e-3  # no decay
    assert (config.training.clip_norm, config.training.seed) == (None, 111)


# --------------------------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize(
    ("backbone", "config"),
    [
        ("resnet10t", DistanceMapConfig()),
        ("resnet10t", MULTICLASS_MAP),
        ("resnet10t", DistanceMapConfig(blur="none")),
        ("resnet50", MULTICLASS_MAP),
    ],
    ids=str,
)
def test_maps_and_scores_are_those_of_the_second_implementation(backbone, config):
    method = shaken(make(backbone, map=config))
    images = random_images(2)
    prediction = method.predict(images)
    with torch.inference_mode():
        teacher = method.encoder(images)
        student = method.decoder(method.bottleneck(teacher))
    assert [level.shape for level in student] == [level.shape for level in teacher]
    for index in range(2):
        pairs = [(t[index].double().numpy(), s[index].double().numpy()) for t, s in zip(teacher, student)]
        expected, score = map_and_score([position_distances(*pair) for pair in pairs], config, SIDE)
        np.testing.assert_allclose(prediction.anomaly_map[index].numpy(), expected, atol=1e-5)
        assert prediction.score[index].item() == pytest.approx(score, abs=1e-5)


def test_a_model_folder_keeps_what_was_learned(tmp_path):
    method = shaken(make(activation="gelu", map=MULTICLASS_MAP))
    Model(method).save(tmp_path)
    images = random_images(2)
    for one, other in zip(load(tmp_path).method.predict(images), method.predict(images)):
        assert torch.equal(one, other)


# ----------------------------------------------------------------------------------------------------------- learning
@pytest.mark.parametrize("loss", ["positions", "flattened"])
def test_losses_are_those_of_the_second_implementation(loss):
    method = shaken(make(loss=loss))
    batch = training_batch(method, 3)
    losses = method.training_loss(batch)
    with torch.no_grad():
        teacher = method.encoder(batch.images)
        student = method.decoder(method.bottleneck(teacher))
    assert losses.keys() == {"loss", "level_0", "level_1", "level_2"}
    expected = []
    for level, pair in enumerate(zip(teacher, student)):
        images = [(t.double().numpy(), s.double().numpy()) for t, s in zip(*pair)]
        if loss == "flattened":
            expected.append(np.mean([distance(*image) for image in images]))
        else:
            expected.append(np.mean([position_distances(*image) for image in images]))
        assert losses[f"level_{level}"].item() == pytest.approx(expected[level], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(expected), rel=1e-5)


def test_the_two_losses_differ():
    one, other = (shaken(make(loss=loss)) for loss in ("positions", "flattened"))
    batch = training_batch(one)
    assert abs(one.training_loss(batch)["loss"] - other.training_loss(batch)["loss"]).item() > 1e-3


def test_kept_features_stand_for_images():
    method = make().eval()
    batch = training_batch(method)
    features = method.frozen_features(batch.images)
    assert [tuple(level.shape) for level in features.values()] == [(4, 64, 16, 16), (4, 128, 8, 8), (4, 256, 4, 4)]
    kept = TrainingBatch(batch.category, features=features)
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(kept)["loss"])


def test_equal_encoders_share_kept_features():
    key = make().feature_key()
    assert key == tiny_method("recontrast").feature_key()
    assert key == make(loss="flattened", activation="gelu", training=TrainingConfig(seed=1)).feature_key()
    assert key != make("resnet18").feature_key()


def test_bottleneck_and_decoder_learn_and_the_encoder_does_not():
    method = make().train()
    method.training_loss(training_batch(method))["loss"].backward()
    learned = {name.split(".")[0] for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert learned == {"bottleneck", "decoder"}
    (optimisation,) = method.optimizers(10)
    held = {id(parameter) for group in optimisation.optimiser.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for part in (method.bottleneck, method.decoder) for parameter in part.parameters()}


def test_losses_are_float32_under_autocast():
    method = make().eval()
    batch = training_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.training_loss(batch)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(method.training_loss(batch)["loss"].item(), rel=0.05)


@pytest.mark.parametrize("loss", ["positions", "flattened"])
def test_one_batch_can_be_learned(loss):
    method = make(loss=loss).train()
    batch = TrainingBatch(torch.zeros(4), features=method.frozen_features(random_images(4)))
    (optimisation,) = method.optimizers(20)
    losses = []
    for step in range(20):
        total = method.training_loss(batch)["loss"]
        optimisation.optimiser.zero_grad()
        total.backward()
        optimisation.step(step)
        losses.append(total.item())
    assert losses[-1] < 0.6 * losses[0]


# ------------------------------------------------------------------------------------------------------------ options
def test_presets_differ_in_the_loss_alone():
    paper, reference = (dataclasses.asdict(RevDistConfig(preset=preset)) for preset in ("paper", "reference"))
    assert {key: (paper[key], reference[key]) for key in paper if paper[key] != reference[key]} == {
        "preset": ("paper", "reference"),
        "loss": ("positions", "flattened"),
    }


def test_gelu_is_the_decoders():
    method = make(activation="gelu")
    assert not any(isinstance(part, nn.ReLU) for part in method.decoder.modules())
    assert not any(isinstance(part, nn.GELU) for part in method.bottleneck.modules())


def test_inputs_and_encoders_that_do_not_fit():
    with pytest.raises(OptionError, match=r"input of 72 pixels.*multiple of 32"):
        RevDistConfig(input=InputPolicy(resize="stretch", size=72, crop=None))
    with pytest.raises(OptionError, match="needs a pyramid"):
        make("vit_tiny_patch16_224")


MULTICLASS = TrainingConfig(
    iterations=5000,
    batch_size=16,
    learning_rate=2e-3,
    weight_decay=1e-5,
    eps=1e-10,
    amsgrad=True,
    decay=0.2,
    clip_norm=None,
    seed=1,
)


@pytest.mark.parametrize(
    ("name", "per_category", "changes"),
    [
        ("revdist_mvtec", True, {}),
        ("revdist_visa", True, {}),
        *(
            (
                f"revdist_multiclass_{data}",
                False,
                {"preset": "reference", "activation": "gelu", "map": MULTICLASS_MAP, "training": MULTICLASS},
            )
            for data in ("mvtec", "visa")
        ),
    ],
)
def test_recipes(name, per_category, changes):
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert recipe.get("per_category", False) == per_category
    assert from_plain(RevDistConfig, recipe["method"]) == RevDistConfig(**changes)
