"""A small drawn corpus of industrial inspection pictures, in the MVTec AD folder layout.

Four categories: two textures (`weave`, `grain`), one object on plain ground (`cog`) and one on cluttered ground
(`cap`), each with natural variation among its normal pictures and three types of defect with exact masks. It needs
no download and is the same on every run, so that demonstrations and tests can work offline.

A picture is drawn at twice its size and reduced, in this order: the clean scene, the scene as the defect alters it,
the two blended by the coverage of the defect, then light, colour cast and sensor noise. Every random choice comes
from a generator seeded by (seed, category, index) for the scene and (…, defect) for the defect, so a picture does
not depend on how many others are drawn, in which order, or by which process.
"""

from __future__ import annotations

import abc
import difflib
import io
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from unianom import files
from unianom.errors import DataError, OptionError

Array = NDArray[Any]

MIN_SIZE, MAX_SIZE = 64, 1024
MAX_COUNT = 1_000_000

_OVERSAMPLING = 2  # canvas pixels per pixel of the picture, along each side; what _reduce and _enlarge convert


class _Canvas:
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
        """Coverage in [0, 1] of a shape given by its signed distance (negative inside), edges antialiased."""
        return np.clip(0.5 - distance * self.n, 0, 1)

    def noise(self, rng: np.random.Generator, sigma_y: float, sigma_x: float) -> Array:
        """White noise smoothed by a Gaussian of these standard deviations; mean 0, variance 1, periodic; n×n."""
        spectrum = scipy.fft.rfft2(rng.standard_normal((self.n, self.n), dtype=np.float32))
        frequency = np.fft.fftfreq(self.n, 1 / self.n).astype(np.float32)
        gain_y = np.exp(-2 * (np.pi * sigma_y * frequency) ** 2)
        gain_x = np.exp(-2 * (np.pi * sigma_x * frequency) ** 2)
        spectrum *= gain_y[:, None] * gain_x[: spectrum.shape[1]]
        return scipy.fft.irfft2(spectrum, (self.n, self.n)) / np.sqrt(np.mean(gain_y**2) * np.mean(gain_x**2))

    def blob(self, rng: np.random.Generator, y: float, x: float, radius: float) -> Array:
        """Signed distance (to first order) of an irregular patch around (y, x), at least two final pixels in radius."""
        radius = max(radius, 2 * _OVERSAMPLING / self.n)
        stretch = math.sqrt(rng.uniform(1, 2))
        along, across = _turn(self.y - y, self.x - x, rng.uniform(0, math.pi))
        along, across = along / stretch, across * stretch
        angle = np.arctan2(along, across)
        outline = np.ones_like(angle)
        for wave in range(2, 6):
            outline = outline + rng.uniform(-0.35, 0.35) / wave * np.cos(wave * angle + rng.uniform(0, 2 * math.pi))
        return np.hypot(along, across) - radius * outline

    def stroke(
        self, rng: np.random.Generator, y: float, x: float, angle: float, length: float, width: float, wobble: float
    ) -> Array:
        """Signed distance (to first order) of a line through (y, x) that wanders by about `wobble`.

        `angle` is against the y axis; the line is never thinner than 1.3 final pixels, so that its mask has no gaps.
        """
        along, across = _turn(self.y - y, self.x - x, angle)
        knots = np.linspace(-length / 2, length / 2, 9)
        path = np.cumsum(rng.standard_normal(9)) * wobble / 3
        path = path - path[4]
        slope = np.abs(np.diff(path)).max() / (knots[1] - knots[0])
        # Thinner towards both ends, as a slipping tool leaves it.
        half = width / 2 * np.clip(1.3 - (2 * along / length) ** 2, 0.3, 1)
        half = np.maximum(half, 1.3 / 2 * _OVERSAMPLING / self.n)
        aside = np.abs(across - np.interp(along, knots, path).astype(np.float32)) / math.hypot(1, slope) - half
        return np.maximum(aside, np.abs(along) - length / 2)


def _turn(y: Array, x: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates in axes turned by `angle` (radians): along the new first axis, and across it."""
    cos, sin = math.cos(angle), math.sin(angle)
    return y * cos + x * sin, x * cos - y * sin


def _mix(low: Array, high: Array, share: Array | float) -> Array:
    """Colours between `low` and `high`: (3,) or n×n×3 each, by `share` n×n or one number."""
    return low + (high - low) * np.asarray(share, np.float32)[..., None]


def _rgb(*channels: float) -> Array:
    return np.array(channels, np.float32)


def _soft_shadow(coverage: Array, dy: float, dx: float, blur: float) -> Array:
    """Shadow of a shape, moved by (dy, dx) and blurred; computed at half the resolution, as it has no detail."""
    small = _reduce(coverage)
    n = len(small)
    moved = scipy.ndimage.shift(small, (round(dy * n), round(dx * n)), order=0)
    return _enlarge(scipy.ndimage.gaussian_filter(moved, blur * n, truncate=2.5))


def _relief(height: Array, light: float, blur: float) -> Array:
    """Shading of the bevelled edges of a shape under light from direction `light`; about -1 to 1."""
    rounded = scipy.ndimage.gaussian_filter(height, blur * len(height), truncate=2.5)
    slope_y, slope_x = np.gradient(rounded)
    return (slope_y * math.sin(light) + slope_x * math.cos(light)) * (blur * len(height) * 2.5)


def _changed(clean: Array, altered: Array) -> Array:
    """Coverage of a defect of shape and of the shadow it moves: 1 where they show above the sensor noise, else 0."""
    difference = np.abs(altered - clean).max(axis=-1)
    return scipy.ndimage.binary_fill_holes(difference > 0.015).astype(np.float32)


def _reduce(picture: Array) -> Array:
    """From the canvas to the size of the picture: mean over blocks of 2×2 pixels."""
    return (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2]) / 4


def _enlarge(picture: Array) -> Array:
    """From the size of the picture to the canvas: each pixel becomes 2×2."""
    return picture.repeat(2, axis=0).repeat(2, axis=1)


class _Scene(abc.ABC):
    """One scene of a category, its natural variation drawn once and for all.

    Attributes:
        defects: by name, what draws it: from the scene, a generator and the clean picture n×n×3 to the altered
            picture n×n×3 and the coverage of the defect n×n.
    """

    defects: ClassVar[dict[str, Callable[[Any, np.random.Generator, Array], tuple[Array, Array]]]]

    @abc.abstractmethod
    def __init__(self, rng: np.random.Generator, canvas: _Canvas) -> None: ...

    @abc.abstractmethod
    def draw(self) -> Array:
        """The scene without defect, n×n×3 reflectance, float32, about 0 to 1."""


class _Weave(_Scene):
    """Plain-woven cloth: threads of slightly varying pitch, tone and direction."""

    def __init__(self, rng: np.random.Generator, canvas: _Canvas) -> None:
        self.canvas = canvas
        self.threads = rng.uniform(27, 31)
        angle = rng.normal(0, 0.03)
        down, right = _turn(canvas.y, canvas.x, angle)
        self.u = (right + rng.normal(0, 0.004) * canvas.noise(rng, 0.2, 0.2)) * self.threads + rng.uniform(0, 2)
        self.v = (down + rng.normal(0, 0.004) * canvas.noise(rng, 0.2, 0.2)) * self.threads + rng.uniform(0, 2)
        self.tones = rng.normal(1, 0.05, (2, 64)).astype(np.float32)
        self.fibres = 1 + 0.07 * canvas.noise(rng, 0.0015, 0.0015)
        self.warp_colour = _rgb(0.47, 0.56, 0.66) * rng.normal(1, 0.03)
        self.weft_colour = _rgb(0.60, 0.66, 0.70) * rng.normal(1, 0.03)

    def draw(self, gap: Array | None = None) -> Array:
        """`gap`: where warp threads are missing, n×n in [0, 1]."""
        column, row = np.floor(self.u).astype(np.intp), np.floor(self.v).astype(np.intp)
        warp_round = np.sqrt(np.clip(1 - ((self.u - column - 0.5) / 0.52) ** 2, 0, 1))
        weft_round = np.sqrt(np.clip(1 - ((self.v - row - 0.5) / 0.52) ** 2, 0, 1))
        # At the crossing of column i and row j the warp is on top where i + j is even.
        warp = warp_round * (0.68 + 0.32 * np.cos(np.pi * (self.v - 0.5 + column)))
        weft = weft_round * (0.68 - 0.32 * np.cos(np.pi * (self.u - 0.5 + row)))
        if gap is not None:
            warp = warp * (1 - gap)
            # With nothing to hold it up, the weft lies flat and lower.
            weft = weft + (0.52 * weft_round - weft) * gap
        shade = np.where(warp > weft, self.tones[0][column % 64], self.tones[1][row % 64])
        shade *= self.fibres * (0.3 + 0.7 * np.maximum(warp, weft))
        return _mix(self.weft_colour, self.warp_colour, warp > weft) * shade[..., None]

    def missing_thread(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        column = math.floor(rng.uniform(self.u.min() + 5, self.u.max() - 5))
        middle = rng.uniform(self.v.min() + 8, self.v.max() - 8)
        half = rng.uniform(2, 7)
        distance = np.maximum(np.abs(self.u - column - 0.5) - 0.5, np.abs(self.v - middle) - half) / self.threads
        gap = self.canvas.fill(distance)
        return self.draw(gap), gap

    def hole(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.12, 0.88, 2).tolist()
        distance = self.canvas.blob(rng, y, x, rng.uniform(0.012, 0.04))
        distance = distance + 0.003 * self.canvas.noise(rng, 0.004, 0.004)
        depth = rng.uniform(0.65, 0.95)
        return clean * (1 - depth), self.canvas.fill(distance)

    def stain(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.15, 0.85, 2).tolist()
        distance = self.canvas.blob(rng, y, x, rng.uniform(0.04, 0.09))
        tint = rng.choice([_rgb(0.75, 0.55, 0.3), _rgb(0.5, 0.5, 0.55), _rgb(0.45, 0.6, 0.8)])
        strength = rng.uniform(0.25, 0.8)
        return clean * (1 - strength * (1 - tint)), self.canvas.fill(distance)

    defects: ClassVar = {"missing_thread": missing_thread, "hole": hole, "stain": stain}


class _Grain(_Scene):
    """Planed wood: growth rings cut lengthwise, streaks and pores along the grain."""

    def __init__(self, rng: np.random.Generator, canvas: _Canvas) -> None:
        self.canvas = canvas
        bend = 0.05 * canvas.noise(rng, 0.45, 0.12) + 0.002 * canvas.noise(rng, 0.08, 0.01)
        across = canvas.x + bend + rng.normal(0, 0.03) * canvas.y
        phase = (across * rng.uniform(8, 11) + rng.uniform(0, 1)) % 1
        # Pale early wood darkens slowly into late wood, then breaks off at the end of the year.
        late_wood = phase**2 * (1 - np.clip((phase - 0.9) / 0.1, 0, 1)) * (1 + 0.35 * canvas.noise(rng, 0.3, 0.02))
        streaks = canvas.noise(rng, 0.08, 0.0015)
        pores = np.clip((canvas.noise(rng, 0.012, 0.0014) - rng.uniform(1.9, 2.6)) * 2, 0, 1)
        self.darkness = np.clip(0.2 + 0.55 * late_wood + 0.09 * streaks + 0.3 * pores, 0, 1.2)
        tone = rng.normal(1, 0.03)
        self.light_colour = _rgb(0.80, 0.63, 0.43) * tone
        self.dark_colour = _rgb(0.47, 0.29, 0.16) * tone * rng.normal(1, 0.04)

    def draw(self) -> Array:
        return _mix(self.light_colour, self.dark_colour, self.darkness)

    def scratch(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.2, 0.8, 2).tolist()
        length, width = rng.uniform(0.08, 0.35), rng.uniform(0.003, 0.009)
        # Mostly across the grain, where a scratch can be told from a streak.
        angle = math.pi / 2 + rng.normal(0, 0.5)
        distance = self.canvas.stroke(rng, y, x, angle, length, width, 0.006)
        colour = rng.choice([_rgb(0.93, 0.85, 0.70), _rgb(0.24, 0.16, 0.10)])
        return _mix(clean, colour, rng.uniform(0.12, 0.8)), self.canvas.fill(distance)

    def wormhole(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        distance = np.full_like(self.canvas.y, 1)
        for y, x in rng.uniform(0.15, 0.85, (rng.integers(1, 4), 2)).tolist():
            distance = np.minimum(distance, self.canvas.blob(rng, y, x, rng.uniform(0.005, 0.014)))
        bored = _mix(clean, _rgb(0.13, 0.08, 0.05), rng.uniform(0.4, 1))
        return bored, self.canvas.fill(distance)

    def glue(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.15, 0.85, 2).tolist()
        distance = self.canvas.blob(rng, y, x, rng.uniform(0.03, 0.075))
        coverage = self.canvas.fill(distance)
        film = _mix(clean, _rgb(0.90, 0.84, 0.70), rng.uniform(0.05, 0.55))
        gloss = rng.uniform(0.03, 0.25) * _relief(coverage, rng.uniform(0, 2 * math.pi), 0.008)
        return film * 0.96 + gloss[..., None], coverage

    defects: ClassVar = {"scratch": scratch, "wormhole": wormhole, "glue": glue}


class _Cog(_Scene):
    """A turned steel gear wheel on plain ground, lit from the side."""

    teeth, tooth = 14, 0.055
    bore, holes, hole_ring, hole = 0.075, 5, 0.185, 0.042

    def __init__(self, rng: np.random.Generator, canvas: _Canvas) -> None:
        self.canvas = canvas
        self.scale = rng.normal(1, 0.02)
        self.cy, self.cx = rng.normal(0.5, 0.02, 2).tolist()
        self.rotation = rng.uniform(0, 2 * math.pi)
        self.root = 0.28 * self.scale
        y, x = canvas.y - self.cy, canvas.x - self.cx
        self.radius = np.hypot(y, x)
        self.angle = (np.arctan2(y, x) - self.rotation) % (2 * math.pi)
        self.light = rng.normal(-2.2, 0.25)
        rings = np.cumsum(rng.normal(0, 1, 400))
        rings = rings - scipy.ndimage.gaussian_filter1d(rings, 8)
        lathe = np.interp(self.radius, np.linspace(0, 0.45, 400), rings).astype(np.float32)
        sheen = np.cos(2 * (self.angle + self.rotation - self.light))
        self.steel = 0.55 + 0.012 * lathe + 0.07 * sheen + 0.01 * canvas.noise(rng, 0.002, 0.002)
        self.steel *= rng.normal(1, 0.03)
        self.ground = 0.80 * rng.normal(1, 0.03) + 0.012 * canvas.noise(rng, 0.05, 0.05)

    def outer_edge(self, heights: Array) -> Array:
        """Signed distance to the toothed outline; `heights`: of each tooth, (teeth,), 1 is a whole one."""
        turn = self.angle * (self.teeth / (2 * math.pi))
        height = self.tooth * self.scale * heights[np.floor(turn).astype(np.intp) % self.teeth].astype(np.float32)
        wave = 0.5 - 0.85 * np.cos(2 * math.pi * turn)
        flank = (wave > 0) & (wave < 1)
        steepness = height * 0.85 * self.teeth / self.root * np.abs(np.sin(2 * math.pi * turn)) * flank
        return (self.radius - self.root - height * np.clip(wave, 0, 1)) / np.hypot(1, steepness)

    def body(self, heights: Array) -> Array:
        """Coverage of the whole wheel, n×n."""
        sector = 2 * math.pi / self.holes
        folded = self.angle % sector - sector / 2
        ring = self.hole_ring * self.scale
        to_hole = np.sqrt(np.maximum(self.radius**2 + ring**2 - 2 * self.radius * ring * np.cos(folded), 0))
        distance = np.maximum(self.outer_edge(heights), self.bore * self.scale - self.radius)
        return self.canvas.fill(np.maximum(distance, self.hole * self.scale - to_hole))

    def draw(self, heights: Array | None = None) -> Array:
        """`heights`: of each tooth, (teeth,); None for a whole wheel."""
        body = self.body(np.ones(self.teeth) if heights is None else heights)
        shadow = _soft_shadow(body, -0.01 * math.sin(self.light), -0.01 * math.cos(self.light), 0.008)
        ground = _rgb(0.98, 1.0, 1.02) * (self.ground * (1 - 0.5 * shadow))[..., None]
        steel = _rgb(0.97, 1.0, 1.03) * (self.steel - 0.35 * _relief(body, self.light, 0.004))[..., None]
        return _mix(ground, steel, body)

    def broken_tooth(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        which, left = int(rng.integers(self.teeth)), rng.uniform(0, 0.6)
        heights = np.ones(self.teeth)
        heights[which] = left
        altered = self.draw(heights)
        return altered, _changed(clean, altered)

    def crack(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        # Between two of the round holes, from the bore outwards.
        which = int(rng.integers(self.holes))
        angle = self.rotation + which * 2 * math.pi / self.holes + rng.normal(0, 0.08)
        middle = rng.uniform(0.12, 0.22) * self.scale
        y, x = self.cy + middle * math.sin(angle), self.cx + middle * math.cos(angle)
        length, width = rng.uniform(0.07, 0.15), rng.uniform(0.005, 0.009)
        distance = self.canvas.stroke(rng, y, x, math.pi / 2 - angle, length, width, 0.012)
        return clean * rng.uniform(0.25, 0.6), self.canvas.fill(distance) * self.body(np.ones(self.teeth))

    def rust(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        # Centred on the metal between two of the round holes.
        angle = self.rotation + int(rng.integers(self.holes)) * 2 * math.pi / self.holes + rng.uniform(-0.35, 0.35)
        middle = rng.uniform(0.1, 0.26) * self.scale
        y, x = self.cy + middle * math.sin(angle), self.cx + middle * math.cos(angle)
        distance = self.canvas.blob(rng, y, x, rng.uniform(0.025, 0.055))
        distance = distance + 0.006 * self.canvas.noise(rng, 0.01, 0.01)
        mottled = np.clip(rng.uniform(0.35, 0.85) + 0.12 * self.canvas.noise(rng, 0.004, 0.004), 0.15, 1)
        altered = _mix(clean, _rgb(0.42, 0.24, 0.12), mottled)
        return altered, self.canvas.fill(distance) * self.body(np.ones(self.teeth))

    defects: ClassVar = {"broken_tooth": broken_tooth, "crack": crack, "rust": rust}


class _Cap(_Scene):
    """A printed crown cap lying on pebbles."""

    crimps, star_points = 21, 5

    def __init__(self, rng: np.random.Generator, canvas: _Canvas) -> None:
        self.canvas = canvas
        self.rim = 0.29 * rng.normal(1, 0.02)
        self.cy, self.cx = rng.uniform(0.43, 0.57, 2).tolist()
        self.rotation = rng.uniform(0, 2 * math.pi)
        self.y, self.x = canvas.y - self.cy, canvas.x - self.cx
        self.radius = np.hypot(self.y, self.x)
        self.angle = np.arctan2(self.y, self.x) - self.rotation
        self.light = rng.normal(-2.2, 0.3)
        self.paint = _rgb(0.70, 0.13, 0.12) * rng.normal(1, 0.04, 3).astype(np.float32)
        self.ink = _rgb(0.93, 0.90, 0.82) * rng.normal(1, 0.02)
        self.grime = 1 + 0.025 * canvas.noise(rng, 0.03, 0.03)
        self.pebbles = self.draw_pebbles(rng)
        self.whole = canvas.fill(self.radius - self.rim - 0.007 * np.cos(self.crimps * self.angle))

    def draw_pebbles(self, rng: np.random.Generator) -> Array:
        """Rounded stones around the points of a jittered lattice (Worley 1996: cells by nearest point), n×n×3.

        Drawn at half the resolution: the ground lies below the plane of focus.
        """
        lattice, scale = 24, rng.uniform(15, 18)
        points = (np.indices((lattice, lattice)) + rng.uniform(0.1, 0.9, (2, lattice, lattice))).astype(np.float32)
        colours = _mix(_rgb(0.40, 0.38, 0.36), _rgb(0.62, 0.59, 0.54), rng.uniform(0, 1, (lattice, lattice)))
        y, x = _reduce(self.canvas.y) * scale + 2, _reduce(self.canvas.x) * scale + 2
        row, column = y.astype(np.intp), x.astype(np.intp)
        nearest = np.full_like(y, 9)
        second = np.full_like(y, 9)
        stone = np.zeros((*y.shape, 2), np.intp)
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                dy = points[0, row + i, column + j] - y
                dx = points[1, row + i, column + j] - x
                away = np.hypot(dy, dx)
                closer = away < nearest
                second = np.where(closer, nearest, np.minimum(second, away))
                nearest = np.where(closer, away, nearest)
                stone[closer] = np.stack([row + i, column + j], axis=-1)[closer]
        dome = np.sqrt(np.clip((second - nearest) * 1.6, 0, 1))
        return _enlarge(colours[stone[..., 0], stone[..., 1]] * (0.45 + 0.55 * dome)[..., None])

    def print_coverage(self) -> Array:
        """Coverage of the printed ring and star, n×n."""
        ring = np.abs(self.radius - 0.68 * self.rim) - 0.03 * self.rim
        sector = 2 * math.pi / self.star_points
        folded = np.abs(self.angle % sector - sector / 2)
        # One edge of the star: the line from an inner corner (angle 0) to a tip (half a sector on).
        tip, notch = 0.5 * self.rim, 0.24 * self.rim
        ty, tx = tip * math.sin(sector / 2), tip * math.cos(sector / 2)
        py, px = self.radius * np.sin(folded), self.radius * np.cos(folded)
        star = ((px - notch) * ty - py * (tx - notch)) / math.hypot(ty, tx - notch)
        return self.canvas.fill(np.minimum(ring, star))

    def draw(self, body: Array | None = None, printed: Array | None = None) -> Array:
        """`body`, `printed`: coverage n×n of the metal and of the print on it; None for a whole cap."""
        body = self.whole if body is None else body
        printed = self.print_coverage() if printed is None else printed
        dy, dx = -math.sin(self.light), -math.cos(self.light)
        shadow = _soft_shadow(body, 0.02 * dy, 0.02 * dx, 0.015)
        ground = self.pebbles * (1 - 0.6 * shadow)[..., None]
        skirt = np.clip((self.radius / self.rim - 0.84) / 0.16, 0, 1)
        towards_light = -(self.y * dy + self.x * dx) / self.rim
        shade = self.grime * (0.9 + 0.12 * towards_light)
        shade *= 1 - skirt * (0.35 - 0.3 * np.cos(self.crimps * self.angle) - 0.25 * towards_light)
        gloss = 0.25 * np.exp(-((self.y + 0.1 * dy) ** 2 + (self.x + 0.1 * dx) ** 2) / 0.006)
        metal = _mix(self.paint, self.ink, printed) * shade[..., None] + gloss[..., None]
        return _mix(ground, metal, body)

    def dented_rim(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        direction, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.025, 0.06)
        chord = self.y * math.sin(direction) + self.x * math.cos(direction) - (self.rim - depth)
        altered = self.draw(body=self.whole * self.canvas.fill(chord))
        return altered, _changed(clean, altered)

    def scratch(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = self.cy + rng.uniform(-0.12, 0.12), self.cx + rng.uniform(-0.12, 0.12)
        length, width = rng.uniform(0.1, 0.24), rng.uniform(0.005, 0.01)
        distance = self.canvas.stroke(rng, y, x, rng.uniform(0, math.pi), length, width, 0.008)
        bare = _rgb(0.72, 0.72, 0.74) if rng.uniform() < 0.5 else _rgb(0.2, 0.14, 0.13)
        altered = _mix(clean, bare, rng.uniform(0.5, 0.95))
        return altered, self.canvas.fill(distance) * self.whole

    def missing_print(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        printed = self.print_coverage()
        angle = rng.uniform(0, 2 * math.pi)
        middle = float(rng.choice([0.15, 0.68])) * self.rim
        y, x = self.cy + middle * math.sin(angle), self.cx + middle * math.cos(angle)
        worn = self.canvas.fill(self.canvas.blob(rng, y, x, rng.uniform(0.035, 0.07)))
        return self.draw(printed=printed * rng.uniform(0, 0.4)), worn * (printed > 0)

    defects: ClassVar = {"dented_rim": dented_rim, "scratch": scratch, "missing_print": missing_print}


_SCENES: dict[str, type[_Scene]] = {"weave": _Weave, "grain": _Grain, "cog": _Cog, "cap": _Cap}

DEFECTS: dict[str, tuple[str, ...]] = {category: tuple(scene.defects) for category, scene in _SCENES.items()}
"""Types of defect of each category that can be drawn."""


def draw_sample(
    category: str, index: int, defect: str | None = None, seed: int = 0, size: int = 256
) -> tuple[Array, Array]:
    """Draw one picture and the mask of its defect.

    The same (category, index, seed, size) with and without a defect gives the same scene under the same light: the
    pictures are equal but for the mask and its antialiased edge, one pixel wide.

    Args:
        category: a key of `DEFECTS`.
        index: which scene of the category; each is different.
        defect: one of `DEFECTS[category]`, or None for a normal picture.
        seed: of the whole corpus, 0 or more.
        size: pixels per side, from 64 to 1024.

    Returns:
        image: size×size×3 uint8, RGB.
        mask: size×size bool, true where the defect covers more than half of the pixel; all false without a defect.

    Raises:
        OptionError: no such category or defect, or a number out of range.
    """
    _check_name("category", category, tuple(_SCENES))
    if defect is not None:
        _check_name(f"defect of {category}", defect, DEFECTS[category])
    _check_range("index", index, 0, None)
    _check_range("seed", seed, 0, None)
    _check_range("size", size, MIN_SIZE, MAX_SIZE)

    scene_rng = _generator(seed, category, index, "scene")
    scene = _SCENES[category](scene_rng, _Canvas(_OVERSAMPLING * size))
    picture = scene.draw()
    mask = np.zeros((size, size), bool)
    if defect is not None:
        altered, coverage = scene.defects[defect](scene, _generator(seed, category, index, defect), picture)
        mask = _reduce(coverage) > 0.5
        # Slivers that fill no pixel by half are left out, or the picture would change away from the mask.
        kept = scipy.ndimage.binary_dilation(mask, np.ones((3, 3), bool))
        picture = _mix(picture, altered, coverage * _enlarge(kept))
    exposed = _expose(_reduce(picture), _generator(seed, category, index, "camera"))
    return (np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def draw_corpus(
    root: str | Path,
    categories: Sequence[str] = tuple(_SCENES),
    train: int = 40,
    good: int = 12,
    per_defect: int = 8,
    size: int = 256,
    seed: int = 0,
) -> None:
    """Draw a corpus in the MVTec AD layout; drawn again with the same arguments, it has the same bytes.

    Writes `<root>/<category>/train/good/000.png`, `test/good/000.png`, `test/<defect>/000.png` and
    `ground_truth/<defect>/000_mask.png` (0 and 255) for every defect of `DEFECTS[category]`.

    Args:
        root: folder or URI.
        categories: which ones.
        train: normal pictures to train on, per category.
        good: normal pictures to test on, per category.
        per_defect: defective pictures to test on, per category and type of defect.
        size: pixels per side, from 64 to 1024.
        seed: picks the corpus; 0 or more.

    Raises:
        OptionError: no such category, or a number out of range.
        DataError: a category folder holds files that would not belong to the corpus.
    """
    for category in categories:
        _check_name("category", category, tuple(_SCENES))
    for name, count in (("train", train), ("good", good), ("per_defect", per_defect)):
        _check_range(name, count, 0, MAX_COUNT)
    _check_range("size", size, MIN_SIZE, MAX_SIZE)
    _check_range("seed", seed, 0, None)

    for category in categories:
        folder = files.join(root, category)
        # Each kind of picture has its own range of indices, so that no scene comes twice.
        planned: list[tuple[str, str | None, int, str | None]] = []
        planned += [(f"train/good/{i:03d}.png", None, i, None) for i in range(train)]
        planned += [(f"test/good/{i:03d}.png", None, MAX_COUNT + i, None) for i in range(good)]
        for part, defect in enumerate(DEFECTS[category], start=2):
            planned += [
                (
                    f"test/{defect}/{i:03d}.png",
                    f"ground_truth/{defect}/{i:03d}_mask.png",
                    part * MAX_COUNT + i,
                    defect,
                )
                for i in range(per_defect)
            ]
        _check_only(folder, {path for image, mask, *_ in planned for path in (image, mask) if path})
        for image_path, mask_path, index, kind in planned:
            image, mask = draw_sample(category, index, kind, seed, size)
            files.write_bytes(files.join(folder, image_path), _png(image))
            if mask_path:
                files.write_bytes(files.join(folder, mask_path), _png(mask.astype(np.uint8) * 255))


def _expose(picture: Array, rng: np.random.Generator) -> Array:
    """Light, colour cast and sensor noise on a reduced scene, n×n×3."""
    n = len(picture)
    centres = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    slope_y, slope_x = rng.normal(0, 0.06, 2)
    light = rng.normal(1, 0.03) * (1 + slope_y * centres[:, None] + slope_x * centres)
    light -= rng.uniform(0.05, 0.2) * (centres[:, None] ** 2 + centres**2)
    cast = rng.normal(1, 0.01, 3).astype(np.float32)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0.008, 0.016)
    return picture * light[..., None] * cast + noise


def _generator(seed: int, category: str, index: int, part: str) -> np.random.Generator:
    """A generator of its own for each part of each scene."""
    words = (seed, zlib.crc32(category.encode()), index, zlib.crc32(part.encode()))
    return np.random.default_rng(np.random.SeedSequence(words))


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _check_only(folder: str, planned: set[str]) -> None:
    fs, path = files.resolve(folder)
    fs.invalidate_cache()
    for found in sorted(fs.find(path)):
        if found.removeprefix(path).lstrip("/") not in planned:
            raise DataError(f"{found} does not belong to the corpus to be drawn; remove it or draw into another folder")


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise OptionError(f"unknown {what} {name!r}; did you mean {nearest!r}? There are {', '.join(known)}")


def _check_range(what: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        wanted = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise OptionError(f"{what} is {value}; give a number {wanted}")
