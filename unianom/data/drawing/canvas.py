"""The grid that scenes are drawn on, and what is drawn there: shapes, noise, light."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

Array = NDArray[Any]

OVERSAMPLING = 2
"""Canvas pixels per pixel of the picture, along each side; what `reduce` and `enlarge` convert."""


class Canvas:
    """The grid that a scene is drawn on. All lengths are fractions of the side of the picture.

    Attributes:
        n: pixels per side.
        y, x: position of each pixel's centre, n×n float32, from 0 to 1.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        centres = (np.arange(n, dtype=np.float32) + 0.5) / n
        self.y, self.x = np.meshgrid(centres, centres, indexing="ij")

    def fill(self, distance: Array) -> Array:
        """Return the coverage in [0, 1] of a shape given by its signed distance (negative inside), edges
        antialiased."""
        return np.clip(0.5 - distance * self.n, 0, 1)

    def noise(self, rng: np.random.Generator, sigma_y: float, sigma_x: float) -> Array:
        """Return white noise smoothed by a Gaussian of these standard deviations; mean 0, variance 1, periodic; n×n."""
        spectrum = scipy.fft.rfft2(rng.standard_normal((self.n, self.n), dtype=np.float32))
        frequency = np.fft.fftfreq(self.n, 1 / self.n).astype(np.float32)
        gain_y = np.exp(-2 * (np.pi * sigma_y * frequency) ** 2)
        gain_x = np.exp(-2 * (np.pi * sigma_x * frequency) ** 2)
        spectrum *= gain_y[:, None] * gain_x[: spectrum.shape[1]]
        return scipy.fft.irfft2(spectrum, (self.n, self.n)) / np.sqrt(np.mean(gain_y**2) * np.mean(gain_x**2))

    def blob(self, rng: np.random.Generator, y: float, x: float, radius: float) -> Array:
        """Return the signed distance (to first order) of an irregular patch around (y, x), at least two final pixels in
        radius."""
        radius = max(radius, 2 * OVERSAMPLING / self.n)
        stretch = math.sqrt(rng.uniform(1, 2))
        along, across = turn(self.y - y, self.x - x, rng.uniform(0, math.pi))
        along, across = along / stretch, across * stretch
        angle = np.arctan2(along, across)
        outline = np.ones_like(angle)
        for wave in range(2, 6):
            outline = outline + rng.uniform(-0.35, 0.35) / wave * np.cos(wave * angle + rng.uniform(0, 2 * math.pi))
        return np.hypot(along, across) - radius * outline

    def stroke(
        self, rng: np.random.Generator, y: float, x: float, angle: float, length: float, width: float, wobble: float
    ) -> Array:
        """Return the signed distance (to first order) of a line through (y, x) that wanders by about `wobble`.

        `angle` is against the y axis; the line is never thinner than 1.3 final pixels, so that its mask has no gaps.
        """
        along, across = turn(self.y - y, self.x - x, angle)
        knots = np.linspace(-length / 2, length / 2, 9)
        path = np.cumsum(rng.standard_normal(9)) * wobble / 3
        path = path - path[4]
        slope = np.abs(np.diff(path)).max() / (knots[1] - knots[0])
        # Thinner towards both ends, as a slipping tool leaves it.
        half = width / 2 * np.clip(1.3 - (2 * along / length) ** 2, 0.3, 1)
        half = np.maximum(half, 1.3 / 2 * OVERSAMPLING / self.n)
        aside = np.abs(across - np.interp(along, knots, path).astype(np.float32)) / math.hypot(1, slope) - half
        return np.maximum(aside, np.abs(along) - length / 2)


def turn(y: Array, x: Array, angle: float) -> tuple[Array, Array]:
    """Return coordinates in axes turned by `angle` (radians): along the new first axis, and across it."""
    cos, sin = math.cos(angle), math.sin(angle)
    return y * cos + x * sin, x * cos - y * sin


def mix(low: Array, high: Array, share: Array | float) -> Array:
    """Return colours between `low` and `high`: (3,) or n×n×3 each, by `share` n×n or one number."""
    return low + (high - low) * np.asarray(share, np.float32)[..., None]


def rgb(*channels: float) -> Array:
    """Return a colour, (3,) float32."""
    return np.array(channels, np.float32)


def soft_shadow(coverage: Array, dy: float, dx: float, blur: float) -> Array:
    """Return the shadow of a shape, moved by (dy, dx) and blurred; computed at half the resolution, as it has no
    detail."""
    small = reduce(coverage)
    n = len(small)
    moved = scipy.ndimage.shift(small, (round(dy * n), round(dx * n)), order=0)
    return enlarge(scipy.ndimage.gaussian_filter(moved, blur * n, truncate=2.5))


def relief(height: Array, light: float, blur: float) -> Array:
    """Return the shading of the bevelled edges of a shape under light from direction `light`; about -1 to 1."""
    rounded = scipy.ndimage.gaussian_filter(height, blur * len(height), truncate=2.5)
    slope_y, slope_x = np.gradient(rounded)
    return (slope_y * math.sin(light) + slope_x * math.cos(light)) * (blur * len(height) * 2.5)


def changed(clean: Array, altered: Array) -> Array:
    """Return the coverage of a defect of shape and of the shadow it moves: 1 where they show above the sensor noise,
    else 0."""
    difference = np.abs(altered - clean).max(axis=-1)
    return scipy.ndimage.binary_fill_holes(difference > 0.015).astype(np.float32)


def reduce(picture: Array) -> Array:
    """Reduce from the canvas to the size of the picture: mean over blocks of 2×2 pixels."""
    return (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2]) / 4


def enlarge(picture: Array) -> Array:
    """Enlarge from the size of the picture to the canvas: each pixel becomes 2×2."""
    return picture.repeat(2, axis=0).repeat(2, axis=1)
