"""ReContrast against a plain second implementation, its published size, and what learns from what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.methods.conftest import INPUT, SIDE, random_images, training_batch
from tests.methods.plain_distillation import distance, map_and_score, position_distances
from tests.methods.plain_reconstruction import shaken
from unianom.configs.backbone import BackboneConfig
from unianom.configs.distance_map import DistanceMapConfig
from unianom.configs.recontrast import ReContrastConfig, ReContrastTraining
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.methods.layers.distillation import distance_map, flattened_distance
from unianom.methods.recontrast import GuardedBatchNorm, ReContrast, mined_distance
from unianom.methods.trained import TrainingBatch
from unianom.model import Model, load
from unianom.options import from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
MULTICLASS_MAP = DistanceMapConfig(fuse="mean", blur="box", score_share=0.01)


def make(backbone: str = "resnet10t", **changes) -> ReContrast:
    torch.manual_seed(0)
    return ReContrast(ReContrastConfig(backbone=BackboneConfig(backbone, weights="random"), input=INPUT, **changes))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------ the published model
def test_published_size():
    """144,676,480 parameters are published, among them 8,392,704 of a convolution and a batch norm never used."""
    backbone = BackboneConfig("wide_resnet50_2.tv_in1k", weights="random")
    with torch.device("meta"):  # but for the blur, which SciPy makes
        method = ReContrast(ReContrastConfig(backbone=backbone, map=DistanceMapConfig(blur="none")))
    assert count(method.encoders.source) == count(method.encoders.target) == 24_862_528
    assert count(method.bottleneck) == 58_885_120
    assert count(method.decoder) == 27_673_600
    assert count(method) == 144_676_480 - 8_392_704
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count(method) - 24_862_528
    assert (method.input.side, method.input.mean) == (256, (0.485, 0.456, 0.406))


def test_published_start():
    """Heads are Kaiming-normal over what goes out, with PyTorch's own biases; both encoders begin alike."""
    method = make("resnet18")
    for head, channels in zip(method.decoder.heads, [64, 128, 256] * 2, strict=True):
        assert head.weight.shape == (channels, channels, 1, 1)
        assert head.weight.std().item() == pytest.approx((2 / channels) ** 0.5, rel=0.05)
        assert 0 < head.bias.abs().max() <= channels**-0.5
    state = method.encoders.source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in method.encoders.target.state_dict().items())


# --------------------------------------------------------------------------------------------------------- prediction
def levels_of(method: ReContrast, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What to match and what was grown: head 1 of the trained encoder's half with the frozen encoder's levels, head 2
    of the frozen encoder's half with the trained encoder's. Each half goes through bottleneck and decoder by itself,
    which in evaluation mode is the same."""
    with torch.no_grad():
        source, target = method.encoders.source(images), method.encoders.target(images)
        from_target = method.decoder.decoder(method.bottleneck(target))
        from_source = method.decoder.decoder(method.bottleneck(source))
        heads = method.decoder.heads
        grown = [heads[level](from_target[level]) for level in range(3)]
        grown += [heads[3 + level](from_source[level]) for level in range(3)]
    return [*source, *target], grown


@pytest.mark.parametrize(
    "config", [DistanceMapConfig(), MULTICLASS_MAP, DistanceMapConfig(score_share=1.0, blur="none")], ids=str
)
def test_maps_and_scores_are_those_of_the_second_implementation(config):
    method = shaken(make(map=config))
    images = random_images(2)
    prediction = method.predict(images)
    aims, grown = levels_of(method, images)
    assert [level.shape for level in grown] == [level.shape for level in aims]
    for index in range(2):
        pairs = [(aim[index].double().numpy(), made[index].double().numpy()) for aim, made in zip(aims, grown)]
        expected, score = map_and_score([position_distances(*pair) for pair in pairs], config, SIDE)
        np.testing.assert_allclose(prediction.anomaly_map[index].numpy(), expected, atol=2e-5)
        assert prediction.score[index].item() == pytest.approx(score, abs=2e-5)


def test_a_model_folder_keeps_what_was_learned(tmp_path):
    """Also what the guard's floor came from, which the folder's random start does not have."""
    method = shaken(make(norm_guard=5e-4, norm_eps=1e-6, activation="gelu"))
    for part in method.modules():
        if isinstance(part, GuardedBatchNorm):
            part.floor.uniform_(0, 1e-4)
    Model(method).save(tmp_path)
    loaded = load(tmp_path).method
    images = random_images(2)
    for one, other in zip(loaded.predict(images), method.predict(images)):
        assert torch.equal(one, other)
    batch = training_batch(method)
    assert torch.equal(loaded.train().training_loss(batch)["loss"], method.train().training_loss(batch)["loss"])


# ------------------------------------------------------------------------------------------------------------- losses
def test_losses_are_those_of_the_second_implementation():
    method = shaken(make())
    batch = training_batch(method, 3)
    losses = method.training_loss(batch)
    aims, grown = levels_of(method, batch.images)
    sums = []
    for side in (slice(0, 3), slice(3, 6)):
        levels = zip(aims[side], grown[side], strict=True)
        sums.append(
            sum(
                np.mean([distance(a.double().numpy(), g.double().numpy()) for a, g in zip(aim, made)])
                for aim, made in levels
            )
        )
    assert losses.keys() == {"loss", "to_source", "to_target"}
    assert losses["to_source"].item() == pytest.approx(sums[0], rel=1e-5)
    assert losses["to_target"].item() == pytest.approx(sums[1], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(sum(sums) / 2, rel=1e-5)
    assert abs(sums[0] - sums[1]) > 1e-3  # else the sides could be exchanged


def hooked_distance(teacher: Tensor, student: Tensor, a: float) -> Tensor:
    """Hard mining as published: a hook multiplies the gradient of easy positions by zero."""
    point = distance_map(teacher, student.detach())
    easy = (point < point.mean() + a * point.reshape(-1).std())[:, None].expand_as(student)
    student.register_hook(lambda gradient: gradient.masked_fill(easy, 0.0))
    return flattened_distance(teacher, student)


@pytest.mark.parametrize("a", [-3.0, 0.0, 0.5, 1.0])
def test_mining_has_the_gradient_of_a_hook(a):
    """Equal to the bit, also behind the student; and the value is that without mining."""
    generator = torch.Generator().manual_seed(0)
    teacher, before = torch.randn(2, 3, 8, 6, 5, generator=generator)
    results = []
    for function in (mined_distance, hooked_distance):
        weight = torch.full((8, 1, 1), 0.7, requires_grad=True)
        student = (before * weight).sigmoid()
        student.retain_grad()
        value = function(teacher, student, a)
        value.backward()
        results.append((value.detach(), student.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(results[0][0], flattened_distance(teacher, before.mul(0.7).sigmoid()))


def test_mining_by_loops():
    """Which positions are learned from, of a batch of two."""
    generator = np.random.default_rng(0)
    teacher, student = generator.normal(size=(2, 2, 4, 5, 3))
    distances = np.stack([position_distances(t, s) for t, s in zip(teacher, student)])
    spread = np.sqrt(((distances - distances.mean()) ** 2).sum() / (distances.size - 1))
    learner = torch.from_numpy(student).float().requires_grad_()
    mined_distance(torch.from_numpy(teacher).float(), learner, 0.25).backward()
    found = learner.grad.abs().sum(1).numpy() > 0
    np.testing.assert_array_equal(found, distances >= distances.mean() + 0.25 * spread)
    assert 0 < found.mean() < 1


def test_share_of_positions_that_are_learned_from():
    """About a sixth of Gaussian noise in the end (METHODS section 16), all of it in the beginning."""
    teacher, student = torch.randn(2, 8, 64, 32, 32, generator=torch.Generator().manual_seed(0))
    for a, share in ((1.0, 0.16), (0.0, 0.5), (-3.0, 1.0)):
        learner = student.clone().requires_grad_()
        mined_distance(teacher, learner, torch.tensor(a)).backward()
        assert (learner.grad.abs().sum(1) > 0).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("ramp", "steps"), [(0.1, 200), (0.2, 400), (0.0, 0)])
def test_mining_gets_stricter(ramp, steps):
    method = make(mining_ramp=ramp)
    tensor = method.a
    assert method.a.item() == -3
    for step in (0, 1, 57, 199, 200, 300, 400, 1999):
        method.on_step_start(step, 2000)
        expected = min(-3 + 4 * step / steps, 1) if steps else 1
        assert method.a.item() == pytest.approx(expected, abs=1e-6)
    assert method.a is tensor  # filled, not replaced, so that a compiled step goes on
    assert "a" not in method.state_dict()


def test_a_compiled_step_is_compiled_once():
    """Though mining changes from step to step."""
    method = make(norm_guard=5e-4).train()
    batch = training_batch(method)
    step = torch.compile(method.training_loss, backend="eager")
    losses = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (0, 1, 2, 100):
            method.on_step_start(number, 100)
            losses.append(step(batch)["loss"].item())
    assert np.isfinite(losses).all()


def test_mining_reaches_the_loss():
    """Its value is the same, its gradient is not."""
    method = shaken(make())
    batch = training_batch(method)
    gradients = []
    for step in (0, 100):
        method.on_step_start(step, 100)
        loss = method.training_loss(batch)["loss"]
        gradients.append(torch.autograd.grad(loss, method.decoder.heads[0].bias)[0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------- gradients, modes
def test_who_learns():
    method = make().train()
    method.training_loss(training_batch(method))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.encoders.source.parameters())
    for part in (method.encoders.target, method.bottleneck, method.decoder):
        assert all(p.grad is not None for p in part.parameters())


def test_the_trained_encoder_learns_through_the_bottleneck_alone():
    """Of a bottleneck that hears nothing it learns nothing, though its levels are still compared with."""
    method = make().train()
    method.bottleneck.register_forward_pre_hook(lambda _, levels: ([level.detach() for level in levels[0]],))
    losses = method.training_loss(training_batch(method))
    assert losses["to_target"] > 0.1
    losses["loss"].backward()
    assert all(p.grad is None for p in method.encoders.target.parameters())
    assert all(p.grad is not None for p in method.decoder.parameters())


def test_what_is_grown_from_the_trained_encoder_teaches_it():
    """The other half, which is compared with it, reaches it only where batch norm mixes the two."""
    method = shaken(make())
    losses = method.training_loss(training_batch(method))
    target = list(method.encoders.target.parameters())
    assert all(gradient.any() for gradient in torch.autograd.grad(losses["to_source"], target, retain_graph=True))
    assert not any(gradient.any() for gradient in torch.autograd.grad(losses["to_target"], target))


@pytest.mark.parametrize("norm", ["train", "eval"])
def test_batch_norm_of_the_trained_encoder(norm):
    method = make(encoder_norm=norm).train()
    before = {key: value.clone() for key, value in method.encoders.state_dict().items()}
    method.training_loss(training_batch(method))
    after = method.encoders.state_dict()
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == ({"target"} if norm == "train" else set())
    assert not method.encoders.source.training
    assert method.bottleneck.fusion.fine[1].training


def test_images_come_along_with_kept_features():
    method = make().eval()
    assert method.batch_spec.images
    batch = training_batch(method)
    features = method.frozen_features(batch.images)
    assert list(features) == ["level_0", "level_1", "level_2"]
    kept = TrainingBatch(batch.category, images=batch.images, features=features)
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(kept)["loss"])
    # and they are taken: of other features the loss is another
    other = dataclasses.replace(kept, features={key: value.flip(0) for key, value in features.items()})
    assert not torch.equal(method.training_loss(batch)["loss"], method.training_loss(other)["loss"])


def test_losses_are_float32_under_autocast():
    method = make(norm_guard=5e-4).train()
    batch = training_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.training_loss(batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert losses["loss"].item() == pytest.approx(method.training_loss(batch)["loss"].item(), rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"norm_guard": 5e-4, "norm_eps": 1e-6}, {"encoder_norm": "eval"}], ids=str)
def test_one_batch_can_be_learned(changes):
    method = make(activation="gelu", **changes).train()
    batch = training_batch(method)
    optimisations = method.optimizers(12)
    losses = []
    for step in range(12):
        method.on_step_start(step, 12)
        total = method.training_loss(batch)["loss"]
        method.zero_grad()
        total.backward()
        for optimisation in optimisations:
            optimisation.step(step)
        losses.append(total.item())
    assert losses[-1] < 0.7 * losses[0]


# --------------------------------------------------------------------------------------------------------- optimisers
def test_encoder_and_the_rest_have_learning_rates_of_their_own():
    training = ReContrastTraining(eps=1e-10, amsgrad=True, decay_at=(0.5,), decay=0.2)
    method = make(training=training)
    others, encoder = (optimisation.optimiser for optimisation in method.optimizers(4))
    assert type(others) is type(encoder) is torch.optim.AdamW
    held = [{id(p) for group in o.param_groups for p in group["params"]} for o in (others, encoder)]
    assert held[0] == {id(p) for part in (method.bottleneck, method.decoder) for p in part.parameters()}
    assert held[1] == {id(p) for p in method.encoders.target.parameters()}
    for optimiser, rate in ((others, 2e-3), (encoder, 1e-5)):
        (group,) = optimiser.param_groups
        settings = [group[key] for key in ("lr", "betas", "weight_decay", "eps", "amsgrad")]
        assert settings == [rate, (0.9, 0.999), 1e-5, 1e-10, True]
    rates = []
    optimisations = method.optimizers(4)
    for step in range(4):
        rates.append([o.optimiser.param_groups[0]["lr"] for o in optimisations])
        for optimisation in optimisations:
            optimisation.step(step)
    np.testing.assert_allclose(rates, [[2e-3, 1e-5]] * 2 + [[4e-4, 2e-6]] * 2)


def test_stable_variant_resets_and_rests():
    """Moments of bottleneck and decoder begin anew at every fourth step, after which the encoder rests for two."""
    method = make(training=ReContrastTraining(reset_every=4, encoder_rest=2), norm_guard=5e-4).train()
    optimisations = method.optimizers(12)
    batch = training_batch(method)
    method.training_loss(batch)["loss"].backward()
    encoder, other = method.encoders.target.encoder.conv1[0].weight, method.decoder.heads[0].weight
    ages, moved = [], []
    for step in range(12):
        before = encoder.detach().clone(), other.detach().clone()
        for optimisation in optimisations:
            optimisation.step(step)
        moved.append((not torch.equal(encoder, before[0]), not torch.equal(other, before[1])))
        ages.append([int(o.optimiser.state[p]["step"]) for o, p in zip(optimisations, (other, encoder))])
    assert [age for age, _ in ages] == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]
    assert [age for _, age in ages] == [1, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7, 8]
    assert [first for first, _ in moved] == [True] * 4 + [False, False, True, True] * 2
    assert all(second for _, second in moved)


def test_without_resets_nothing_rests():
    for optimisation in make().optimizers(10):
        assert (optimisation.period, optimisation.forget, optimisation.rest) == (None, False, 0)


# ------------------------------------------------------------------------------------------------- guarded batch norm
def guarded(guard: float = 5e-4) -> tuple[nn.BatchNorm2d, GuardedBatchNorm]:
    """A batch norm of four channels with statistics of its own, and the guarded one made of it."""
    norm = nn.BatchNorm2d(4, eps=1e-6)
    norm.load_state_dict(
        {
            "weight": torch.tensor([1.0, 2.0, 0.5, 1.5]),
            "bias": torch.tensor([0.0, 1.0, -1.0, 0.5]),
            "running_mean": torch.tensor([0.1, 0.2, 0.3, 0.4]),
            "running_var": torch.tensor([1.0, 2.0, 1e-5, 1.0]),
            "num_batches_tracked": torch.tensor(7),
        }
    )
    return norm, GuardedBatchNorm(norm, guard)


def varied(scales: list[float]) -> Tensor:
    """B×4×h×w of these standard deviations, about a mean of 3."""
    x = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    return 3 + x * torch.tensor(scales).view(1, 4, 1, 1)


def test_a_guarded_norm_is_batch_norm_where_channels_vary():
    norm, guard = guarded()
    x = varied([1.0, 0.1, 1.0, 2.0])
    results = []
    for each in (norm.train(), guard.train()):
        given = x.clone().requires_grad_()
        y = each(given)
        (y * torch.arange(y.numel()).view_as(y).sin()).sum().backward()
        results.append((y.detach(), given.grad, each.weight.grad, each.bias.grad, each.running_mean, each.running_var))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert norm.num_batches_tracked == guard.num_batches_tracked == 8
    norm.eval(), guard.eval()
    torch.testing.assert_close(norm(x), guard(x), rtol=1e-4, atol=1e-5)


def test_guarded_norms_that_activate_go_on_doing_so():
    """As those of EfficientNets do."""
    plain, guarded = (make("efficientnet_lite0", norm_guard=guard) for guard in (0.0, 5e-4))
    levels = [method.eval().encoders.target(random_images(1)) for method in (plain, guarded)]
    for one, other in zip(*levels):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_guarded_norm_does_not_blow_up_what_hardly_varies():
    """The floor is the smaller of guard and variance of the weights: 5e-4, but 1e-5 for the third channel."""
    norm, guard = guarded()
    torch.testing.assert_close(guard.floor, torch.tensor([5e-4, 5e-4, 1e-5, 5e-4]))
    x = varied([1e-3, 1.0, 0.01, 1e-3])
    y = guard.train()(x)
    assert norm.train()(x).std(dim=(0, 2, 3))[0] > 0.5  # plain batch norm makes noise of it
    for channel, floor in ((0, 5e-4), (3, 5e-4), (1, None), (2, None)):
        values = x[:, channel].double()
        variance = values.var(correction=0) if floor is None else torch.tensor(floor)
        expected = (values - values.mean()) / (variance + 1e-6).sqrt() * guard.weight[channel] + guard.bias[channel]
        torch.testing.assert_close(y[:, channel].double(), expected, rtol=1e-3, atol=1e-4)
        kept = values.var() if floor is None else torch.tensor(floor)  # unbiased, as batch norm keeps it
        before = torch.tensor([1.0, 2.0, 1e-5, 1.0])[channel]
        assert guard.running_var[channel].item() == pytest.approx((0.9 * before + 0.1 * kept).item(), rel=1e-4)
        start = torch.tensor([0.1, 0.2, 0.3, 0.4])[channel]
        assert guard.running_mean[channel].item() == pytest.approx((0.9 * start + 0.1 * values.mean()).item(), rel=1e-4)


def test_a_constant_channel_has_a_finite_gradient():
    _, guard = guarded()
    x = torch.full((2, 4, 3, 3), 5.0, requires_grad=True)
    guard.train()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_guard_is_the_trained_encoders():
    method = make(norm_guard=5e-4, norm_eps=1e-6)
    source = [part for part in method.encoders.source.modules() if isinstance(part, nn.BatchNorm2d)]
    target = [part for part in method.encoders.target.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(source) == len(target)
    assert not any(isinstance(part, GuardedBatchNorm) for part in [*source, *method.bottleneck.modules()])
    assert all(isinstance(part, GuardedBatchNorm) for part in target)
    assert {part.eps for part in source} == {1e-5}
    assert {part.eps for part in target} == {1e-6}
    assert not any(isinstance(part, GuardedBatchNorm) for part in make().modules())
    images = random_images(2)
    with torch.no_grad():  # at its first weights, but for eps, it is the frozen one
        method.eval()
        for one, other in zip(method.encoders.source(images), method.encoders.target(images)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ options
def test_presets_do_not_differ():
    paper, reference = (dataclasses.asdict(ReContrastConfig(preset=preset)) for preset in ("paper", "reference"))
    assert {key for key in paper if paper[key] != reference[key]} == {"preset"}


def test_published_training():
    config = ReContrastConfig()
    assert config.training.steps(209) == 2000
    assert dataclasses.replace(config.training, iterations=None, epochs=10).steps(160) == 100
    assert (config.training.clip_norm, config.training.decay_at, config.training.seed) == (None, (), 111)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_learning_rate": -1e-5},
        {"encoder_learning_rate": float("nan")},
        {"reset_every": -1},
        {"encoder_rest": 1},
        {"reset_every": 5, "encoder_rest": 6},
        {"reset_every": 5, "encoder_rest": -1},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_impossible_training_is_refused(changes):
    with pytest.raises(OptionError, match="must be"):
        ReContrastTraining(**changes)


def test_gelu_is_the_decoders():
    method = make(activation="gelu")
    assert not any(isinstance(part, nn.ReLU) for part in method.decoder.modules())
    assert not any(isinstance(part, nn.GELU) for part in method.bottleneck.modules())


MULTICLASS = {
    "encoder_norm": "eval",
    "activation": "gelu",
    "map": MULTICLASS_MAP,
    "training": ReContrastTraining(iterations=5000, eps=1e-10, amsgrad=True, decay_at=(0.8,), decay=0.2, seed=1),
}


@pytest.mark.parametrize(
    ("name", "per_category", "kept", "changes"),
    [
        ("mvtec", True, {"toothbrush", "leather", "grid", "tile", "wood", "screw"}, {}),
        ("visa", True, {"cashew", "pcb1"}, {"training": ReContrastTraining(iterations=3000)}),
        ("aptos", False, set(), {"training": ReContrastTraining(iterations=1000, batch_size=32)}),
        (
            "oct2017",
            False,
            set(),
            {"training": ReContrastTraining(iterations=1000, batch_size=32), "encoder_norm": "eval"},
        ),
        (
            "isic2018",
            False,
            set(),
            {
                "training": ReContrastTraining(batch_size=32),
                "input": InputPolicy(resize="short_side", size=256, crop=224),
                "map": DistanceMapConfig(score_share=1.0),
            },
        ),
        ("multiclass_mvtec", False, set(), MULTICLASS),
        ("multiclass_visa", False, set(), MULTICLASS),
        (
            "stable_mvtec",
            True,
            set(),
            {
                "training": ReContrastTraining(eps=1e-10, reset_every=500, encoder_rest=100),
                "norm_guard": 5e-4,
                "norm_eps": 1e-6,
                "mining_ramp": 0.2,
                "map": DistanceMapConfig(score_share=0.01),
            },
        ),
    ],
)
def test_recipes(name, per_category, kept, changes):
    recipe = yaml.safe_load((RECIPES / f"recontrast_{name}.yaml").read_text())
    assert recipe.get("per_category", False) == per_category
    assert recipe.get("category_options", {}) == {category: {"encoder_norm": "eval"} for category in kept}
    config = from_plain(ReContrastConfig, recipe["method"])
    assert config == ReContrastConfig(**changes)
    for options in recipe.get("category_options", {}).values():
        assert dataclasses.replace(config, **options).encoder_norm == "eval"
