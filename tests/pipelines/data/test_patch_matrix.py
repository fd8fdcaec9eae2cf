"""Patches that are cached, and those of many images as one matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.data.extractors import ImageBatch
from pipelines.data.patch_matrix import KEEP, PATCHES, KeptPatches, PatchMatrix
from tests.methods.conftest import TINY
from tests.pipelines.conftest import tiny_method
from tests.pipelines.sharded import SIDE, picture
from unianom.data.tensors import normalise
from unianom.errors import DataError, ModelError
from unianom.memory.coreset import random_projection
from unianom.methods import METHODS, MaskedPatches
from unianom.methods.uniformaly import UniFormaly


def test_a_matrix_of_patches_is_projected_array_by_array() -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=(count, 8)).astype(np.float32) for count in (5, 3)]
    patches = PatchMatrix([arrays[0], np.zeros((0, 0), np.float32), arrays[1]])
    assert (patches.rows, patches.dimension) == (8, 8)
    np.testing.assert_array_equal(patches.projected(0, 3), np.concatenate(arrays))
    matrix = random_projection(8, 4, seed=3)
    np.testing.assert_array_equal(patches.projected(4, 3), np.concatenate([array @ matrix for array in arrays]))
    np.testing.assert_array_equal(patches.take(np.array([6, 1])), np.stack([arrays[1][1], arrays[0][1]]))
    with pytest.raises(DataError, match="masking left no patch for the bank"):
        PatchMatrix([np.zeros((0, 8), np.float32)])


def test_kept_patches_lie_image_after_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the bank are masked otherwise, where a method does so."""
    method = UniFormaly(tiny_method()).eval()
    pixels = [picture([number], SIDE, SIDE) for number in range(3)]
    batch = ImageBatch(np.stack(pixels), "part-0.parquet")
    with torch.inference_mode():
        patches = method.encode(normalise(pixels, method.input)).patches
    keep = torch.zeros(patches.shape[:2], dtype=torch.bool)
    keep[0, [1, 5]] = keep[2, 3] = True
    monkeypatch.setattr(method, "mask_bank_patches", lambda encoded: MaskedPatches(encoded.patches, keep))
    with torch.inference_mode():
        arrays = KeptPatches("somewhere", for_bank=True).open(lambda folder: method).compute(batch)
        everything = KeptPatches("somewhere", for_bank=False).open(lambda folder: method).compute(batch)
    np.testing.assert_array_equal(arrays[PATCHES], torch.stack([patches[0, 1], patches[0, 5], patches[2, 3]]).numpy())
    np.testing.assert_array_equal(arrays[KEEP], keep.numpy())
    assert arrays[KEEP].sum(1).tolist() == [2, 0, 1]
    assert everything[KEEP].sum() == len(everything[PATCHES])
    monkeypatch.setattr(method, "mask_bank_patches", lambda encoded: MaskedPatches(encoded.patches * np.nan, keep))
    with pytest.raises(DataError, match=r"patches of part-0.parquet hold NaN .*use --method.backbone.precision fp32"):
        KeptPatches("somewhere", for_bank=True).open(lambda folder: method).compute(batch)


def test_a_method_without_patches_is_refused() -> None:
    uniad = METHODS["uniad"](TINY["uniad"].config)
    with pytest.raises(ModelError, match="uniad has no memory bank"):
        KeptPatches("somewhere", for_bank=True).open(lambda folder: uniad)
