"""The four scenes, their natural variation and their defects."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import scipy.ndimage

from unianom.data.drawing.canvas import (
    Array,
    Canvas,
    changed,
    enlarge,
    mix,
    reduce,
    relief,
    rgb,
    soft_shadow,
    turn,
)


class Scene(abc.ABC):
    """One scene of a category, its natural variation drawn once and for all.

    Attributes:
        defects: by name, what draws it: from the scene, a generator and the clean picture n×n×3 to the altered
            picture n×n×3 and the coverage of the defect n×n.
    """

    defects: ClassVar[dict[str, Callable[[Any, np.random.Generator, Array], tuple[Array, Array]]]]

    @abc.abstractmethod
    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None: ...

    @abc.abstractmethod
    def draw(self) -> Array:
        """Return the scene without defect, n×n×3 reflectance, float32, about 0 to 1."""


class Weave(Scene):
    """Plain-woven cloth: threads of slightly varying pitch, tone and direction."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
        self.canvas = canvas
        self.threads = rng.uniform(27, 31)
        angle = rng.normal(0, 0.03)
        down, right = turn(canvas.y, canvas.x, angle)
        self.u = (right + rng.normal(0, 0.004) * canvas.noise(rng, 0.2, 0.2)) * self.threads + rng.uniform(0, 2)
        self.v = (down + rng.normal(0, 0.004) * canvas.noise(rng, 0.2, 0.2)) * self.threads + rng.uniform(0, 2)
        self.tones = rng.normal(1, 0.05, (2, 64)).astype(np.float32)
        self.fibres = 1 + 0.07 * canvas.noise(rng, 0.0015, 0.0015)
        self.warp_colour = rgb(0.47, 0.56, 0.66) * rng.normal(1, 0.03)
        self.weft_colour = rgb(0.60, 0.66, 0.70) * rng.normal(1, 0.03)

    def draw(self, gap: Array | None = None) -> Array:
        """Draw the cloth; `gap`, n×n in [0, 1], is where warp threads are missing."""
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
        return mix(self.weft_colour, self.warp_colour, warp > weft) * shade[..., None]

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
        tint = rng.choice([rgb(0.75, 0.55, 0.3), rgb(0.5, 0.5, 0.55), rgb(0.45, 0.6, 0.8)])
        strength = rng.uniform(0.25, 0.8)
        return clean * (1 - strength * (1 - tint)), self.canvas.fill(distance)

    defects: ClassVar = {"missing_thread": missing_thread, "hole": hole, "stain": stain}


class Grain(Scene):
    """Planed wood: growth rings cut lengthwise, streaks and pores along the grain."""

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
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
        self.light_colour = rgb(0.80, 0.63, 0.43) * tone
        self.dark_colour = rgb(0.47, 0.29, 0.16) * tone * rng.normal(1, 0.04)

    def draw(self) -> Array:
        return mix(self.light_colour, self.dark_colour, self.darkness)

    def scratch(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.2, 0.8, 2).tolist()
        length, width = rng.uniform(0.08, 0.35), rng.uniform(0.003, 0.009)
        # Mostly across the grain, where a scratch can be told from a streak.
        angle = math.pi / 2 + rng.normal(0, 0.5)
        distance = self.canvas.stroke(rng, y, x, angle, length, width, 0.006)
        colour = rng.choice([rgb(0.93, 0.85, 0.70), rgb(0.24, 0.16, 0.10)])
        return mix(clean, colour, rng.uniform(0.12, 0.8)), self.canvas.fill(distance)

    def wormhole(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        distance = np.full_like(self.canvas.y, 1)
        for y, x in rng.uniform(0.15, 0.85, (rng.integers(1, 4), 2)).tolist():
            distance = np.minimum(distance, self.canvas.blob(rng, y, x, rng.uniform(0.005, 0.014)))
        bored = mix(clean, rgb(0.13, 0.08, 0.05), rng.uniform(0.4, 1))
        return bored, self.canvas.fill(distance)

    def glue(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = rng.uniform(0.15, 0.85, 2).tolist()
        distance = self.canvas.blob(rng, y, x, rng.uniform(0.03, 0.075))
        coverage = self.canvas.fill(distance)
        film = mix(clean, rgb(0.90, 0.84, 0.70), rng.uniform(0.05, 0.55))
        gloss = rng.uniform(0.03, 0.25) * relief(coverage, rng.uniform(0, 2 * math.pi), 0.008)
        return film * 0.96 + gloss[..., None], coverage

    defects: ClassVar = {"scratch": scratch, "wormhole": wormhole, "glue": glue}


class Cog(Scene):
    """A turned steel gear wheel on plain ground, lit from the side."""

    teeth, tooth = 14, 0.055
    bore, holes, hole_ring, hole = 0.075, 5, 0.185, 0.042

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
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
        """Return the signed distance to the toothed outline; `heights`: of each tooth, (teeth,), 1 is a whole one."""
        position = self.angle * (self.teeth / (2 * math.pi))
        height = self.tooth * self.scale * heights[np.floor(position).astype(np.intp) % self.teeth].astype(np.float32)
        wave = 0.5 - 0.85 * np.cos(2 * math.pi * position)
        flank = (wave > 0) & (wave < 1)
        steepness = height * 0.85 * self.teeth / self.root * np.abs(np.sin(2 * math.pi * position)) * flank
        return (self.radius - self.root - height * np.clip(wave, 0, 1)) / np.hypot(1, steepness)

    def body(self, heights: Array) -> Array:
        """Return the coverage of the whole wheel, n×n."""
        sector = 2 * math.pi / self.holes
        folded = self.angle % sector - sector / 2
        ring = self.hole_ring * self.scale
        to_hole = np.sqrt(np.maximum(self.radius**2 + ring**2 - 2 * self.radius * ring * np.cos(folded), 0))
        distance = np.maximum(self.outer_edge(heights), self.bore * self.scale - self.radius)
        return self.canvas.fill(np.maximum(distance, self.hole * self.scale - to_hole))

    def draw(self, heights: Array | None = None) -> Array:
        """Draw the wheel; `heights`, (teeth,), are those of its teeth, None for a whole wheel."""
        body = self.body(np.ones(self.teeth) if heights is None else heights)
        shadow = soft_shadow(body, -0.01 * math.sin(self.light), -0.01 * math.cos(self.light), 0.008)
        ground = rgb(0.98, 1.0, 1.02) * (self.ground * (1 - 0.5 * shadow))[..., None]
        steel = rgb(0.97, 1.0, 1.03) * (self.steel - 0.35 * relief(body, self.light, 0.004))[..., None]
        return mix(ground, steel, body)

    def broken_tooth(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        which, left = int(rng.integers(self.teeth)), rng.uniform(0, 0.6)
        heights = np.ones(self.teeth)
        heights[which] = left
        altered = self.draw(heights)
        return altered, changed(clean, altered)

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
        altered = mix(clean, rgb(0.42, 0.24, 0.12), mottled)
        return altered, self.canvas.fill(distance) * self.body(np.ones(self.teeth))

    defects: ClassVar = {"broken_tooth": broken_tooth, "crack": crack, "rust": rust}


class Cap(Scene):
    """A printed crown cap lying on pebbles."""

    crimps, star_points = 21, 5

    def __init__(self, rng: np.random.Generator, canvas: Canvas) -> None:
        self.canvas = canvas
        self.rim = 0.29 * rng.normal(1, 0.02)
        self.cy, self.cx = rng.uniform(0.43, 0.57, 2).tolist()
        self.rotation = rng.uniform(0, 2 * math.pi)
        self.y, self.x = canvas.y - self.cy, canvas.x - self.cx
        self.radius = np.hypot(self.y, self.x)
        self.angle = np.arctan2(self.y, self.x) - self.rotation
        self.light = rng.normal(-2.2, 0.3)
        self.paint = rgb(0.70, 0.13, 0.12) * rng.normal(1, 0.04, 3).astype(np.float32)
        self.ink = rgb(0.93, 0.90, 0.82) * rng.normal(1, 0.02)
        self.grime = 1 + 0.025 * canvas.noise(rng, 0.03, 0.03)
        self.pebbles = self.draw_pebbles(rng)
        self.whole = canvas.fill(self.radius - self.rim - 0.007 * np.cos(self.crimps * self.angle))

    def draw_pebbles(self, rng: np.random.Generator) -> Array:
        """Return rounded stones around the points of a jittered lattice (Worley 1996: cells by nearest point), n×n×3.

        Drawn at half the resolution: the ground lies below the plane of focus.
        """
        lattice, scale = 24, rng.uniform(15, 18)
        points = (np.indices((lattice, lattice)) + rng.uniform(0.1, 0.9, (2, lattice, lattice))).astype(np.float32)
        colours = mix(rgb(0.40, 0.38, 0.36), rgb(0.62, 0.59, 0.54), rng.uniform(0, 1, (lattice, lattice)))
        y, x = reduce(self.canvas.y) * scale + 2, reduce(self.canvas.x) * scale + 2
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
        return enlarge(colours[stone[..., 0], stone[..., 1]] * (0.45 + 0.55 * dome)[..., None])

    def print_coverage(self) -> Array:
        """Return the coverage of the printed ring and star, n×n."""
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
        """Draw the cap; `body`, `printed`: coverage n×n of the metal and of the print on it, None for a whole cap."""
        body = self.whole if body is None else body
        printed = self.print_coverage() if printed is None else printed
        dy, dx = -math.sin(self.light), -math.cos(self.light)
        shadow = soft_shadow(body, 0.02 * dy, 0.02 * dx, 0.015)
        ground = self.pebbles * (1 - 0.6 * shadow)[..., None]
        skirt = np.clip((self.radius / self.rim - 0.84) / 0.16, 0, 1)
        towards_light = -(self.y * dy + self.x * dx) / self.rim
        shade = self.grime * (0.9 + 0.12 * towards_light)
        shade *= 1 - skirt * (0.35 - 0.3 * np.cos(self.crimps * self.angle) - 0.25 * towards_light)
        gloss = 0.25 * np.exp(-((self.y + 0.1 * dy) ** 2 + (self.x + 0.1 * dx) ** 2) / 0.006)
        metal = mix(self.paint, self.ink, printed) * shade[..., None] + gloss[..., None]
        return mix(ground, metal, body)

    def dented_rim(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        direction, depth = rng.uniform(0, 2 * math.pi), rng.uniform(0.025, 0.06)
        chord = self.y * math.sin(direction) + self.x * math.cos(direction) - (self.rim - depth)
        altered = self.draw(body=self.whole * self.canvas.fill(chord))
        return altered, changed(clean, altered)

    def scratch(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        y, x = self.cy + rng.uniform(-0.12, 0.12), self.cx + rng.uniform(-0.12, 0.12)
        length, width = rng.uniform(0.1, 0.24), rng.uniform(0.005, 0.01)
        distance = self.canvas.stroke(rng, y, x, rng.uniform(0, math.pi), length, width, 0.008)
        bare = rgb(0.72, 0.72, 0.74) if rng.uniform() < 0.5 else rgb(0.2, 0.14, 0.13)
        altered = mix(clean, bare, rng.uniform(0.5, 0.95))
        return altered, self.canvas.fill(distance) * self.whole

    def missing_print(self, rng: np.random.Generator, clean: Array) -> tuple[Array, Array]:
        printed = self.print_coverage()
        angle = rng.uniform(0, 2 * math.pi)
        middle = float(rng.choice([0.15, 0.68])) * self.rim
        y, x = self.cy + middle * math.sin(angle), self.cx + middle * math.cos(angle)
        worn = self.canvas.fill(self.canvas.blob(rng, y, x, rng.uniform(0.035, 0.07)))
        return self.draw(printed=printed * rng.uniform(0, 0.4)), worn * (printed > 0)

    defects: ClassVar = {"dented_rim": dented_rim, "scratch": scratch, "missing_print": missing_print}


SCENES: dict[str, type[Scene]] = {"weave": Weave, "grain": Grain, "cog": Cog, "cap": Cap}

DEFECTS: dict[str, tuple[str, ...]] = {category: tuple(scene.defects) for category, scene in SCENES.items()}
"""Types of defect of each category that can be drawn."""
