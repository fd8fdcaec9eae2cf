"""Every method in a tiny form, for tests that run in moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from unianom.configs.backbone import BackboneConfig
from unianom.configs.onenip import OneNIPConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.recontrast import ReContrastConfig
from unianom.configs.revdist import RevDistConfig
from unianom.configs.transformer import TransformerConfig
from unianom.configs.uniad import UniADConfig
from unianom.configs.unias import UniASConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.configs.uninet import UniNetConfig
from unianom.data.image import InputPolicy
from unianom.memory.index import MemoryBank
from unianom.methods import METHODS, MemoryMethod, Method
from unianom.methods.trained import TrainedMethod, TrainingBatch

SIDE = 64
INPUT = InputPolicy(resize="stretch", size=SIDE, crop=None)

VIT = "vit_tiny_patch16_224"
VIT_OPTIONS = {"patch_size": 8, "embed_dim": 48, "num_heads": 3}
"""Twelve blocks of width 48 on an 8×8 grid at 64 pixels."""


@dataclass(frozen=True)
class Tiny:
    """What the conformance suite needs to know of a method.

    Attributes:
        config: options under which it is small and fast.
        invalid: changes of the config, each of which it must refuse.
        reading: changes of its reading options by dotted names, each of which changes maps or scores; every option
            takes part in one of them.
        masking: for a memory method, the same of its bank options, but for those of the bank itself.
        training_batch: for a trained method, makes what its `training_loss` takes.
    """

    config: Any
    invalid: list[dict[str, Any]] = field(default_factory=list)
    reading: list[dict[str, Any]] = field(default_factory=list)
    masking: list[dict[str, Any]] = field(default_factory=list)
    training_batch: Callable[[Method], Any] | None = None


def training_batch(method: TrainedMethod, count: int = 4, seed: int = 2) -> TrainingBatch:
    """What the method's `training_loss` takes: images of two categories in turn, with all that it `needs`."""
    batch = TrainingBatch(torch.arange(count) % 2, images=random_images(count, seed))
    if method.batch_spec.synthetic is not None:
        mask = torch.zeros(count, 1, SIDE, SIDE)
        mask[:, :, 8:24, 16:40] = 1
        batch.synthetic_mask = mask
        batch.synthetic_images = torch.where(mask > 0, random_images(count, seed + 1), random_images(count, seed))
    if method.batch_spec.prompts is not None:
        batch.prompt_images = random_images(count, seed + 2)
    return batch


RECONSTRUCTION: dict[str, Any] = {
    "backbone": BackboneConfig("resnet10t", weights="random"),
    "input": INPUT,
    "taps": (4, 8, 16),
    "transformer": TransformerConfig(dim=16, heads=2, hidden=32, encoder_layers=2, decoder_layers=2),
}
"""Small options that UniAD and OneNIP share: 4×4 tokens at 64 pixels."""

INVALID_RECONSTRUCTION: list[dict[str, Any]] = [
    {"taps": ()},
    {"taps": (16, 8)},
    {"taps": (0, 4)},
    {"grid_reduction": 2},
    {"grid_reduction": -1},
    {"neighbours": -1},
    {"score_pool": 0},
    {"score_pool": SIDE + 1},
]
"""Changes that both must refuse."""

DISTANCE_READING: list[dict[str, Any]] = [
    {"map.fuse": "mean"},
    {"map.blur": "box"},
    {"map.blur": "none", "map.score_share": 1.0},
    {"map.score_share": 0.01},
]
"""Raw outputs of RevDist and ReContrast."""

TINY = {
    "uniformaly": Tiny(
        UniFormalyConfig(backbone=BackboneConfig(VIT, weights="random", options=VIT_OPTIONS), input=INPUT),
        invalid=[
            {"mask_kernel": 4},
            {"mask_kernel": -1},
            {"mask_threshold": 1.0},
            {"mask_threshold": -0.1},
            {"k_ratio": 0.0},
            {"k_ratio": 1.5},
            {"k_ratio": float("nan")},
            {"neighbours": 0},
            {"blur_sigma": -1.0},
            {"blur_sigma": float("nan")},
            {"blur_sigma": 1e9},
        ],
        reading=[{"neighbours": 3}, {"neighbours": 5, "k_ratio": 0.5}, {"k_ratio": 0.001}, {"blur_sigma": 1.5}],
        masking=[
            {"mask_kernel": 1, "mask_threshold": 0.985},
            {"mask_threshold": 0.9, "mask_scope": "batch"},
            {"mask": "soft"},
            {"mask_threshold": 0.9},
            {"mask": "off"},
        ],
    ),
    "patchcore": Tiny(
        PatchCoreConfig(backbone=BackboneConfig("resnet10t", weights="random"), input=INPUT, dimension=96),
        invalid=[
            {"taps": ()},
            {"taps": (16, 8)},
            {"taps": (8, 8)},
            {"patch_size": 2},
            {"patch_size": -1},
            {"dimension": 0},
            {"neighbours": 0},
            {"reweight_neighbours": 1},
            {"blur_sigma": -1.0},
            {"blur_sigma": float("inf")},
            {"blur_sigma": 4097.0},
        ],
        reading=[
            {"neighbours": 3},
            {"reweight": False},
            {"neighbours": 5, "reweight": False},
            {"reweight_neighbours": 3},
            {"blur_sigma": 0.0},
        ],
    ),
    "uniad": Tiny(
        UniADConfig(**RECONSTRUCTION, neighbours=3),
        invalid=[*INVALID_RECONSTRUCTION, {"masked": ("decoder",)}],
        reading=[
            {"map_form": "squared"},
            {"reduce": "mean"},
            {"map_form": "squared", "reduce": "std"},
            {"score_pool": 5},
        ],
        training_batch=training_batch,
    ),
    "onenip": Tiny(
        OneNIPConfig(**RECONSTRUCTION, refiner_width=8),
        invalid=[
            *INVALID_RECONSTRUCTION,
            {"neighbours": "some"},
            {"pool_size": 0},
            {"refiner_width": 0},
            {"dice_factor": 0.0},
            {"dice_smoothing": -1.0},
            {"segmentation_weight": -0.5},
            {"alpha": 1.5},
            {"alpha": float("nan")},
        ],
        reading=[{"alpha": 0.2}, {"alpha": 0.0}, {"score_pool": 5}],
        training_batch=training_batch,
    ),
    "unias": Tiny(
        UniASConfig(
            backbone=BackboneConfig("resnet10t", weights="random"),
            input=INPUT,
            taps=(4, 8, 16),
            dim=32,
            hidden=32,
            encoder_layers=1,
        ),
        invalid=[
            {"taps": ()},
            {"taps": (16, 8)},
            {"dim": 48},
            {"dim": 0},
            {"heads": 0},
            {"heads": 5},
            {"hidden": 0},
            {"encoder_layers": 0},
            {"dropout": 1.0},
            {"jitter_scale": -1.0},
            {"jitter_probability": 1.5},
            {"neighbours": -1},
            {"loss_weight": 0.0},
            {"loss_weight": float("nan")},
            {"levels": (0,)},
            {"levels": (4,)},
            {"levels": (1, 1)},
        ],
        reading=[
            {"levels": (3, 1)},
            {"fuse_at": "finest"},
            {"level_blur": True},
            {"fuse_at": "finest", "level_blur": True, "levels": (2,)},
            {"reduce": "std"},
        ],
        training_batch=training_batch,
    ),
    "revdist": Tiny(
        RevDistConfig(backbone=BackboneConfig("resnet10t", weights="random"), input=INPUT),
        invalid=[{"input": InputPolicy(resize="stretch", size=72, crop=None)}],
        reading=DISTANCE_READING,
        training_batch=training_batch,
    ),
    "recontrast": Tiny(
        ReContrastConfig(backbone=BackboneConfig("resnet10t", weights="random"), input=INPUT, norm_guard=5e-4),
        invalid=[
            {"input": InputPolicy(resize="stretch", size=72, crop=None)},
            {"norm_guard": -1.0},
            {"norm_eps": -1.0},
            {"encoder_norm": "eval"},  # which has no use for the guard
            {"mining": (-3.0, float("inf"))},
            {"mining": (0.0, 1.0, 2.0)},
            {"mining_ramp": 1.5},
        ],
        reading=DISTANCE_READING,
        training_batch=training_batch,
    ),
    "uninet": Tiny(
        UniNetConfig(preset="paper", backbone=BackboneConfig("resnet10t", weights="random"), input=INPUT),
        invalid=[
            {"mem_kernel": 4},
            {"mem_kernel": 0},
            {"training_sizes": (72,)},
            {"input": InputPolicy(resize="stretch", size=80, crop=None)},
            {"temperature": 0.0},
            {"temperature": float("nan")},
            {"margin": 0.0},
            {"balance": 1.5},
            {"supervision": -1.0},
            {"alpha": -0.1},
            {"beta": 1.5},
            {"decision_share": 0.0},
            {"score_blur": -1.0},
            {"similarity_rows": -1},
            {"contrast": "label"},
            {"kd_normal_only": True},
            {"task": "classification", "contrast": "mask"},
        ],
        reading=[
            {"decision": "max"},
            {"decision": "share", "decision_share": 0.2},
            {"decision": "literal", "beta": 0.1},
            {"alpha": 0.3},
            {"beta": 0.5, "score_blur": 1.5},
        ],
        training_batch=training_batch,
    ),
}
"""One entry for each registered method; a method without one fails the conformance suite."""

INVALID_BANKS: list[dict[str, Any]] = [
    {"coreset_ratio": 0.0},
    {"coreset_ratio": 1.1},
    {"projection": -1},
    {"start_points": 0},
    {"shards": 0},
    {"nprobe": 0},
    {"nlist": 4, "nprobe": 5},
]
"""Changes of `BankConfig` that it must refuse."""


def random_images(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """B×3×S×S float32 of smooth random blobs: neighbouring pixels alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").contiguous()


def fit(method: Method, rows: int = 40, seed: int = 1) -> Method:
    """Give a memory method a bank of random normal patches; a trained method stays at its random weights and is
    finished on random images of two categories."""
    method.eval()
    if isinstance(method, MemoryMethod):
        with torch.inference_mode():
            embedding = method.embed_for_bank(random_images(4, seed))
        patches = embedding.patches[embedding.keep].numpy()
        chosen = np.random.default_rng(seed).permutation(len(patches))[:rows]
        method.bank = MemoryBank.build(patches[chosen])
    elif isinstance(method, TrainedMethod):
        method.finalize([TINY[method.name].training_batch(method)], ["a", "b"])
    return method


@torch.inference_mode(False)  # PyTorch computes otherwise, in the last bits, with weights that were made in that mode
def remade(method: Method, config: Any) -> Method:
    """A method of this config with the weights and the bank of another one."""
    other = type(method)(config).eval()
    state = method.state_dict()
    other.size_buffers(state)
    missing, _ = other.load_state_dict(state, strict=False)  # with mask=off UniFormaly keeps fewer blocks
    assert not missing
    if isinstance(method, MemoryMethod):
        other.bank = method.bank
    return other


def tiny_method(name: str) -> Method:
    """A fitted tiny method."""
    return fit(METHODS[name](TINY[name].config))


@pytest.fixture(scope="session")
def sharp_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights file of the tiny transformer with attention that differs from patch to patch and block to block, which
    that of freshly drawn weights hardly does."""
    torch.manual_seed(7)
    model = timm.create_model(VIT, img_size=SIDE, num_classes=0, **VIT_OPTIONS)
    for block in model.blocks:
        with torch.no_grad():
            block.attn.qkv.weight.mul_(12)
            block.mlp.fc2.weight.mul_(5)
    path = Path(tmp_path_factory.mktemp("weights")) / "sharp_vit.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return str(path)
