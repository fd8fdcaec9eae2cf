"""UniFormaly against a plain second implementation: hooks on timm's own blocks, loops over images and patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter

from tests.methods.conftest import INPUT, SIDE, VIT, VIT_OPTIONS, random_images
from unianom.configs.backbone import BackboneConfig
from unianom.configs.uniformaly import PRESETS, UniFormalyConfig
from unianom.data.image import InputPolicy
from unianom.errors import OptionError
from unianom.memory.index import MemoryBank
from unianom.methods import MaskedPatches
from unianom.methods.uniformaly import UniFormaly

Array = NDArray[np.float64]

GRID = 8
IMAGES = random_images(3)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
"""Float32 against float64 after twelve blocks, fused against plain attention; features are of the order of 1 to 10."""


# ------------------------------------------------------------------------------------------ second implementation
@cache
def observe(weights: str) -> tuple[list[Array], list[Array]]:
    """What goes out of every block (B×T×D), and its attention after the softmax (B×heads×T×T), in float64."""
    vit = timm.create_model(VIT, img_size=SIDE, num_classes=0, **VIT_OPTIONS)
    vit.load_state_dict(load_file(weights))
    vit = vit.double().eval()
    outputs: list[Array] = []
    attentions: list[Array] = []
    handles = []
    for block in vit.blocks:
        block.attn.fused_attn = False  # the fused kernel never forms the attention matrix
        handles.append(block.register_forward_hook(lambda _m, _i, out: outputs.append(out.numpy())))
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _m, i, _o: attentions.append(i[0].numpy())))
    with torch.no_grad():
        vit.forward_features(IMAGES.double())
    for handle in handles:
        handle.remove()
    return outputs, attentions


def rollout(attentions: list[Array]) -> Array:
    """T×T of one image: the product of (mean over heads + identity) / 2, later blocks on the left."""
    product = np.eye(attentions[0].shape[-1])
    for heads in attentions:
        product = (heads.mean(axis=0) + np.eye(len(product))) / 2 @ product
    return product


def smoothed(attention: Array, kernel: int) -> Array:
    """Eq. 1: each cell is the sum over its window, zero outside the grid, divided by kernel²."""
    rows, columns = attention.shape
    reach = kernel // 2
    result = np.zeros_like(attention)
    for row in range(rows):
        for column in range(columns):
            for i in range(-reach, reach + 1):
                for j in range(-reach, reach + 1):
                    if 0 <= row + i < rows and 0 <= column + j < columns:
                        result[row, column] += attention[row + i, column + j] / kernel**2
    return result


def nearest_squared(patch: Array, bank: Array, neighbours: int) -> float:
    """Mean squared distance to the nearest bank vectors."""
    return float(np.sort([((patch - vector) ** 2).sum() for vector in bank])[:neighbours].mean())


def anomaly_map(grid: Array, side: int, sigma: float) -> Array:
    large = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(side, side), mode="bilinear", align_corners=False
    )[0, 0].numpy()
    return gaussian_filter(large, sigma) if sigma else large


@dataclasses.dataclass
class Expected:
    """Of B images: patches B×N×D, smoothed attention as a share of its maximum B×N, and which patches are kept."""

    patches: Array
    share: Array
    keep: NDArray[np.bool_]


def expected_embedding(config: UniFormalyConfig) -> Expected:
    """Of `IMAGES`."""
    outputs, attentions = observe(config.backbone.weights)
    block = config.attention_block % len(outputs)
    patches, attention_maps = [], []
    for number in range(len(IMAGES)):
        taps = [outputs[tap][number, 1:] for tap in config.blocks]
        patches.append(sum(taps) / len(taps) if config.aggregation == "mean" else np.concatenate(taps, axis=1))
        if config.attention == "cls":
            cls = attentions[block][number].mean(axis=0)[0, 1:]
        else:
            cls = rollout([layer[number] for layer in attentions[: block + 1]])[0, 1:]
        attention_maps.append(smoothed(cls.reshape(GRID, GRID), config.mask_kernel).ravel())
    share = np.stack(attention_maps)
    share /= share.max() if config.mask_scope == "batch" else share.max(axis=1, keepdims=True)
    keep = np.ones(share.shape, bool)
    if config.mask == "binary":
        keep = share > config.mask_threshold
    if config.mask == "soft":
        patches = [patch * weight[:, None] for patch, weight in zip(patches, share)]
    return Expected(np.stack(patches), share, keep)


def expected_prediction(config: UniFormalyConfig, found: Expected, bank: Array) -> tuple[Array, Array]:
    scores, maps = [], []
    for patches, keep in zip(found.patches, found.keep):
        distances = np.zeros(len(patches))
        for number in range(len(patches)):
            if keep[number]:
                distances[number] = nearest_squared(patches[number], bank, config.neighbours)
        ordered = sorted(distances, reverse=True)
        top = round(config.k_ratio * len(patches))
        scores.append(sum(ordered[:top]) / top)
        maps.append(anomaly_map(distances.reshape(GRID, GRID), SIDE, config.blur_sigma))
    return np.array(scores), np.stack(maps)


# ----------------------------------------------------------------------------------------------------------- tests
@pytest.fixture
def configure(sharp_vit: str) -> Callable[..., UniFormalyConfig]:
    def make(**changes) -> UniFormalyConfig:
        return UniFormalyConfig(
            backbone=BackboneConfig(VIT, weights=sharp_vit, options=VIT_OPTIONS), input=INPUT, **changes
        )

    return make


OPTIONS = {
    "paper": {},
    "reference": {"preset": "reference"},
    "paper, block 9": {"attention_block": 9},
    "first block": {"attention_block": 0, "blocks": (0, 3)},
    "attention before the last tap": {"attention_block": 4},
    "concat": {"aggregation": "concat", "blocks": (2, 5, 11)},
    "taps out of order": {"aggregation": "concat", "blocks": (6, 1)},
    "kernel 1": {"mask_kernel": 1},
    "kernel 3": {"mask_kernel": 3, "mask_threshold": 0.3},
    "threshold 0.5": {"mask_threshold": 0.5},
    "threshold 0": {"mask_threshold": 0.0, "mask_kernel": 1},
    "rollout": {"attention": "rollout", "mask_kernel": 1, "mask_threshold": 0.3},
    "rollout to block 9": {"attention": "rollout", "attention_block": 9, "mask_kernel": 3, "mask_threshold": 0.6},
    "rollout over a batch": {"attention": "rollout", "mask_scope": "batch", "mask_kernel": 1, "mask_threshold": 0.3},
    "soft": {"mask": "soft"},
    "soft over a batch": {"mask": "soft", "mask_scope": "batch", "mask_kernel": 1},
    "no mask": {"mask": "off"},
    "three neighbours": {"neighbours": 3},
    "all patches, no blur": {"k_ratio": 1.0, "blur_sigma": 0.0},
    "k-ratio 0.2": {"k_ratio": 0.2, "mask_threshold": 0.6},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_patches_masks_scores_and_maps_are_those_of_the_second_implementation(name, configure):
    config = configure(**OPTIONS[name])
    method = UniFormaly(config)
    found = expected_embedding(method.config)
    with torch.inference_mode():
        embedding = method.embed(IMAGES)
    assert embedding.patches.dtype == torch.float32
    np.testing.assert_allclose(embedding.patches.numpy(), found.patches, **CLOSE)
    if config.mask == "binary":
        assert (abs(found.share - config.mask_threshold) > 1e-5).all(), "a patch on the threshold decides nothing"
    np.testing.assert_array_equal(embedding.keep.numpy(), found.keep)

    rng = np.random.default_rng(5)
    bank = found.patches.reshape(-1, found.patches.shape[-1])[rng.permutation(3 * GRID**2)[:30]]
    bank = (bank + rng.normal(0, 0.5, bank.shape)).astype(np.float32)
    method.bank = MemoryBank.build(bank)
    scores, maps = expected_prediction(method.config, found, bank.astype(np.float64))
    prediction = method.predict(IMAGES)
    np.testing.assert_allclose(prediction.score.numpy(), scores, rtol=1e-3)
    np.testing.assert_allclose(prediction.anomaly_map.numpy(), maps, rtol=1e-3, atol=1e-4 * maps.max())


def test_masks_of_these_weights_tell_blocks_kernels_and_scopes_apart(configure):
    """The comparison above proves nothing if every mask is full: here masks differ in what should make them differ."""

    def mask(**changes) -> NDArray[np.bool_]:
        with torch.inference_mode():
            return UniFormaly(configure(mask_threshold=0.3, **changes)).embed(IMAGES).keep.numpy()

    masks = [
        mask(mask_kernel=1),
        mask(mask_kernel=3),
        mask(mask_kernel=7),
        mask(mask_kernel=1, attention_block=9),
        mask(mask_kernel=1, mask_scope="batch"),
        mask(mask_kernel=1, attention="rollout"),
    ]
    for number, one in enumerate(masks):
        assert 0 < one.sum() < one.size
        assert all((one != other).any() for other in masks[:number])


def test_presets_differ_where_text_and_released_code_do(configure):
    """The attention's block (last or 9) and whose maximum divides it (image or batch), nothing else."""
    paper, reference = configure(preset="paper"), configure(preset="reference")
    differing = {f.name for f in dataclasses.fields(paper) if getattr(paper, f.name) != getattr(reference, f.name)}
    assert differing == {"preset", "attention_block", "mask_scope"}
    assert (paper.attention_block, paper.mask_scope) == (-1, "image")
    assert (reference.attention_block, reference.mask_scope) == (9, "batch")
    assert set(PRESETS) == {"paper", "reference"}
    assert configure() == paper


def test_published_defaults():
    config = UniFormalyConfig()
    assert config.backbone.name == "vit_base_patch8_224.dino"
    assert config.input == InputPolicy("short_side", 256, 224, interpolation="bilinear")
    assert config.blocks == (2, 3, 4, 5, 6, 7, 8, 9)
    assert (config.mask_kernel, config.mask_threshold, config.k_ratio, config.blur_sigma) == (7, 0.1, 0.05, 4.0)
    assert (config.neighbours, config.bank.coreset_ratio) == (1, 0.1)


def test_an_explicit_option_wins_over_the_preset(configure):
    assert configure(preset="reference", attention_block=-1).attention_block == -1
    assert configure(preset="paper", mask_scope="batch").mask_scope == "batch"


@pytest.mark.parametrize(("patch", "patches", "top"), [(8, 784, 39), (16, 196, 10)])
def test_the_score_is_the_mean_of_the_top_five_percent_of_all_patches(patch, patches, top):
    """K = round(0.05·N) of all N patches, masked ones counted: 39 of 784 and 10 of 196."""
    options = {"patch_size": patch, "embed_dim": 12, "num_heads": 3, "depth": 1}
    method = UniFormaly(UniFormalyConfig(backbone=BackboneConfig(VIT, weights="random", options=options), blocks=(0,)))
    method.bank = MemoryBank.build(np.zeros((1, 12), np.float32))
    # patch j has squared distance j to the bank's only vector, which is zero
    vectors = torch.zeros(1, patches, 12)
    vectors[0, :, 0] = torch.arange(patches).sqrt()
    vectors[0] = vectors[0, torch.randperm(patches, generator=torch.Generator().manual_seed(0))]
    prediction = method.postprocess(
        method.search_bank(MaskedPatches(vectors, torch.ones(1, patches, dtype=torch.bool)))
    )
    assert prediction.score.item() == pytest.approx(patches - 1 - (top - 1) / 2, rel=1e-6)
    # with all but seven masked, the seven are averaged with zeros over the same K
    keep = vectors[..., 0] ** 2 > patches - 7.5
    prediction = method.postprocess(method.search_bank(MaskedPatches(vectors, keep)))
    assert prediction.score.item() == pytest.approx(7 * (patches - 4) / top, rel=1e-6)


def test_masked_patches_are_zero_in_the_map_too(configure):
    """Whatever masked patches hold, even what no bank vector resembles, leaves no trace."""
    method = UniFormaly(configure())
    method.bank = MemoryBank.build(np.zeros((1, 48), np.float32))
    patches = torch.full((1, GRID**2, 48), 100.0)
    prediction = method.postprocess(
        method.search_bank(MaskedPatches(patches, torch.zeros(1, GRID**2, dtype=torch.bool)))
    )
    assert prediction.score.item() == 0
    assert not prediction.anomaly_map.any()


def test_without_attention_nothing_can_be_masked_later(configure):
    method = UniFormaly(configure(mask="off"))
    with torch.inference_mode():
        encoded = method.encode(IMAGES)
    with pytest.raises(OptionError, match="mask=soft needs the attention"):
        method.mask_patches(encoded, configure(mask="soft"))


@pytest.mark.parametrize("mask_scope", ["image", "batch"])
def test_what_enters_the_bank(mask_scope, configure):
    """Image scope: the patches that an image's own mask keeps. Batch scope, as the released code: every position that
    any image of the batch keeps, with zeros where an image's own mask drops it."""
    config = configure(mask_scope=mask_scope, mask_kernel=1, mask_threshold=0.3)
    found = expected_embedding(config)
    with torch.inference_mode():
        embedding = UniFormaly(config).embed_for_bank(IMAGES)
    entered = embedding.patches[embedding.keep].numpy()
    if mask_scope == "image":
        expected = [patch for image, keep in zip(found.patches, found.keep) for patch, kept in zip(image, keep) if kept]
    else:
        union = [any(found.keep[image, position] for image in range(3)) for position in range(GRID**2)]
        assert not all(union)
        expected = [
            found.patches[image, position] * found.keep[image, position]
            for image in range(3)
            for position in range(GRID**2)
            if union[position]
        ]
        assert any(not vector.any() for vector in expected)
    np.testing.assert_allclose(entered, np.stack(expected), **CLOSE)


def test_blocks_that_are_never_run_are_not_kept(configure):
    """A model folder holds no dead weights: no block after the last one used, no final norm."""
    assert len(UniFormaly(configure(mask="off", blocks=(1, 3))).encoder.vit.blocks) == 4
    assert len(UniFormaly(configure(attention_block=9)).encoder.vit.blocks) == 10
    assert len(UniFormaly(configure()).encoder.vit.blocks) == 12


def test_a_bank_of_fewer_vectors_than_neighbours_is_refused(configure):
    config = configure(neighbours=3)
    method = UniFormaly(config)
    images = random_images(1)
    with torch.inference_mode():
        method.bank = MemoryBank.build(method.embed(images).patches[0, :2].numpy())
        for refused in (method.check_bank, lambda: method.predict(images)):
            with pytest.raises(OptionError, match="neighbours=3, but the memory bank has only 2 vectors"):
                refused()
        method.bank = MemoryBank.build(method.embed(images).patches[0, :3].numpy())
        method.check_bank()
        method.predict(images)
