"""OneNIP against a plain second implementation, its published size, its losses, its prompts and what it is without
its parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.methods.conftest import RECONSTRUCTION, SIDE, random_images, training_batch
from tests.methods.plain_reconstruction import Plain, enlarged, largest_window_mean, shaken
from unianom.configs.backbone import BackboneConfig
from unianom.configs.onenip import OneNIPConfig
from unianom.configs.synthesis import SynthesisConfig
from unianom.configs.training import TrainingConfig
from unianom.configs.uniad import UniADConfig
from unianom.data.image import InputPolicy
from unianom.errors import DataError, ModelError, OptionError
from unianom.methods.onenip import OneNIP, dice_loss
from unianom.methods.trained import TrainingBatch
from unianom.methods.uniad import UniAD
from unianom.options import flatten, from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
CATEGORIES = ["a", "b"]


def configure(**changes) -> OneNIPConfig:
    return OneNIPConfig(**{**RECONSTRUCTION, "refiner_width": 8, **changes})


def make(**changes) -> OneNIP:
    torch.manual_seed(0)
    return OneNIP(configure(**changes))


def finished(**changes) -> OneNIP:
    method = shaken(make(**changes))
    method.finalize([training_batch(method, 6)], CATEGORIES)
    return method


# --------------------------------------------------------------------------------------------- the published model
@pytest.fixture(scope="module")
def published() -> OneNIP:
    return OneNIP(OneNIPConfig(backbone=BackboneConfig("tf_efficientnet_b4.aa_in1k", weights="random"))).eval()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def test_published_size(published):
    assert count(published) == 8_372_625
    assert [count(layer) for layer in published.transformer.encoder] == [789_760] * 4
    assert [count(layer) for layer in published.transformer.decoder.layers] == [1_053_440] * 4
    assert count(published.refiner) == 592_769
    assert published.config.neighbours == 7


def test_published_shapes(published):
    features = torch.randn(2, 272, 14, 14)
    with torch.inference_mode():
        prompt = published.transformer.encode(features)
        restored = published.transformer.decode(published.transformer.encode(features), prompt)
        assert restored.shape == (2, 272, 14, 14)
        assert published.refiner(features).shape == (2, 56, 56)
    batch = TrainingBatch(torch.tensor([0, 1]), features={"neck": features})
    published.finalize([batch], CATEGORIES)
    assert published.prompt_pool.shape == (2, 272, 14, 14)
    assert published.predict(random_images(1, side=224)).anomaly_map.shape == (1, 224, 224)


@pytest.mark.parametrize(("side", "grid", "window"), [(224, 14, 7), (256, 16, 8), (320, 20, 10)])
def test_the_window_is_half_the_grid(side, grid, window):
    method = make(input=InputPolicy(resize="stretch", size=side, crop=None))
    assert method.neck.grid == (grid, grid)
    assert method.config.neighbours == window
    mask = method.transformer.encoder[0].mask
    hidden = torch.isinf(mask[grid * grid // 2 + grid // 2]).sum().item()
    assert hidden == (2 * (window // 2) + 1) ** 2  # an even window reaches as far as the next odd one


# ---------------------------------------------------------------------------------------------- the forward pass
def plain_of(method: OneNIP) -> Plain:
    return Plain(method.state_dict(), method.config.transformer.heads, method.neck.grid, method.config.neighbours)


def plain_reconstruction(method: OneNIP, neck: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Of one image's C×h×w features."""
    plain = plain_of(method)
    image = plain.encode(neck)
    if method.config.prompt == "none":
        return plain.restore(plain.query_decoder(image))
    if method.config.prompt == "static":
        return plain.restore(plain.query_decoder(image, plain.encode(prompt)))
    return plain.restore(plain.bidirectional_decoder(image, plain.encode(prompt)))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def plain_prompt(method: OneNIP, neck: np.ndarray) -> int:
    means = [entry.mean((1, 2)) for entry in method.prompt_pool.double().numpy()]
    return int(np.argmax([cosine(neck.mean((1, 2)), mean) for mean in means]))


@pytest.mark.parametrize("prompt", ["dynamic", "static", "none"])
@pytest.mark.parametrize("refiner", [True, False])
@pytest.mark.parametrize("score_pool", [1, 16])
def test_predictions_are_those_of_the_second_implementation(prompt, refiner, score_pool):
    method = finished(prompt=prompt, refiner=refiner, score_pool=score_pool, alpha=0.3)
    images = random_images(2, seed=11)
    prediction = method.predict(images)
    for index, neck in enumerate(method.frozen_features(images)["neck"].double().numpy()):
        entry = None if prompt == "none" else method.prompt_pool[plain_prompt(method, neck)].double().numpy()
        difference = plain_reconstruction(method, neck, entry) - neck
        expected = enlarged(np.sqrt((difference**2).sum(0)), SIDE)
        if refiner:
            refined = plain_of(method).refine(abs(difference), SIDE)
            expected = 0.7 * expected + 0.3 * method.fusion_scale.item() * refined
        np.testing.assert_allclose(prediction.anomaly_map[index].numpy(), expected, atol=1e-5 * expected.max())
        assert prediction.score[index].item() == pytest.approx(largest_window_mean(expected, score_pool), rel=1e-5)


def test_without_its_parts_it_is_uniad():
    torch.manual_seed(0)
    uniad = shaken(UniAD(UniADConfig(**RECONSTRUCTION, neighbours=2)))
    method = make(prompt="none", restoration=False, refiner=False, score_pool=16).eval()
    method.transformer.load_state_dict(uniad.transformer.state_dict())
    images = random_images(2)
    for one, other in zip(method.predict(images), uniad.predict(images), strict=True):
        assert torch.equal(one, other)
    loss, expected = (m.training_loss(training_batch(uniad)) for m in (method, uniad))
    assert loss.keys() == {"loss", "reconstruction"}
    assert loss["loss"].item() == expected["loss"].item()


# ------------------------------------------------------------------------------------------------------- losses
def plain_dice(probability: np.ndarray, mask: np.ndarray, factor: float, smoothing: float) -> float:
    overlap = total = 0.0
    for p, m in zip(probability.flat, mask.flat, strict=True):
        overlap += p * m
        total += p * p + m * m
    return 1 - (factor * overlap + smoothing) / (total + smoothing)


@pytest.mark.parametrize(("factor", "smoothing"), [(2.0, 0.0), (1.0, 1.0)])
def test_dice_loss_is_that_of_loops(factor, smoothing):
    torch.manual_seed(0)
    probability, mask = torch.rand(3, 4, 5), (torch.rand(3, 4, 5) > 0.6).float()
    mask[2] = 0
    found = dice_loss(probability, mask, factor, smoothing)
    for image in range(3):
        expected = plain_dice(probability[image].double().numpy(), mask[image].numpy(), factor, smoothing)
        assert found[image].item() == pytest.approx(expected, rel=1e-6)


def test_dice_loss_of_perfect_and_empty_maps():
    """By hand, for six anomalous pixels: eq. 7 gives 0, the released form 1 − 7/13."""
    mask = torch.zeros(1, 4, 4)
    mask[0, 1:3, :3] = 1
    assert dice_loss(mask, mask, 2.0, 0.0).item() == pytest.approx(0)
    assert dice_loss(mask, mask, 1.0, 1.0).item() == pytest.approx(1 - 7 / 13)
    empty = torch.zeros(1, 4, 4)
    assert dice_loss(empty, empty, 2.0, 0.0).item() == 1  # zero by zero
    assert dice_loss(empty, empty, 1.0, 1.0).item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_only_smoothing_lets_normal_images_teach(smoothing):
    probability = torch.full((1, 4, 4), 0.5, requires_grad=True)
    dice_loss(probability, torch.zeros(1, 4, 4), 2.0, smoothing).sum().backward()
    assert bool(probability.grad.any()) == (smoothing > 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preset": "reference"},
        {"prompt": "static"},
        {"prompt": "none"},
        {"restoration": False},
        {"refiner": False},
        {"refiner": False, "feature_loss": "mean"},
        {"restoration": False, "refiner": False, "feature_loss": "mean"},
        {"segmentation_weight": 2.0},
    ],
    ids=str,
)
def test_losses_are_those_of_the_second_implementation(changes):
    method = shaken(make(**changes))
    config = method.config
    batch = training_batch(method, 2)
    encode = lambda images: method.frozen_features(images)["neck"].double().numpy()  # noqa: E731
    normal = encode(batch.images)
    prompts = [None, None] if batch.prompt_images is None else encode(batch.prompt_images)
    reconstructions = [plain_reconstruction(method, *pair) for pair in zip(normal, prompts, strict=True)]
    expected = {"reconstruction": ((np.stack(reconstructions) - normal) ** 2).mean()}
    total = expected["reconstruction"]
    if config.restoration or config.refiner:
        copies = encode(batch.synthetic_images)
        restored = [plain_reconstruction(method, *pair) for pair in zip(copies, prompts, strict=True)]
    if config.restoration:
        expected["restoration"] = ((np.stack(restored) - normal) ** 2).mean()
        total = (total + expected["restoration"]) * (0.5 if config.feature_loss == "mean" else 1)
    if config.refiner:
        plain = plain_of(method)
        masks = batch.synthetic_mask[:, 0].double().numpy()
        dice = []
        for index in range(2):
            for own, made, mask in (
                (normal, reconstructions, np.zeros((SIDE, SIDE))),
                (copies, restored, masks[index]),
            ):
                refined = plain.refine(abs(made[index] - own[index]), SIDE)
                dice.append(plain_dice(refined, mask, config.dice_factor, config.dice_smoothing))
        expected["segmentation"] = np.mean(dice)
        total += config.segmentation_weight * expected["segmentation"]
    with torch.no_grad():
        losses = method.training_loss(batch)
    assert losses.keys() == {"loss", *expected}
    assert {key: losses[key].item() for key in expected} == pytest.approx(expected, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)


def test_kept_features_stand_for_images_and_prompts():
    method = make().eval()
    batch = training_batch(method)
    kept = dataclasses.replace(batch, images=None, prompt_images=None)
    kept.features = method.frozen_features(batch.images)
    kept.prompt_features = method.frozen_features(batch.prompt_images)
    assert torch.equal(method.training_loss(batch)["loss"], method.training_loss(kept)["loss"])


def test_uniad_and_onenip_share_kept_features():
    uniad = UniAD(UniADConfig(**RECONSTRUCTION, neighbours=2))
    assert make().feature_key() == uniad.feature_key()
    images = random_images(1)
    assert torch.equal(make().frozen_features(images)["neck"], uniad.frozen_features(images)["neck"])
    others = [
        make(taps=(4, 8, 16, 32)),
        make(grid_reduction=4, neighbours=3),
        make(backbone=BackboneConfig("resnet18", "random")),
    ]
    assert all(other.feature_key() != uniad.feature_key() for other in others)


def test_targets_are_not_jittered():
    """Of a transformer that gives zeros, both feature losses are the clean originals' mean square."""
    method = make().train()
    batch = training_batch(method)
    with torch.no_grad():
        method.transformer.restore.weight.zero_()
    losses = method.training_loss(batch)
    clean = method.frozen_features(batch.images)["neck"].square().mean().item()
    assert [losses[key].item() for key in ("reconstruction", "restoration")] == pytest.approx([clean] * 2, rel=1e-6)


def test_prompts_are_jittered_too():
    method = make(transformer=dataclasses.replace(RECONSTRUCTION["transformer"], dropout=0.0)).train()
    seen = []
    method.transformer.project.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    batch = training_batch(method)
    method.training_loss(batch)
    clean = [method.frozen_features(x)["neck"] for x in (batch.images, batch.synthetic_images, batch.prompt_images)]
    changed = seen[0] != torch.cat(clean).flatten(2).transpose(1, 2)
    assert changed.flatten(1).float().mean(1).min() > 0.99


def test_losses_are_float32_under_autocast():
    method = make().eval()
    batch = training_batch(method)
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.training_loss(batch)
    full = method.training_loss(batch)
    for key, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(full[key].item(), rel=0.05)


@pytest.mark.parametrize("prompt", ["dynamic", "static", "none"])
def test_gradients_reach_every_trained_parameter_by_the_features_alone(prompt):
    method = make(prompt=prompt).train()
    losses = method.training_loss(training_batch(method))
    (losses["reconstruction"] + losses["restoration"]).backward()
    for name, parameter in method.named_parameters():
        learns = name.startswith("transformer.")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name


def test_the_refiner_teaches_the_transformer():
    """Nothing is detached between them."""
    method = make().train()
    method.training_loss(training_batch(method))["segmentation"].backward()
    for part in (method.refiner, method.transformer.encoder, method.transformer.restore):
        assert all(parameter.grad.any() for parameter in part.parameters() if parameter.ndim > 1)
    assert not any(parameter.grad is not None for parameter in method.neck.parameters())


def test_one_batch_can_be_learned():
    method = make(transformer=dataclasses.replace(RECONSTRUCTION["transformer"], dim=32, jitter_scale=1.0)).train()
    batch = training_batch(method)
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=5e-3)
    history = []
    for _ in range(50):
        losses = method.training_loss(batch)
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        history.append({key: loss.item() for key, loss in losses.items()})
    last = {key: np.mean([losses[key] for losses in history[-5:]]) for key in history[0]}
    assert last["reconstruction"] < 0.6 * history[0]["reconstruction"]
    assert last["restoration"] < 0.6 * history[0]["restoration"]
    assert last["segmentation"] < history[0]["segmentation"] - 0.15  # normal halves cost 1 in the text's form
    assert last["loss"] < 0.6 * history[0]["loss"]


# -------------------------------------------------------------------------------------------- what batches hold
@pytest.mark.parametrize("prompt", ["dynamic", "static", "none"])
@pytest.mark.parametrize("sampling", ["category", "nearest"])
@pytest.mark.parametrize(("restoration", "refiner"), [(True, True), (True, False), (False, True), (False, False)])
def test_needs(prompt, sampling, restoration, refiner):
    synthesis = SynthesisConfig(cutpaste_share=0.25)
    method = make(
        prompt=prompt, prompt_sampling=sampling, restoration=restoration, refiner=refiner, synthesis=synthesis
    )
    assert method.batch_spec.prompts == (None if prompt == "none" else sampling)
    assert method.batch_spec.synthetic == (synthesis if restoration or refiner else None)
    assert not method.batch_spec.augmentation.active


# ----------------------------------------------------------------------------------------------------- finishing
def random_features(method: OneNIP, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, method.neck.channels, *method.neck.grid, generator=generator)


def test_the_pool_has_one_random_image_of_each_category():
    method = make(refiner=False)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 0, 1])
    features = random_features(method, 8)
    batches = [TrainingBatch(labels[part], features={"neck": features[part]}) for part in (slice(0, 5), slice(5, 8))]
    picked = set()
    for seed in range(12):
        method = make(refiner=False, training=TrainingConfig(seed=seed))
        method.finalize(iter(batches), ["a", "b", "c"])
        assert method.prompt_category.tolist() == [0, 1, 2]
        for category in range(3):
            rows = [row for row in range(8) if torch.equal(features[row], method.prompt_pool[category])]
            assert len(rows) == 1
            assert labels[rows[0]] == category
            picked.add(rows[0])
        torch.testing.assert_close(method.prompt_means, method.prompt_pool.mean((2, 3)))
        first = method.prompt_pool
        method.finalize(iter(batches), ["a", "b", "c"])
        assert torch.equal(method.prompt_pool, first)
    assert picked == set(range(8))  # by some seed or other


def test_a_category_without_an_image_is_named():
    method = make(refiner=False)
    batch = TrainingBatch(torch.tensor([0, 2]), features={"neck": random_features(method, 2)})
    with pytest.raises(DataError, match="'bolt'"):
        method.finalize([batch], ["nut", "bolt", "screw"])


def test_without_categories_the_pool_covers_the_training_images():
    method = make(refiner=False, prompt_sampling="nearest", pool_size=3)
    kinds = random_features(method, 3) * 10
    own = torch.tensor([0, 0, 0, 0, 0, 1, 0, 2, 0, 0])  # two of the three are rare
    features = kinds[own] + 0.01 * random_features(method, 10, seed=1)
    method.finalize([TrainingBatch(torch.arange(10), features={"neck": features})], [str(n) for n in range(10)])
    assert sorted(own[method.prompt_category].tolist()) == [0, 1, 2]
    for entry, row in zip(method.prompt_pool, method.prompt_category):
        assert torch.equal(entry, features[row])
    assert torch.equal(own[method.prompt_category][method.choose_prompts(features)], own)
    few = make(refiner=False, prompt_sampling="nearest", pool_size=30)
    few.finalize([TrainingBatch(torch.arange(10), features={"neck": features})], [str(n) for n in range(10)])
    assert len(few.prompt_pool) == 10


@pytest.mark.parametrize("copies", [True, False])
def test_the_fusion_scale_is_half_of_largest_and_smallest_error(copies):
    method = shaken(make())
    batch = training_batch(method, 4)
    if not copies:
        batch = dataclasses.replace(batch, synthetic_images=None, synthetic_mask=None)
    method.finalize(batch.split(2), CATEGORIES)
    errors = []
    for images in [batch.images, batch.synthetic_images] if copies else [batch.images]:
        for neck in method.frozen_features(images)["neck"].double().numpy():
            prompt = method.prompt_pool[plain_prompt(method, neck)].double().numpy()
            error = ((plain_reconstruction(method, neck, prompt) - neck) ** 2).sum(0)
            errors.append(enlarged(np.sqrt(error), SIDE))
    expected = (np.max(errors) + np.min(errors)) / 2
    assert method.fusion_scale.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("inference", [True, False])
def test_finishing_leaves_ordinary_tensors_without_gradients(inference):
    method = shaken(make())
    with torch.inference_mode(inference):
        method.finalize([training_batch(method)], CATEGORIES)
    for name in ("prompt_pool", "prompt_means", "prompt_category", "fusion_scale"):
        buffer = getattr(method, name)
        assert not buffer.is_inference()
        assert not buffer.requires_grad
        assert name in method.state_dict()


# ----------------------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("changes", [{}, {"refiner": False}, {"prompt": "static"}, {"prompt": "none"}], ids=str)
def test_an_unfinished_method_says_what_to_do(changes):
    with pytest.raises(ModelError, match=r"jobs/train\.py onenip"):
        make(**changes).eval().predict(random_images(1))


def test_without_prompt_and_refiner_there_is_nothing_to_finish():
    method = make(prompt="none", refiner=False).eval()
    before = method.predict(random_images(1)).score
    method.finalize([training_batch(method)], CATEGORIES)
    assert torch.equal(method.predict(random_images(1)).score, before)
    assert len(method.prompt_pool) == 0


def test_prompts_are_chosen_by_the_cosine_of_means():
    method = finished(prompt_sampling="nearest", pool_size=5)
    features = random_features(method, 20) * torch.rand(20, method.neck.channels, 1, 1) * 3
    chosen = method.choose_prompts(features)
    assert chosen.tolist() == [plain_prompt(method, neck) for neck in features.double().numpy()]
    assert len(set(chosen.tolist())) > 1
    assert torch.equal(method.choose_prompts(7 * method.prompt_pool.flip(3)), torch.arange(5))


def test_prompts_can_be_given():
    method = finished()
    images = random_images(4, seed=11)
    chosen = method.choose_prompts(method.frozen_features(images)["neck"])
    prediction, given = method.predict(images), method.predict_with_prompts(images, chosen)
    assert torch.equal(prediction.anomaly_map, given.anomaly_map)
    assert torch.equal(prediction.score, given.score)
    other = method.predict_with_prompts(images, 1 - chosen)
    assert (other.anomaly_map - prediction.anomaly_map).abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("entries", [[0], [0, 2], [-1, 0], [[0, 1]]], ids=str)
def test_prompts_that_do_not_exist_are_refused(entries):
    with pytest.raises(OptionError, match="0…1"):
        finished().predict_with_prompts(random_images(2), torch.tensor(entries))
    with pytest.raises(OptionError, match="prompt=none"):
        finished(prompt="none").predict_with_prompts(random_images(2), torch.tensor(entries))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_is_the_share_of_the_refiner(alpha):
    method = finished(alpha=alpha, prompt="none")
    bare = make(prompt="none", refiner=False).eval()
    bare.load_state_dict({key: value for key, value in method.state_dict().items() if "refiner" not in key})
    images = random_images(2)
    anomaly_map = method.predict(images).anomaly_map
    assert torch.equal(anomaly_map, bare.predict(images).anomaly_map) == (alpha == 0)
    if alpha == 1:
        assert 0 < anomaly_map.min() < anomaly_map.max() < method.fusion_scale


# ------------------------------------------------------------------------------------------------------- options
def test_presets_differ_where_they_should():
    paper, reference = (flatten(dataclasses.asdict(OneNIPConfig(preset=preset))) for preset in ("paper", "reference"))
    assert {key: (paper[key], reference[key]) for key in paper if paper[key] != reference[key]} == {
        "backbone.padding_side": (None, 380),
        "preset": ("paper", "reference"),
        "feature_loss": ("sum", "mean"),
        "dice_factor": (2.0, 1.0),
        "dice_smoothing": (0.0, 1.0),
        "score_pool": (1, 16),
    }
    assert OneNIPConfig(preset="reference", dice_factor=2.0).dice_factor == 2.0


@pytest.mark.parametrize(
    ("name", "side"),
    [("mvtec", 224), ("visa", 224), ("btad", 224), ("merged30", 224), ("256", 256), ("320", 320)],
)
def test_recipes(name, side):
    config = from_plain(OneNIPConfig, yaml.safe_load((RECIPES / f"onenip_{name}.yaml").read_text())["method"])
    assert config == OneNIPConfig(input=InputPolicy(resize="stretch", size=side, crop=None))
