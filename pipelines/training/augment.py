"""Random flips and turns of training images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from unianom.configs.training import Augmentation


def flip_and_turn(
    pixels: np.ndarray, mask: np.ndarray | None, category: str, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a random mirroring, right-angle turn and rotation, as the category of the image allows.

    Args:
        pixels: S×S×3 uint8.
        mask: S×S bool, changed alike, or None.
        category: of the image.
        augmentation: what is asked for.
        rng: draws the same whether there is a mask or not.
    """

    def chosen(names: tuple[str, ...]) -> bool:
        return category in names or "*" in names

    changes: list[Callable[[np.ndarray], np.ndarray]] = []
    if chosen(augmentation.horizontal) and rng.random() < augmentation.probability:
        changes.append(np.fliplr)
    if chosen(augmentation.vertical) and rng.random() < augmentation.probability:
        changes.append(np.flipud)
    if chosen(augmentation.turns):
        changes.append(partial(np.rot90, k=int(rng.integers(4))))
    if augmentation.rotation:
        changes.append(partial(_rotated, angle=float(rng.uniform(-augmentation.rotation, augmentation.rotation))))
    for change in changes:
        pixels, mask = change(pixels), None if mask is None else change(mask)
    return pixels, mask


def _rotated(values: np.ndarray, angle: float) -> np.ndarray:
    """Return an image turned bilinearly, or a mask of bool by nearest neighbours; what comes from outside is black."""
    if values.dtype == bool:
        return _rotated_by(values.astype(np.uint8), angle, Image.Resampling.NEAREST).astype(bool)
    return _rotated_by(values, angle, Image.Resampling.BILINEAR)


def _rotated_by(values: np.ndarray, angle: float, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(values)).rotate(angle, resampling))
