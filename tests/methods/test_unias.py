"""UniAS: published sizes, its equations by hand, losses, presets, options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import gaussian_filter as scipy_filter
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from tests.methods.conftest import TINY, random_images
from unianom.configs.backbone import BackboneConfig
from unianom.configs.training import Augmentation, TrainingConfig
from unianom.configs.unias import UniASConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.methods.trained import TrainingBatch
from unianom.methods.unias import MultiGranularityCnn, UniAS, reconstruction_terms, sine_position
from unianom.options import flatten, from_plain

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"

RELEASED = {
    "cos_sign": "legacy",
    "neighbours": 3,
    "sar": "lincomb",
    "head": "convolutions",
    "fuse_at": "finest",
    "level_blur": True,
    "channel_attention": True,
}
"""The released form at a size that has room for its mask."""


def tiny(seed: int = 0, **changes) -> UniAS:
    torch.manual_seed(seed)
    return UniAS(dataclasses.replace(TINY["unias"].config, **changes)).eval()


def batch_of(method: UniAS, count: int = 3, seed: int = 2) -> TrainingBatch:
    return TrainingBatch(torch.zeros(count, dtype=torch.int64), images=random_images(count, seed))


def count(*parts) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


# ---------------------------------------------------------------------------------------------------- published sizes
@pytest.fixture(scope="module")
def published() -> UniAS:
    backbone = BackboneConfig("tf_efficientnet_b4.aa_in1k", weights="random")
    return UniAS(UniASConfig(preset="reference", backbone=backbone, channel_attention=True)).eval()


def test_published_parameter_counts(published):
    query = published.query
    assert count(published.pixel_decoder) == 6_447_104
    assert count(*(published.patches[level][0] for level in (0, 1, 2))) == 10_224_768
    assert count(query.weights, query.mix) == 5_523_811
    assert query.queries.numel() == 392 * 256
    assert count(*(block.cnn for block in published.blocks)) == 14_425_088
    assert count(published.heads) == 5_347_600
    assert count(*(block.spatial for block in published.blocks)) == 6_315_008
    assert count(*(block.channel for block in published.blocks)) == 10_775_536 - 6_315_008
    trained = sum(p.numel() for p in published.parameters() if p.requires_grad)
    assert trained == 53_847_523
    assert trained - count(*(block.channel for block in published.blocks)) == 49_386_995


def test_published_shapes(published):
    images = random_images(1, side=224)
    features = published.frozen_features(images)
    shapes = [(1, 24, 112, 112), (1, 32, 56, 56), (1, 56, 28, 28), (1, 160, 14, 14)]
    assert [features[f"level_{level}"].shape for level in range(4)] == shapes
    _, inputs = published._filtered(features)
    assert [level.shape[1] for level in inputs] == [48, 64, 112, 320]
    with torch.inference_mode():
        assert [made.shape for made in published.reconstruct(inputs)] == shapes
    visible = torch.isfinite(published.mask).sum(1).unflatten(0, (14, 14))
    assert visible[7, 7] == 147
    assert visible[0, 0] == 180


def test_published_training():
    training = UniASConfig().training
    assert training == TrainingConfig(
        epochs=1000,
        iterations=None,
        batch_size=64,
        optimiser="adamw",
        learning_rate=1e-4,
        weight_decay=1e-4,
        betas=(0.9, 0.999),
        decay_at=(0.4, 0.8),
        decay=0.1,
        clip_norm=0.1,
        seed=133,
    )
    (optimisation,) = tiny().optimizers(100)
    rates = []
    for _ in range(100):
        rates.append(optimisation.optimiser.param_groups[0]["lr"])
        optimisation.optimiser.step()
        optimisation.schedule.step()
    np.testing.assert_allclose(rates, [1e-4] * 40 + [1e-5] * 40 + [1e-6] * 20)


# -------------------------------------------------------------------------------------------- the equations, by hand
class ByHand:
    """UniAS's decoder in float64 from a method's weights, with attention, norms and resizing written out.

    Maps are B×C×h×w, tokens B×N×C.
    """

    def __init__(self, method: UniAS) -> None:
        self.config = method.config
        self.weights = {key: value.double() for key, value in method.state_dict().items()}
        self.grid = method.sizes[-1]

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return conv2d(x, weight, self.weights.get(f"{name}.bias"), stride, padding)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return torch.einsum("oi,...i->...o", self.weights[f"{name}.weight"], x) + self.weights[f"{name}.bias"]

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def group_norm(self, x: Tensor, name: str) -> Tensor:
        result = torch.empty_like(x)
        size = x.shape[1] // 32
        for group in range(32):
            part = x[:, group * size : (group + 1) * size]
            mean = part.mean((1, 2, 3), keepdim=True)
            variance = (part - mean).square().mean((1, 2, 3), keepdim=True)
            result[:, group * size : (group + 1) * size] = (part - mean) / (variance + 1e-5).sqrt()
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return result * weight[:, None, None] + bias[:, None, None]

    def attention(self, x: Tensor, keys: Tensor, name: str, place, key_place, masked: bool) -> Tensor:
        """x + attention, normalised."""
        dim, heads = x.shape[2], self.config.heads
        size = dim // heads
        weight, bias = (self.weights[f"{name}.attention.in_proj_{kind}"] for kind in ("weight", "bias"))
        q = (x + place) @ weight[:dim].T + bias[:dim]
        k = (keys + key_place) @ weight[dim : 2 * dim].T + bias[dim : 2 * dim]
        v = keys @ weight[2 * dim :].T + bias[2 * dim :]
        heads_out = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = q[..., part] @ k[..., part].mT / math.sqrt(size)
            if masked:
                reach = self.config.neighbours // 2
                for one in range(logits.shape[1]):
                    for other in range(logits.shape[2]):
                        rows = abs(one // self.grid - other // self.grid)
                        columns = abs(one % self.grid - other % self.grid)
                        if rows <= reach and columns <= reach:
                            logits[:, one, other] = -math.inf
            shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
            heads_out.append(shares @ v[..., part])
        return self.layer_norm(x + self.linear(torch.cat(heads_out, -1), f"{name}.attention.out_proj"), f"{name}.norm")

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        inner = self.linear(x, f"{name}.layers.0").clamp(min=0)
        return self.layer_norm(x + self.linear(inner, f"{name}.layers.3"), f"{name}.norm")

    def sine(self) -> Tensor:
        """N×C: row's half, then column's; sine and cosine in turn."""
        dim = self.config.dim
        code = torch.zeros(self.grid**2, dim, dtype=torch.float64)
        for token in range(self.grid**2):
            for half, place in enumerate(divmod(token, self.grid)):
                angle = (place + 1) / (self.grid + 1e-6) * 2 * math.pi
                for i in range(dim // 4):
                    phase = angle / 10000 ** (2 * i / (dim // 2))
                    code[token, half * dim // 2 + 2 * i] = math.sin(phase)
                    code[token, half * dim // 2 + 2 * i + 1] = math.cos(phase)
        return code

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT

    def untokens(self, x: Tensor) -> Tensor:
        return x.mT.unflatten(2, (self.grid, self.grid))

    def pixel_decoder(self, levels: list[Tensor]) -> list[Tensor]:
        name, place = "pixel_decoder", self.sine()
        x = self.tokens(self.conv(levels[-1], f"{name}.project"))
        for layer in range(self.config.encoder_layers):
            x = self.attention(x, x, f"{name}.encoder.{layer}.attention", place, place, masked=False)
            x = self.feed_forward(x, f"{name}.encoder.{layer}.feed_forward")
        decoded = {len(levels) - 1: self.conv(self.untokens(x), f"{name}.coarsest").clamp(min=0)}
        for level in range(len(levels) - 2, -1, -1):
            lateral = self.group_norm(
                self.conv(levels[level], f"{name}.laterals.{level}.0"), f"{name}.laterals.{level}.1"
            )
            joined = lateral + resize(decoded[level + 1], lateral.shape[-1], aligned=False)
            smoothed = self.conv(joined, f"{name}.outputs.{level}.0")
            decoded[level] = self.group_norm(smoothed, f"{name}.outputs.{level}.1").clamp(min=0)
        return [decoded[level] for level in range(len(levels))]

    def channel_weights(self, x: Tensor) -> Tensor:
        total = 0
        for pooled in (x.mean((2, 3)), x.flatten(2).max(2).values):
            for layer in (0, 2, 4):
                pooled = self.linear(pooled.clamp(min=0) if layer else pooled, f"query.weights.layers.{layer}")
            total = total + pooled
        return 1 / (1 + (-total).exp())

    def spatial_weights(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean(1), x.max(1).values], dim=1)
        return 1 / (1 + (-self.conv(pooled, "query.weights.convolution")).exp())

    def cnn(self, x: Tensor, name: str) -> Tensor:
        total = 0
        for branch, depth in enumerate((1, 1, 2, 3)):
            y = x
            for layer in range(depth):
                y = self.conv(y, f"{name}.branches.{branch}" + (f".{layer}" if branch else ""))
            total = total + 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        return total

    def query(self, decoded: Tensor, patches: Tensor) -> Tensor:
        if self.config.sar == "cbam_product":
            channel = self.channel_weights(patches)[:, :, None, None]
            return self.weights["query.query"] * channel * self.spatial_weights(channel * patches)
        reference = self.conv(decoded, "query.reference")
        channel, spatial = self.channel_weights(reference), self.spatial_weights(reference)
        # as released: 2N query vectors; the first N and the last N have the same spatial weights
        vectors = self.weights["query.queries"].flatten(1).T  # 2N C
        weighted = channel[:, None] * vectors + spatial.flatten(1).repeat(1, 2)[:, :, None] * vectors  # B 2N C
        stacked = weighted.mT.reshape(len(decoded), -1, self.grid, self.grid)  # B 2C h w
        return self.cnn(stacked, "query.mix")

    def block(self, state: Tensor, patches: Tensor, level: int) -> Tensor:
        place, key_place = self.weights["query_position"], self.sine()
        queries, keys = self.tokens(state), self.tokens(patches)
        masked = bool(self.config.neighbours)
        name = f"blocks.{level}.spatial"
        x = self.attention(queries, keys, f"{name}.cross_attention", place, key_place, masked)
        x = self.attention(x, x, f"{name}.self_attention", place, place, masked)
        x = self.feed_forward(x, f"{name}.feed_forward")
        if self.config.channel_attention:
            name = f"blocks.{level}.channel"
            y = self.attention(queries.mT, keys.mT, f"{name}.cross_attention", 0, key_place.T, masked=False)
            y = self.attention(y, y, f"{name}.self_attention", 0, 0, masked=False)
            x = x + self.feed_forward(y, f"{name}.feed_forward").mT
        return self.cnn(self.untokens(x), f"blocks.{level}.cnn")

    def head(self, state: Tensor, level: int, size: int) -> Tensor:
        x = self.untokens(self.layer_norm(self.tokens(state), "norm"))
        if self.config.head == "deconvolution":
            weight, bias = self.weights[f"heads.{level}.weight"], self.weights[f"heads.{level}.bias"]
            return conv_transpose2d(x, weight, bias, stride=size // self.grid)
        x = resize(x, size, aligned=True)
        for layer in (1, 2, 3):
            x = self.conv(x, f"heads.{level}.{layer}")
        return x

    def reconstruct(self, inputs: list[Tensor]) -> list[Tensor]:
        decoded = self.pixel_decoder(inputs)
        patches = []
        for level, x in enumerate(decoded):
            name, ratio = f"patches.{level}", x.shape[-1] // self.grid
            x = self.conv(x, name) if ratio == 1 else self.conv(self.conv(x, f"{name}.0", stride=ratio), f"{name}.1")
            patches.append(x)
        state = self.query(decoded[-1], patches[-1])
        made = {}
        for level in range(len(inputs) - 1, -1, -1):
            code = self.weights["level_codes"][level][:, None, None]
            state = self.block(state, patches[level] + code, level)
            made[level] = self.head(state, level, inputs[level].shape[-1])
        return [made[level] for level in range(len(inputs))]

    def predict(self, features: list[Tensor]) -> Tensor:
        smooth = [torch.from_numpy(blur(level.double().numpy(), 3, 1.0)) for level in features]
        made = self.reconstruct([torch.cat([low, x.double() - low], 1) for low, x in zip(smooth, features)])
        side = self.config.input.side
        size = side if self.config.fuse_at == "input" else features[0].shape[-1]
        product = 1
        for level, (one, other) in enumerate(zip(made, smooth)):
            cosine = (one * other).sum(1) / (one.square().sum(1).sqrt() * other.square().sum(1).sqrt())
            level_map = resize(1 - cosine[:, None], size, aligned=False)
            if self.config.level_blur:
                kernel = [3, 5, 7, 9][len(made) - 1 - level]
                level_map = torch.from_numpy(blur(level_map.numpy(), kernel, kernel / 3))
            product = product * level_map
        return resize(product, side, aligned=True)[:, 0]


def blur(maps: np.ndarray, size: int, sigma: float) -> np.ndarray:
    return scipy_filter(maps, sigma, radius=size // 2, mode="mirror", axes=(2, 3))


def resize(x: Tensor, size: int, aligned: bool) -> Tensor:
    """Bilinear, both axes by the same matrix."""
    old = x.shape[-1]
    matrix = torch.zeros(size, old, dtype=torch.float64)
    for row in range(size):
        place = row * (old - 1) / max(size - 1, 1) if aligned else max((row + 0.5) * old / size - 0.5, 0)
        low = min(int(place), old - 1)
        high = min(low + 1, old - 1)
        matrix[row, low] += 1 - (place - low)
        matrix[row, high] += place - low
    return matrix @ x @ matrix.T


@pytest.mark.parametrize(
    "changes",
    [{}, RELEASED, {"neighbours": 3, "channel_attention": True, "level_blur": True}],
    ids=["paper", "released", "mixed"],
)
def test_prediction_by_hand(changes):
    method = tiny(**changes)
    with torch.no_grad():  # norms and biases that start at one and zero would hide a wrong place
        for parameter in method.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    images = random_images(2, seed=5)
    by_hand = ByHand(method)
    features = method.frozen_features(images)
    levels = [features[f"level_{level}"] for level in range(len(features))]
    _, inputs = method._filtered(features)
    with torch.inference_mode():
        for made, expected in zip(method.reconstruct(inputs), by_hand.reconstruct([x.double() for x in inputs])):
            torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-5)
    expected = by_hand.predict(levels)
    predicted = method.predict(images)
    torch.testing.assert_close(predicted.anomaly_map.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted.score.double(), expected.flatten(1).max(1).values, atol=1e-5, rtol=1e-5)


def test_levels_choose_the_maps_that_are_multiplied():
    images = random_images(2)
    one, three, both, every = (tiny(levels=levels).predict(images) for levels in [(1,), (3,), (1, 3), ()])
    torch.testing.assert_close(both.anomaly_map, one.anomaly_map * three.anomaly_map)
    two = tiny(levels=(2,)).predict(images)
    torch.testing.assert_close(every.anomaly_map, both.anomaly_map * two.anomaly_map)


def test_level_maps_are_cosine_distances_to_the_smoothed_features(monkeypatch):
    method = tiny()
    targets, _ = method._filtered(method.frozen_features(random_images(2)))
    monkeypatch.setattr(method, "_restore", lambda decoded: targets)
    assert method.predict(random_images(2)).anomaly_map.abs().max() < 1e-6
    monkeypatch.setattr(method, "_restore", lambda decoded: [-target for target in targets])
    levels = len(targets)
    torch.testing.assert_close(method.predict(random_images(2)).score, torch.full((2,), 2.0**levels))


def test_scores():
    images = random_images(2)
    largest, spread = tiny(), tiny(reduce="std").predict(images)
    maps = largest.predict(images).anomaly_map.numpy()
    np.testing.assert_allclose(largest.predict(images).score, maps.max((1, 2)))
    np.testing.assert_allclose(spread.score, maps.std((1, 2)), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ training
def test_terms_of_perfect_negated_and_halved_reconstructions():
    torch.manual_seed(0)
    target = torch.randn(4, 64, 14, 14)
    expected = {
        "legacy": [(0, 1), (4, -1), (0.25, 1)],
        "distance": [(0, 0), (4, 2), (0.25, 0)],
    }
    for sign, values in expected.items():
        for made, (error, cosine) in zip((target, -target, target / 2), values):
            terms = reconstruction_terms(made, target, sign)
            assert terms[0].item() == pytest.approx(error, abs=0.03)
            assert terms[1].item() == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("sign", ["distance", "legacy"])
def test_loss_by_loops(sign):
    method = tiny(cos_sign=sign, loss_weight=10.0)
    batch = batch_of(method)
    targets, inputs = method._filtered(method.features_of(batch))
    losses = method.training_loss(batch)
    error = cosine = 0.0
    with torch.no_grad():
        for made, target in zip(method.reconstruct(inputs), targets):
            error += np.mean((made.numpy() - target.numpy()) ** 2)
            cells = []
            for image in range(made.shape[0]):
                for row in range(made.shape[2]):
                    for column in range(made.shape[3]):
                        a, b = made[image, :, row, column].numpy(), target[image, :, row, column].numpy()
                        cells.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            cosine += np.mean(cells) if sign == "legacy" else 1 - np.mean(cells)
    assert losses["squared_error"].item() == pytest.approx(error, rel=1e-5)
    assert losses["cosine"].item() == pytest.approx(cosine, rel=1e-4, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(10 * (error + cosine), rel=1e-5)


def test_jitter_touches_inputs_in_training_only_and_levels_apart(monkeypatch):
    method = tiny(dropout=0.0, jitter_probability=0.5)
    batch = batch_of(method)
    _, clean = method._filtered(method.features_of(batch))
    seen = []
    reconstruct = method.reconstruct
    monkeypatch.setattr(method, "reconstruct", lambda inputs: seen.append(inputs) or reconstruct(inputs))
    method.training_loss(batch)
    assert all(torch.equal(one, other) for one, other in zip(seen.pop(), clean))
    method.train()
    torch.manual_seed(0)
    for _ in range(12):
        method.training_loss(batch)
    jittered = [tuple(not torch.equal(x, y) for x, y in zip(inputs, clean)) for inputs in seen]
    assert len(set(jittered)) > 2, "levels are jittered all together"
    share = np.mean(jittered)
    assert 0.25 < share < 0.75
    for inputs, flags in zip(seen, jittered):
        for x, y, changed in zip(inputs, clean, flags):
            if changed:  # noise of standard deviation 20 times a token's norm over its number of channels
                scale = 20 * y.norm(dim=1, keepdim=True) / y.shape[1]
                assert ((x - y) / scale).std().item() == pytest.approx(1, abs=0.1)


def test_loss_falls_when_one_batch_is_learned_and_maps_with_it():
    method = tiny(dropout=0.0, jitter_probability=0.0).train()
    batch = batch_of(method)
    before = method.predict(batch.images).anomaly_map.mean()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        loss = method.training_loss(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert method.predict(batch.images).anomaly_map.mean() < 0.1 * before


@pytest.mark.parametrize(
    "changes",
    [RELEASED, {"sar": "off"}, {"cnn": "mg"}, {"cnn": "conv3"}, {"cnn": "none"}, {"taps": (8,)}, {"levels": (2,)}],
    ids=str,
)
def test_every_form_trains_all_its_parameters(changes):
    method = tiny(**changes).train()
    method.training_loss(batch_of(method))["loss"].backward()
    for name, parameter in method.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_parts_of_the_ablations():
    assert count(*(block.cnn for block in tiny(cnn="none").blocks)) == 0
    assert count(*(block.cnn for block in tiny(cnn="conv3").blocks)) == 3 * (9 * 32 + 1) * 32
    assert count(tiny(cnn="mg").blocks) == count(tiny(cnn="mgg").blocks)
    images = random_images(1)
    assert not torch.equal(tiny(cnn="mg").predict(images).score, tiny(cnn="mgg").predict(images).score)


def test_losses_stay_in_float32_under_autocast(monkeypatch):
    method = tiny(**RELEASED)
    exact = method.training_loss(batch_of(method))
    features = method.features_of(batch_of(method))
    with torch.autocast("cpu", torch.bfloat16):
        batch = dataclasses.replace(batch_of(method), images=None, features=features)
        rough = method.training_loss(batch)
        assert all(loss.dtype == torch.float32 for loss in rough.values())
        rough["loss"].backward()
        # bfloat16 has no number between 1 and 1.0078
        made, target = torch.full((1, 2, 1, 1), 1.001), torch.ones(1, 2, 1, 1)
        assert reconstruction_terms(made, target, "distance")[0].item() == pytest.approx(1e-6, rel=0.01)
        predicted = method.predict(random_images(2))
    assert predicted.anomaly_map.dtype == predicted.score.dtype == torch.float32
    for name, loss in exact.items():
        assert rough[name].item() == pytest.approx(loss.item(), rel=0.05)


def test_kept_features_stand_for_images():
    method = tiny()
    batch = batch_of(method)
    features = method.frozen_features(batch.images)
    assert list(features) == ["level_0", "level_1", "level_2"]
    assert not any(level.requires_grad or level.is_inference() for level in features.values())
    kept = dataclasses.replace(batch, images=None, features=dict(reversed(features.items())))
    assert torch.equal(method.training_loss(kept)["loss"], method.training_loss(batch)["loss"])


# ------------------------------------------------------------------------------------------------------------- options
def test_presets_differ_where_text_and_code_do():
    paper, reference = (flatten(dataclasses.asdict(UniASConfig(preset=preset))) for preset in ("paper", "reference"))
    assert {key: (paper[key], reference[key]) for key in paper if paper[key] != reference[key]} == {
        "preset": ("paper", "reference"),
        "backbone.padding_side": (None, 380),
        "cos_sign": ("distance", "legacy"),
        "neighbours": (0, 7),
        "sar": ("cbam_product", "lincomb"),
        "head": ("deconvolution", "convolutions"),
        "fuse_at": ("input", "finest"),
        "level_blur": (False, True),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": InputPolicy(resize="stretch", size=72, crop=None)}, "multiple of 16"),
        ({"neighbours": 5}, "hides all of the 4×4 token grid"),
        ({"channel_attention": True, "heads": 32, "dim": 32}, "divides into heads=32"),
        ({"input": InputPolicy(resize="stretch", size=16, crop=None)}, "too few to filter"),
    ],
    ids=str,
)
def test_inputs_and_options_that_do_not_fit_the_encoder(changes, said):
    with pytest.raises(OptionError, match=said):
        tiny(**changes)


def test_a_larger_input_that_divides_is_taken():
    method = tiny(input=InputPolicy(resize="stretch", size=96, crop=None))
    assert method.sizes == [24, 12, 6]
    assert method.predict(random_images(1, side=96)).anomaly_map.shape == (1, 96, 96)


def test_needs_its_augmentation():
    assert tiny().batch_spec.augmentation == Augmentation()
    flips = Augmentation(horizontal=("screw",))
    needs = tiny(augmentation=flips).batch_spec
    assert needs.augmentation == flips
    assert needs.synthetic is None
    assert needs.prompts is None


@pytest.mark.parametrize(
    ("name", "channel_attention", "weight", "turned"),
    [
        ("unias_mvtec", True, 10.0, ("bottle", "carpet", "screw", "tile", "wood")),
        ("unias_visa", False, 1.0, ("capsules", "fryum", "macaroni2")),
    ],
)
def test_recipes(name, channel_attention, weight, turned):
    config = from_plain(UniASConfig, yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["method"])
    assert config == UniASConfig(
        augmentation=config.augmentation, channel_attention=channel_attention, loss_weight=weight
    )
    assert config.augmentation.turns == turned
    assert config.augmentation.probability == 0.3
    assert set(turned) <= set(config.augmentation.vertical) <= set(config.augmentation.horizontal)


# ---------------------------------------------------------------------------------------------- parts of its own
def test_published_size_of_the_gated_cnn():
    cnn = MultiGranularityCnn(256, 256)
    # one 1×1 and six 3×3 convolutions with biases
    assert sum(p.numel() for p in cnn.parameters()) == 256 * 257 + 6 * (9 * 256 + 1) * 256


def test_output_of_the_gated_cnn_is_the_sum_of_gated_branches():
    torch.manual_seed(0)
    cnn = MultiGranularityCnn(3, 2)
    x = torch.randn(1, 3, 5, 5)
    state = cnn.state_dict()
    weights = [state[key] for key in state if key.endswith("weight")]
    biases = [state[key] for key in state if key.endswith("bias")]
    expected = torch.zeros(1, 2, 5, 5)
    layer = 0
    for depth in (1, 1, 2, 3):
        branch = x
        for _ in range(depth):
            branch = conv2d(branch, weights[layer], biases[layer], padding=weights[layer].shape[-1] // 2)
            layer += 1
        expected += 0.5 * branch * (1 + torch.erf(branch / math.sqrt(2)))
    torch.testing.assert_close(cnn(x), expected)


def test_branches_see_one_to_seven_cells():
    cnn = MultiGranularityCnn(1, 1, gated=False)
    impulse = torch.zeros(1, 1, 11, 11)
    impulse[0, 0, 5, 5] = 1
    for branch, reach in zip(cnn.branches, (0, 1, 2, 3)):
        difference = (branch(impulse) - branch(torch.zeros_like(impulse)))[0, 0].abs() > 0
        # a bias next to the border makes no difference, so what remains is what one cell reaches
        rows, columns = difference.nonzero().T
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5 - reach, 5 + reach, 5 - reach, 5 + reach)


def test_without_gates_the_cnn_is_affine():
    cnn = MultiGranularityCnn(2, 3, gated=False)
    x, y, zero = torch.randn(1, 2, 6, 6), torch.randn(1, 2, 6, 6), torch.zeros(1, 2, 6, 6)
    torch.testing.assert_close(cnn(x + y), cnn(x) + cnn(y) - cnn(zero), atol=1e-4, rtol=1e-4)
    gated = MultiGranularityCnn(2, 3)
    assert (gated(x + y) - gated(x) - gated(y) + gated(zero)).abs().max() > 1e-2


def test_sine_position_is_that_of_loops():
    height, width, dim = 3, 5, 12
    code = sine_position(height, width, dim)
    assert code.shape == (15, 12)
    half = dim // 2
    for row in range(height):
        for column in range(width):
            for index in range(half):
                for start, place, length in ((0, row, height), (half, column, width)):
                    angle = (place + 1) / (length + 1e-6) * 2 * math.pi
                    angle /= 10_000 ** (2 * (index // 2) / half)
                    expected = math.sin(angle) if index % 2 == 0 else math.cos(angle)
                    assert code[row * width + column, start + index].item() == pytest.approx(expected, abs=1e-5)
