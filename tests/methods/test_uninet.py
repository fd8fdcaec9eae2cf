"""UniNet against a plain second implementation, its published size, its losses by hand, and what learns."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional

from tests.methods.conftest import INPUT, SIDE, TINY, random_images
from unianom.configs.backbone import BackboneConfig
from unianom.configs.training import Augmentation
from unianom.configs.uninet import PRESETS, UniNetConfig, UniNetTraining
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.folding import fold_batch_norm
from unianom.methods.layers.distillation import residual_plan
from unianom.methods.trained import TrainingBatch
from unianom.methods.uninet import (
    FeatureSelection,
    MemBottleneck,
    MultiScaleEmbedding,
    UniNet,
    decision_weights,
    largest_mean,
    log_similarity,
    similarity_losses,
    structure_loss,
)
from unianom.options import from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
TINY_OPTIONS = {"backbone": BackboneConfig("resnet10t", weights="random"), "input": INPUT}


def make(**changes) -> UniNet:
    torch.manual_seed(0)
    return UniNet(UniNetConfig(**{**TINY_OPTIONS, "preset": "reference", **changes}))


def batch(count: int = 3, labels: list[int] | None = None, masks: bool = False) -> TrainingBatch:
    images = random_images(count, seed=5)
    made = TrainingBatch(torch.zeros(count, dtype=torch.int64), images=images)
    if labels is not None:
        made.label = torch.tensor(labels)
    if masks:
        made.mask = torch.zeros(count, 1, SIDE, SIDE)
        made.mask[1:, :, 8:40, 16:48] = 1
    return made


# --------------------------------------------------------------------------------------------- the published model
@pytest.fixture(scope="module")
def plan():
    return residual_plan(BackboneConfig("wide_resnet50_2.tv_in1k"))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("kernel", "parameters"), [(3, 70_428_672 - 3 * 2048), (7, 175_277_056)])
def test_published_size_of_the_bottleneck(plan, kernel, parameters):
    """Of 70,428,672 parameters, 3 × 2,048 are of norms that the released code never uses. With kernels of 7, of three
    times two convolutions: 40 × C × 512 more weights each, less 512 of each bias."""
    with torch.device("meta"):
        made = MemBottleneck(plan, kernel)
        assert count(made) == parameters
        levels = [torch.empty(2, *shape) for shape in ((256, 64, 64), (512, 32, 32), (1024, 16, 16))]
        assert made(levels).shape == (2, 2048, 8, 8)
    if kernel == 7:
        more = sum(40 * 512 * (inputs // 2) + 40 * 512 * 512 for inputs in (3072, 2048, 2048)) - 6 * 512
        assert parameters == 70_428_672 - 3 * 2048 + more


def test_presets_differ_where_the_register_says():
    paper = UniNetConfig(**TINY_OPTIONS, preset="paper")
    reference = UniNetConfig(**TINY_OPTIONS, preset="reference")
    assert UniNetConfig(**TINY_OPTIONS) == reference, "the default, by measurement"
    changed = {
        field.name: (getattr(paper, field.name), getattr(reference, field.name))
        for field in dataclasses.fields(paper)
        if getattr(paper, field.name) != getattr(reference, field.name)
    }
    assert changed.pop("preset") == ("paper", "reference")
    assert changed == {
        "mem_kernel": (7, 3),
        "dfs_theta": ("learned", "one"),
        "stop_gradient": (True, False),
        "score_blur": (0.0, 4.0),
        "structure_bce": ("weighted", "mean"),
    }
    assert PRESETS["paper"].keys() == PRESETS["reference"].keys() == changed.keys()


def test_published_training():
    training = UniNetConfig(**TINY_OPTIONS).training
    assert (training.batch_size, training.learning_rate, training.weight_decay, training.seed) == (8, 5e-3, 1e-5, 1203)
    student, teacher = make().optimizers(10)
    assert student.optimiser.param_groups[0]["lr"] == 5e-3
    assert teacher.optimiser.param_groups[0]["lr"] == 1e-6
    assert len(teacher.optimiser.param_groups) == 1


# ------------------------------------------------------------------------------------------------------------- parts
def test_an_embedding_module_is_two_branches():
    torch.manual_seed(0)
    module = MultiScaleEmbedding(8, 4, 12, kernel=7, half=True).eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)

    def conv(weights, x, stride, size):
        return functional.conv2d(x, weights.weight, weights.bias, stride=stride, padding=size // 2)

    def norm(n, x):
        shape = (1, -1, 1, 1)
        scaled = (x - n.running_mean.view(shape)) / (n.running_var.view(shape) + n.eps).sqrt()
        return scaled * n.weight.view(shape) + n.bias.view(shape)

    x = torch.randn(2, 8, 6, 6)
    halves = []
    for part, half, size in ((module.small, x[:, :4], 3), (module.large, x[:, 4:], 7)):
        first, first_norm, _, second, second_norm = part
        assert first.bias is None
        inside = norm(first_norm, conv(first, half, 2, size)).clamp_min(0)
        halves.append(norm(second_norm, conv(second, inside, 1, size)))
    joined = norm(module.join[1], conv(module.join[0], torch.cat(halves, 1), 1, 1))
    shortcut = norm(module.shortcut[1], conv(module.shortcut[0], x, 2, 1))
    with torch.inference_mode():
        torch.testing.assert_close(module(x), (joined + shortcut).clamp_min(0))


@pytest.mark.parametrize("by_position", [True, False])
def test_selection_by_loops(by_position):
    """Eqs. 4 to 6."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(2))
    module = FeatureSelection((3, 5), learned=True, by_position=by_position)
    with torch.no_grad():
        module.raw[0].copy_(torch.tensor([-1.0, 0.0, 2.0]))
    found = module(student, teacher, 0)
    for b in range(2):
        for c in range(3):
            values = [teacher[b, c, i, j].item() for i in range(2) for j in range(2)]
            raw = (-1.0, 0.0, 2.0)[c]
            theta = min(1.0, 1 / (1 + math.exp(-raw)) + 0.5)
            for place, value in enumerate(values):
                weight = math.exp(value) / sum(math.exp(v) for v in values) if by_position else 1.0
                expected = student[b, c, place // 2, place % 2].item() * weight * (theta + sum(values) / 4)
                assert found[b, c, place // 2, place % 2].item() == pytest.approx(expected, rel=1e-5)


def test_theta_starts_at_one():
    fixed, learned = (FeatureSelection((3,), learned, True) for learned in (False, True))
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 4, 4, generator=generator) for _ in range(2)]
    assert torch.equal(fixed(*maps, 0), learned(*maps, 0))
    assert count(fixed) == 0
    assert count(learned) == 3


# ------------------------------------------------------------------------------------------------------------- losses
def test_similarity_losses_by_loops():
    """Eqs. 10 and 11 as means, of one normal and one anomalous image."""
    diagonal = torch.tensor([[0.2, 0.9], [0.7, 0.1]])
    normal = torch.tensor([[True, True], [False, False]])
    similarity, margin = similarity_losses(diagonal.log(), normal, margin=0.8)
    assert similarity.item() == pytest.approx(-(math.log(0.2) + math.log(0.9)) / 2, rel=1e-5)
    assert margin.item() == pytest.approx((0.6 + 0.0) / 2 + (0.3 + 0.0) / 2, rel=1e-5)


@pytest.mark.parametrize("normal", [True, False])
def test_batches_of_one_kind(normal):
    """Nothing is left over from another pair of maps or another batch."""
    logs = torch.tensor([[0.2, 0.9]]).log()
    similarity, margin = similarity_losses(logs, torch.full((1, 2), normal), margin=0.8)
    if normal:
        assert similarity.item() > 0
        assert margin.item() == pytest.approx(0.3, rel=1e-5)
    else:
        assert similarity.item() == 0
        assert margin.item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("temperature", "same", "expected"),
    [(2.0, True, 8.78), (2.0, False, 11.33), (0.1, True, 0.32), (0.1, False, 11.42)],
)
def test_losses_of_random_maps_of_the_published_size(temperature, same, expected):
    """Values that the released loss gives, without selection, for one teacher."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for channels, side in ((256, 64), (512, 32), (1024, 16)):
        teacher = torch.randn(1, channels, side, side, generator=generator)
        student = teacher if same else torch.randn(1, channels, side, side, generator=generator)
        logs = log_similarity(student, teacher, temperature)
        similarity, margin = similarity_losses(logs, torch.ones_like(logs, dtype=torch.bool), 1.0)
        distance = (1 - functional.cosine_similarity(teacher, student, dim=1)).mean()
        total += float(0.7 * distance + 0.3 * similarity + margin)
    assert total == pytest.approx(expected, abs=0.05)


def plain_loss(method: UniNet, made: TrainingBatch, normal: list[Tensor]) -> dict[str, float]:
    """The three losses position by position, in float64; `normal` B×h×w bool for each level."""
    config = method.config
    teachers = [method.teachers.source(made.images), method.teachers.target(made.images)]
    students, _ = method._students(*teachers)
    size = len(made)
    values = dict.fromkeys(("distillation", "similarity", "margin"), 0.0)
    for which, teacher in enumerate(teachers):  # compared with what was grown from the other
        half = slice(0, size) if which == 0 else slice(size, 2 * size)
        for level in range(3):
            aim, grown = teacher[level].double(), students[level][half].double()
            if method.selection is not None:
                grown = method.selection(grown, aim, level)
            distances, logs, low, high = [], [], [], []
            for b in range(size):
                s = functional.normalize(grown[b].flatten(1).T, dim=1)
                t = functional.normalize(aim[b].flatten(1).T, dim=1)
                m = (s @ t.T / config.temperature).exp()
                for i, is_normal in enumerate(normal[level][b].flatten()):
                    similar = m[i, i] / (m[i].sum() + 1e-8)
                    if is_normal or not config.kd_normal_only:
                        distances.append(1 - s[i] @ t[i])
                    if is_normal:
                        logs.append(-(similar + 1e-8).log())
                        low.append((config.margin - similar).clamp_min(0))
                    else:
                        high.append((similar - config.margin / 2).clamp_min(0))
            values["distillation"] += float(torch.stack(distances).mean())
            values["similarity"] += float(torch.stack(logs).mean()) if logs else 0.0
            values["margin"] += sum(float(torch.stack(part).mean()) for part in (low, high) if part)
    return values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.1, "margin": 0.02, "dfs_theta": "learned"},
        {"selection": "all"},
        {"selection": "none", "bottleneck": "ocbe"},
        {"task": "classification", "temperature": 0.1, "margin": 0.02},
        {"task": "classification", "kd_normal_only": True},
        {"task": "segmentation", "contrast": "mask", "temperature": 0.1, "margin": 0.02},
        {"task": "segmentation"},
        {"similarity_rows": 7},
    ],
    ids=str,
)
def test_losses_by_loops(changes):
    method = make(**changes).train()
    supervised = "task" in changes
    made = batch(labels=[0, 1, 1] if supervised else None, masks=changes.get("task") == "segmentation")
    sides = [SIDE // reduction for reduction in (4, 8, 16)]
    normal = [torch.ones(3, side, side, dtype=torch.bool) for side in sides]
    for level, side in enumerate(sides):
        if method.config.contrast == "label":
            normal[level][1:] = False
        if method.config.contrast == "mask":
            normal[level] = made.mask[:, 0, :: SIDE // side, :: SIDE // side] == 0
    with torch.no_grad():
        expected = plain_loss(method, made, normal)
        found = method.training_loss(made)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=2e-3), name
    total = 0.7 * expected["distillation"] + 0.3 * expected["similarity"] + expected["margin"]
    total += found["supervised"].item() if "supervised" in found else 0.0
    assert found["loss"].item() == pytest.approx(total, rel=2e-3)


def test_losses_can_be_left_out():
    method = make(similarity_loss=False, margin_loss=False).train()
    losses = method.training_loss(batch())
    assert losses.keys() == {"loss", "distillation"}
    assert losses["loss"].item() == pytest.approx(0.7 * losses["distillation"].item(), rel=1e-6)


def test_structure_loss_by_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 6, 5, generator=generator)
    mask = torch.zeros(2, 1, 6, 5)
    mask[0, 0, 1:4, 2:5] = 1
    for weighted in (True, False):
        total = []
        entropies = []
        for b in range(2):
            weights, overlap, union = [], 0.0, 0.0
            losses = []
            for i in range(6):
                for j in range(5):
                    m = mask[b, 0, i, j].item()
                    around = mask[b, 0].sum().item() / 31**2  # the window covers the whole image, zeros outside
                    weight = 1 + 5 * abs(around - m)
                    p = 1 / (1 + math.exp(-logits[b, 0, i, j].item()))
                    losses.append(-(m * math.log(p) + (1 - m) * math.log(1 - p)))
                    weights.append(weight)
                    overlap += weight * p * m
                    union += weight * (p + m)
            entropies.append(losses)
            weighted_mean = sum(w * e for w, e in zip(weights, losses)) / sum(weights)
            total.append((weighted_mean, 1 - (overlap + 1) / (union - overlap + 1)))
        plain = np.mean(entropies)
        expected = np.mean([(entropy if weighted else plain) + overlap for entropy, overlap in total])
        assert structure_loss(logits, mask, weighted).item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------- gradients
def gradients(method: UniNet, made: TrainingBatch) -> tuple[float, float]:
    """Sizes of the gradients of source and target teacher."""
    method.zero_grad()
    method.training_loss(made)["loss"].backward()
    sizes = []
    for teacher in (method.teachers.source, method.teachers.target):
        sizes.append(sum(p.grad.abs().sum().item() for p in teacher.parameters() if p.grad is not None))
    return sizes[0], sizes[1]


@pytest.mark.parametrize("selection", ["representative", "none"])
@pytest.mark.parametrize("stop", [True, False])
def test_only_the_target_teacher_learns(stop, selection):
    source, target = gradients(make(stop_gradient=stop, selection=selection).train(), batch())
    assert source == 0
    assert target > 0


@pytest.mark.parametrize(
    ("selection", "stop", "paths"),
    [("none", True, 0), ("none", False, 1), ("representative", True, 1), ("representative", False, 1)],
)
def test_paths_beside_the_bottleneck(selection, stop, paths, monkeypatch):
    """With the bottleneck's input cut off, the target teacher learns as a target, unless gradients stop there, and as
    the prior of the selection, always."""
    method = make(stop_gradient=stop, selection=selection).train()
    real = method._students
    monkeypatch.setattr(method, "_students", lambda source, target: real(source, [level.detach() for level in target]))
    _, target = gradients(method, batch())
    assert (target > 0) == bool(paths)


def test_pairs_are_crossed():
    """What is grown from the target teacher is compared with the source teacher, and the other way round."""
    method = make(selection="none", similarity_loss=False, margin_loss=False).eval()
    with torch.no_grad():
        for parameter in method.teachers.target.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made = batch()
    source, target = method.teachers.source(made.images), method.teachers.target(made.images)
    grown, _ = method._students(source, target)
    distances = 0.0
    for level in range(3):
        from_target, from_source = grown[level][:3], grown[level][3:]
        for teacher, student in ((source[level], from_target), (target[level], from_source)):
            distances += (1 - functional.cosine_similarity(teacher, student, dim=1)).mean().item()
    assert method.training_loss(made)["distillation"].item() == pytest.approx(distances, rel=1e-5)
    straight = sum(
        (1 - functional.cosine_similarity(t[level], grown[level][half], dim=1)).mean().item()
        for level in range(3)
        for t, half in ((target, slice(0, 3)), (source, slice(3, 6)))
    )
    assert abs(straight - distances) > 1e-3


def test_batch_norm_of_the_target_teacher():
    for norm in ("train", "eval"):
        method = make(encoder_norm=norm).train()
        before = copy.deepcopy(method.teachers.target.state_dict())
        method.training_loss(batch())
        after = method.teachers.target.state_dict()
        changed = any(not torch.equal(before[key], after[key]) for key in before if "running" in key)
        assert changed == (norm == "train")
        assert any(parameter.requires_grad for parameter in method.teachers.target.parameters())


def test_a_small_batch_is_learned():
    """The loss comes near that of a student whose maps are the teachers' own, or below: neighbouring positions of a
    smooth image are alike, and a student may tell them apart better than its teachers do."""
    training = UniNetTraining(learning_rate=5e-3, encoder_learning_rate=1e-8)
    method = make(temperature=0.1, training=training, encoder_norm="eval").train()
    made, losses = batch(2), []
    floor = 0.0
    for teacher in (method.teachers.source, method.teachers.target):
        for level in teacher(made.images):
            logs = log_similarity(level, level, 0.1)
            similarity, margin = similarity_losses(logs, torch.ones_like(logs, dtype=torch.bool), 1.0)
            floor += 0.3 * similarity.item() + margin.item()
    steps = method.optimizers(40)
    for number in range(40):
        loss = method.training_loss(made)["loss"]
        for step in steps:
            step.optimiser.zero_grad()
        loss.backward()
        for step in steps:
            step.step(number)
        losses.append(loss.item() - floor)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_supervision_is_learned(task):
    training = UniNetTraining(learning_rate=5e-3, encoder_learning_rate=1e-6)
    method = make(task=task, training=training, similarity_loss=False, margin_loss=False).train()
    made = batch(labels=[0, 1, 1], masks=task == "segmentation")
    steps = method.optimizers(15)
    first = last = 0.0
    for number in range(15):
        losses = method.training_loss(made)
        first, last = first or losses["supervised"].item(), losses["supervised"].item()
        for step in steps:
            step.optimiser.zero_grad()
        losses["loss"].backward()
        for step in steps:
            step.step(number)
    assert last < 0.6 * first


def test_a_video_model_paints_frames():
    policy = dataclasses.replace(INPUT, mean=(0.5,) * 3, std=(0.5,) * 3)
    method = make(task="video", input=policy).train()
    made = batch()
    losses = method.training_loss(made)
    source, target = method.teachers.source(made.images), method.teachers.target(made.images)
    method.eval()
    with torch.inference_mode():
        source, target = method.teachers.source(made.images), method.teachers.target(made.images)
        finest = method._students(source, target)[0][0]
        frames = [method.head(half) for half in (finest[:3], finest[3:])]
        assert frames[0].shape == made.images.shape
        errors = sum(((frame - made.images) ** 2).mean((1, 2, 3)) for frame in frames)
        plain = copy.deepcopy(method)
        plain.config = dataclasses.replace(method.config, task="anomaly")
        torch.testing.assert_close(method.predict(made.images).score, plain.predict(made.images).score + errors)
    assert losses["supervised"].item() > 0


# ------------------------------------------------------------------------------------------------------ several sizes
def test_sizes_take_turns():
    method = make(
        task="segmentation", training_sizes=(32, 64, 96), augmentation=Augmentation(horizontal=("*",))
    ).train()
    assert method.batch_spec.repeats == 3
    assert method.batch_spec.labels
    assert method.batch_spec.masks
    sides = []
    method.teachers.target.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    for step in range(4):
        method.on_step_start(step, 4)
        losses = method.training_loss(batch(labels=[0, 1, 1], masks=True))
        assert torch.isfinite(losses["loss"])
    assert sides == [32, 64, 96, 32]


def test_kept_features_serve_the_input_size_alone():
    method = make(training_sizes=(32, 64)).eval()
    made = batch()
    features = method.frozen_features(made.images)
    kept = TrainingBatch(
        made.category, images=made.images, features={k: torch.zeros_like(v) for k, v in features.items()}
    )
    for step, same in ((0, True), (1, False)):
        method.on_step_start(step, 2)
        with torch.no_grad():
            values = [method.training_loss(each)["distillation"].item() for each in (made, kept)]
        assert (values[0] == values[1]) == same


# --------------------------------------------------------------------------------------------------------- prediction
def plain_prediction(method: UniNet, images: Tensor) -> tuple[np.ndarray, list[float]]:
    """Maps and scores image by image (sec. 4.5, Algorithm 1, as released)."""
    maps, scores = [], []
    for image in images:
        with torch.inference_mode():
            source, target = method.teachers.source(image[None]), method.teachers.target(image[None])
            students, _ = method._students(source, target)
        distances = []
        for teacher, half in ((source, 0), (target, 1)):
            for level in range(3):
                t, s = teacher[level][0].double().numpy(), students[level][half].double().numpy()
                cosine = (t * s).sum(0) / np.sqrt((t * t).sum(0) * (s * s).sum(0))
                distances.append(1 - cosine)
        fused = np.zeros((SIDE, SIDE))
        for distance in distances:
            side = len(distance)
            places = np.arange(SIDE) * (side - 1) / (SIDE - 1)
            matrix = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))
            fused += matrix @ distance @ matrix.T
        maps.append(fused)
        maxima = np.array([distance.max() for distance in distances])
        probability = np.exp(maxima) / np.exp(maxima).sum()
        share = max(0.01 * maxima[probability > probability.mean()].mean(), method.config.beta)
        blurred = gaussian_filter(fused, method.config.score_blur) if method.config.score_blur else fused
        largest = np.sort(blurred.ravel())[::-1][: max(1, int(SIDE * SIDE * share))]
        scores.append(largest.mean())
    return np.stack(maps), scores


@pytest.mark.parametrize("changes", [{}, {"score_blur": 0.0}, {"preset": "paper"}, {"task": "classification"}], ids=str)
def test_prediction_is_that_of_the_second_implementation(changes):
    method = make(**changes).eval()
    images = random_images(3, seed=9)
    found = method.predict(images)
    maps, scores = plain_prediction(method, images)
    np.testing.assert_allclose(found.anomaly_map.numpy(), maps, atol=2e-5 * maps.max())
    np.testing.assert_allclose(found.score.numpy(), scores, rtol=2e-5)


def test_decision_weights_by_hand():
    """Six maxima of which four are above the mean of their softmax and average 0.4: 262 of 256² pixels."""
    maxima = torch.tensor([[0.45, 0.35, 0.42, 0.38, 0.05, 0.05]])
    share = decision_weights(maxima, 0.01, 3e-5, literal=False)
    assert share.item() == pytest.approx(0.004)
    pixels = torch.arange(256 * 256, dtype=torch.float32).view(1, 256, 256)
    assert largest_mean(pixels, share).item() == pytest.approx(np.arange(65536)[-262:].mean())
    probability = maxima[0].softmax(0)
    expected = 0.01 * probability[:4].mean().item()
    assert decision_weights(maxima, 0.01, 0.0, literal=True).item() == pytest.approx(expected)
    assert decision_weights(maxima, 0.01, 0.03, literal=True).item() == pytest.approx(0.03)


def test_equal_maxima_take_the_lower_limit():
    assert decision_weights(torch.full((2, 6), 0.4), 0.01, 3e-5, literal=False).tolist() == pytest.approx([3e-5] * 2)
    maps = torch.arange(16.0).view(1, 4, 4)
    assert largest_mean(maps, torch.tensor([3e-5])).item() == 15


def test_fixed_shares():
    images = random_images(2)
    method = make(decision="max").eval()
    found = method.predict(images)
    blurred = [gaussian_filter(m, 4) for m in found.anomaly_map.double().numpy()]
    np.testing.assert_allclose(found.score.numpy(), [m.max() for m in blurred], rtol=1e-5)
    method = make(decision="share", decision_share=0.1).eval()
    expected = [np.sort(m.ravel())[::-1][: int(0.1 * SIDE * SIDE)].mean() for m in blurred]
    np.testing.assert_allclose(method.predict(images).score.numpy(), expected, rtol=1e-5)
    assert make(decision="literal").config.beta == 0.03


def test_a_segmentation_map_is_the_probability():
    method = make(task="segmentation").eval()
    images = random_images(2)
    found = method.predict(images)
    with torch.inference_mode():
        finest = method._students(method.teachers.source(images), method.teachers.target(images))[0][0]
        weight = method.head.weight[0, :, 0, 0]
        logits = torch.einsum("bchw,c->bhw", finest[:2] + finest[2:], weight)
        large = functional.interpolate(logits[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.anomaly_map, large.sigmoid(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.score, large.amax((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["anomaly", "segmentation"])
def test_folded_it_predicts_the_same(task):
    method = make(task=task).train()
    made = batch(labels=[0, 1, 1], masks=True)
    for _ in range(3):
        method.training_loss(made)  # batch norm sees something
    method.eval()
    folded = copy.deepcopy(method)
    assert fold_batch_norm(folded) > 30
    for one, other in zip(folded.predict(made.images), method.predict(made.images)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


# ------------------------------------------------------------------------------------------------------------ options
def test_another_kind_of_encoder_is_refused():
    with pytest.raises(OptionError, match="needs a pyramid"):
        make(backbone=BackboneConfig("vit_tiny_patch16_224", weights="random"))


def test_labels_need_a_task():
    for changes in ({"contrast": "label"}, {"kd_normal_only": True}):
        with pytest.raises(OptionError, match="learns from normal images"):
            make(**changes)
    assert make(task="classification").config.contrast == "label"
    assert make(task="segmentation").config.contrast == "none"


RECIPE_FILES = sorted(RECIPES.glob("uninet_*.yaml"))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_recipes(path):
    """Against the published table of settings."""
    recipe = yaml.safe_load(path.read_text())
    recipe["method"]["backbone"]["weights"] = "random"
    config = from_plain(UniNetConfig, recipe["method"])
    training, name = config.training, path.stem.removeprefix("uninet_")
    assert (training.batch_size, training.learning_rate, training.encoder_learning_rate) == (8, 5e-3, 1e-6)
    assert (training.weight_decay, training.betas, training.seed) == (1e-5, (0.9, 0.999), 1203)
    length = {
        "mvtec": 100, "visa": 100, "btad": 100, "mvtec3d": 100, "polyps": 100, "ped2": 100,
        "multiclass_mvtec": 5000, "multiclass_visa": 5000,
        "aptos": 1000, "oct2017": 1000, "vad": 1000, "isic2018": 2000,
    }[name]  # fmt: skip
    assert length == (training.epochs if length == 100 else training.iterations)
    assert config.temperature == (0.1 if name in ("multiclass_mvtec", "vad") else 2.0)
    multiclass = name.startswith("multiclass")
    assert training.amsgrad == multiclass
    assert training.eps == (1e-10 if multiclass else 1e-8)
    assert (training.decay_at, training.decay) == (((0.8,), 0.2) if multiclass else ((), 0.1))
    assert config.task == {"vad": "classification", "polyps": "segmentation", "ped2": "video"}.get(name, "anomaly")
    assert config.input.side == (224 if name == "isic2018" else 256)
    if name == "polyps":
        assert config.training_sizes == (192, 256, 320)
        assert config.augmentation.rotation == 90
    overrides = recipe.get("category_options", {})
    cold = {c for c, options in overrides.items() if options.get("temperature") == 0.1}
    assert cold == ({"transistor", "pill", "cable", "bottle", "grid"} if name == "mvtec" else
                    {"foam"} if name == "mvtec3d" else set())  # fmt: skip
    if name == "mvtec":
        assert overrides["transistor"]["selection"] == "none"
        assert overrides["transistor"]["training"] == {"encoder_learning_rate": 1e-4}


def test_there_are_all_recipes():
    assert len(RECIPE_FILES) == 12


def test_tiny_form_is_a_learned_one():
    """So that the conformance suite sees every parameter that UniNet can have."""
    assert TINY["uninet"].config.dfs_theta == "learned"
    assert isinstance(TINY["uninet"].config.input, InputPolicy)
