"""What all trained methods share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.methods.conftest import TINY, random_images
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.errors import OptionError
from unianom.methods import METHODS
from unianom.methods.trained import BatchSpec, TrainedMethod, TrainingBatch

# ---- batches ------------------------------------------------------------------------------------------------------


def full_batch(count: int) -> TrainingBatch:
    numbers = torch.arange(count)
    return TrainingBatch(
        category=numbers,
        images=numbers.view(-1, 1, 1, 1).expand(count, 3, 4, 4).float(),
        features={"a": numbers.view(-1, 1) * 10.0, "b": numbers.view(-1, 1, 1) * 100.0},
        synthetic_images=numbers.view(-1, 1, 1, 1).expand(count, 3, 4, 4) + 1000.0,
        synthetic_mask=numbers.view(-1, 1, 1, 1).expand(count, 1, 4, 4) + 2000.0,
        prompt_images=numbers.view(-1, 1, 1, 1).expand(count, 3, 4, 4) + 3000.0,
        prompt_features={"a": numbers.view(-1, 1) + 4000.0},
    )


def flat(batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Every tensor by its path."""
    found = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, dict):
            found |= {f"{field.name}.{key}": tensor for key, tensor in value.items()}
        elif value is not None:
            found[field.name] = value
    return found


def test_a_function_is_applied_to_every_tensor_of_a_batch():
    batch = full_batch(3)
    before = {name: tensor.clone() for name, tensor in flat(batch).items()}
    mapped = flat(batch.map(lambda tensor: -tensor))
    assert len(before) == 8
    assert mapped.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(mapped[name], -tensor)
        assert torch.equal(flat(batch)[name], tensor)  # the batch itself is as it was


def test_what_a_batch_lacks_its_images_and_parts_lack_too():
    batch = TrainingBatch(torch.arange(5), features={"a": torch.zeros(5, 2)})
    for other in (batch.map(torch.clone), *batch.split(2)):
        assert set(flat(other)) == {"category", "features.a"}


@pytest.mark.parametrize(
    ("count", "parts", "sizes"),
    [(6, 1, [6]), (6, 3, [2, 2, 2]), (7, 3, [2, 2, 3]), (8, 3, [2, 3, 3]), (3, 5, [1, 1, 1])],
)
def test_the_parts_of_a_batch_are_even_and_make_it_up(count, parts, sizes):
    batch = full_batch(count)
    pieces = batch.split(parts)
    assert sorted(map(len, pieces)) == sizes
    for name, tensor in flat(batch).items():
        assert torch.equal(torch.cat([flat(piece)[name] for piece in pieces]), tensor)


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "images", "steps"),
    [
        ({"epochs": 1, "batch_size": 8}, 16, 2),
        ({"epochs": 1, "batch_size": 8}, 19, 2),  # 2.375
        ({"epochs": 1, "batch_size": 8}, 21, 3),  # 2.625
        ({"epochs": 2.5, "batch_size": 10}, 100, 25),
        ({"epochs": 1000, "batch_size": 64}, 3629, 56703),  # MVTec AD at UniAD's setting
        ({"epochs": 0.001, "batch_size": 64}, 10, 1),
        ({"epochs": 1000, "iterations": 7}, 3629, 7),
    ],
)
def test_epochs_are_converted_to_iterations_unless_these_are_given(changes, images, steps):
    assert TrainingConfig(**changes).steps(images) == steps


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"iterations": 0},
        {"learning_rate": 0.0},
        {"weight_decay": -1e-4},
        {"clip_norm": 0.0},
        {"decay_at": (0.0,)},
        {"decay_at": (1.0,)},
        {"decay_at": (0.8, 0.5)},
        {"decay_at": (0.5, 1.5)},
    ],
    ids=str,
)
def test_impossible_training_is_refused(changes):
    with pytest.raises(OptionError, match="must be"):
        TrainingConfig(**changes)


def test_training_without_decay_or_clipping_is_possible():
    TrainingConfig(decay_at=(), clip_norm=None, weight_decay=0.0)


def test_augmentation_is_active_as_soon_as_one_category_is_changed():
    assert not Augmentation().active
    assert not Augmentation(probability=1.0).active
    assert not BatchSpec().augmentation.active
    for name in ("horizontal", "vertical", "turns"):
        assert Augmentation(**{name: ("screw",)}).active
        assert Augmentation(**{name: ("*",)}).active
    for probability in (-0.1, 1.1):
        with pytest.raises(OptionError, match=r"probability=.* must be in \[0, 1\]"):
            Augmentation(probability=probability)


# ---- optimisers ---------------------------------------------------------------------------------------------------


def uniad(**training: Any) -> TrainedMethod:
    config = dataclasses.replace(TINY["uniad"].config, training=TrainingConfig(**training))
    method = METHODS["uniad"](config)
    assert isinstance(method, TrainedMethod)
    return method


@pytest.mark.parametrize(
    ("decay_at", "iterations", "rates"),
    [
        ((0.25, 0.5), 8, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01]),
        ((0.8,), 5, [1, 1, 1, 1, 0.1]),
        ((0.8,), 7, [1, 1, 1, 1, 1, 1, 0.1]),  # after round(5.6) steps
        ((), 3, [1, 1, 1]),
    ],
)
def test_the_learning_rate_decays_after_its_shares_of_the_run(decay_at, iterations, rates):
    method = uniad(learning_rate=2.0, decay_at=decay_at, decay=0.1)
    (optimisation,) = method.optimizers(iterations)
    seen = []
    for _ in range(iterations):
        seen += {group["lr"] for group in optimisation.optimiser.param_groups}
        optimisation.optimiser.step()
        optimisation.schedule.step()
    assert seen == pytest.approx([2 * rate for rate in rates])


def test_adamw_learns_what_is_not_frozen_and_nothing_else():
    method = uniad(learning_rate=0.5, weight_decay=0.25, betas=(0.7, 0.8))
    (optimisation,) = method.optimizers(10)
    optimiser = optimisation.optimiser
    assert type(optimiser) is torch.optim.AdamW
    (group,) = optimiser.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.7, 0.8))
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    learned = {names[id(parameter)] for parameter in group["params"]}
    assert learned == {name for name in names.values() if not name.startswith("neck.encoder.")}


def test_every_call_makes_fresh_optimisers():
    method = uniad(learning_rate=0.5, decay_at=(0.5,))
    (first,) = method.optimizers(2)
    for _ in range(2):
        first.optimiser.step()
        first.schedule.step()
    (second,) = method.optimizers(2)
    assert first.optimiser.param_groups[0]["lr"] == pytest.approx(0.05)
    assert second.optimiser.param_groups[0]["lr"] == 0.5


# ---- features -----------------------------------------------------------------------------------------------------


def test_kept_features_take_the_place_of_those_computed_now():
    method = uniad().eval()
    images, prompts = random_images(2, 1), random_images(2, 2)
    kept = {"neck": torch.zeros(2, 3)}
    category = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        computed = TrainingBatch(category, images=images, prompt_images=prompts)
        assert torch.equal(method.features_of(computed)["neck"], method.frozen_features(images)["neck"])
        assert torch.equal(method.prompt_features_of(computed)["neck"], method.frozen_features(prompts)["neck"])
        batch = TrainingBatch(category, images=images, features=kept, prompt_images=prompts, prompt_features=kept)
        assert method.features_of(batch) is kept
        assert method.prompt_features_of(batch) is kept
    with pytest.raises(ValueError, match="the batch has no images"):
        method.features_of(TrainingBatch(category))


def test_features_depend_on_encoder_and_taps_but_not_on_training():
    config = TINY["unias"].config
    keys = []
    for changes in ({}, {"training": TrainingConfig(seed=1)}, {"taps": (8, 16)}):
        method = METHODS["unias"](dataclasses.replace(config, **changes))
        assert isinstance(method, TrainedMethod)
        keys.append(method.feature_key())
    assert keys[0] == keys[1] != keys[2]
    assert keys[0]["backbone"]["name"] == config.backbone.name
