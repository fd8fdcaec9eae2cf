"""Synthetic anomalies for training: pseudo-anomalous copies of normal images by CutPaste or DRAEM.

CutPaste (Li et al., CVPR 2021) pastes a piece of the image elsewhere, as a patch or as a thin scar. DRAEM (Zavrtanik
et al., ICCV 2021) blends a texture into blobs of Perlin noise. OneNIP (Gao, ECCV 2024) mixes both, with the parameters
found here. All randomness of a copy comes from the one generator it is made with.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from unianom.configs.synthesis import SynthesisConfig
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.layouts.source import Source
from unianom.errors import DataError, ImageError, OptionError

MIN_SIDE = 32
"""Pixels of the smallest image: it holds the finest Perlin grid, and any scar."""

_BLEND_MOST = 0.8  # largest share of the image that still shows through a texture
_NOISE_THRESHOLD = 0.5
_NOISE_TURN = 5  # degrees
_TILES = 8  # per side, of a self-texture

# One for all sources, so that a source can be pickled; it is never held while a file is read.
_cache_lock = threading.Lock()


@dataclass(frozen=True)
class Synthetic:
    """A pseudo-anomalous copy.

    Attributes:
        image: S×S×3 uint8 RGB; equal to the original wherever `mask` is false.
        mask: S×S bool, true where the copy was changed; all false if a Perlin mask came out empty.
        source: what was made; "draem_self" stands for textures from the corpus' own images.
    """

    image: np.ndarray
    mask: np.ndarray
    source: Literal["cutpaste_patch", "cutpaste_scar", "draem_texture", "draem_self", "shade"]


class TextureSource:
    """The texture images in and below a folder, decoded when they are first drawn. Threads may share one.

    Args:
        folder: path or URI.
        size: S, the side that textures are stretched to, whatever their aspect.
        limits: what a texture may cost.
        cache_bytes: memory for decoded textures; those used last are kept, one at least.

    Raises:
        DataError: there is no such folder, or no image in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        size: int,
        limits: ImageLimits | None = None,
        cache_bytes: int = 256 << 20,
    ) -> None:
        self._source = Source.open(folder)
        self._paths = [image.path for image in self._source.images_below("")]
        self._policy = InputPolicy(resize="stretch", size=size, crop=None)
        self._limits = limits
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_most = max(1, cache_bytes // (3 * size * size))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one texture, S×S×3 uint8 RGB, by its place among the sorted paths; it must not be written to.

        Raises:
            DataError: the file is not there any more or is no usable image.
        """
        with _cache_lock:
            pixels = self._cache.get(index)
            if pixels is not None:
                self._cache.move_to_end(index)
        if pixels is None:
            pixels = self._decode(index)
            with _cache_lock:
                self._cache[index] = pixels
                if len(self._cache) > self._cached_most:
                    self._cache.popitem(last=False)
        return pixels

    def _decode(self, index: int) -> np.ndarray:
        path = self._paths[index]
        try:
            return decode_prepared(self._source.read(path), self._policy, self._limits)
        except ImageError as error:
            raise DataError(
                f"cannot use the texture {self._source.uri(path)}: {error}; remove or replace the file"
            ) from error


class Synthesiser:
    """Makes pseudo-anomalous copies of normal images.

    Args:
        config: how.
        textures: those of `config.textures`, of the images' size; None if and only if that is None.

    Raises:
        OptionError: only one of `config.textures` and `textures` is given.
    """

    def __init__(self, config: SynthesisConfig, textures: TextureSource | None = None) -> None:
        if (config.textures is None) != (textures is None):
            raise OptionError("synthesis.textures and the opened texture folder must be given together, or neither")
        self._config = config
        self._textures = textures

    def __call__(self, image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Synthetic:
        """Make one copy.

        Args:
            image: S×S×3 uint8 RGB, normal; it is not written to.
            rng: decides everything.
            other: S×S×3 uint8 RGB, any normal image, the same one too; becomes the texture if there are no others.

        Raises:
            OptionError: S is below `MIN_SIDE`.
            DataError: the drawn texture cannot be read.
        """
        if len(image) < MIN_SIDE:
            raise OptionError(
                f"synthetic anomalies need images of at least {MIN_SIDE}×{MIN_SIDE} pixels, these have {len(image)}; "
                f"raise input.size and input.crop"
            )
        if rng.random() < self._config.cutpaste_share:
            return cutpaste_patch(image, rng) if rng.random() < 0.5 else cutpaste_scar(image, rng)
        return self._draem(image, rng, other)

    def _draem(self, image: np.ndarray, rng: np.random.Generator, other: np.ndarray) -> Synthetic:
        mask = perlin_mask(len(image), rng)
        for _ in range(self._config.empty_retries):
            if mask.any():
                break
            mask = perlin_mask(len(image), rng)
        copy = image.copy()
        if mask.any():
            if self._textures is None:
                texture = shuffle_tiles(augment(other, rng), rng)
            else:
                texture = augment(self._textures[int(rng.integers(len(self._textures)))], rng)
            transparency = np.float32(_BLEND_MOST * rng.random())
            blended = (1 - transparency) * texture[mask] + transparency * image[mask]
            copy[mask] = np.rint(blended).astype(np.uint8)
        return Synthetic(copy, mask, "draem_self" if self._textures is None else "draem_texture")


# CutPaste


def cutpaste_patch(image: np.ndarray, rng: np.random.Generator) -> Synthetic:
    """Paste a colour-jittered rectangle of the image elsewhere: 2–15 % of its area, aspect 0.3–3.3.

    The two places are independent, so that a patch may come to lie where it was.

    Args:
        image: S×S×3 uint8 RGB.
        rng: decides everything.
    """
    side = len(image)
    area = rng.uniform(0.02, 0.15) * side * side
    aspect = rng.uniform(0.3, 1) if rng.random() < 0.5 else rng.uniform(1, 3.3)
    height, width = int(math.sqrt(area / aspect)), int(math.sqrt(area * aspect))
    patch = colour_jitter(_cut(image, height, width, rng), rng)
    top, left = _place(side, height, width, rng)
    copy, mask = image.copy(), np.zeros((side, side), bool)
    copy[top : top + height, left : left + width] = np.asarray(patch)
    mask[top : top + height, left : left + width] = True
    return Synthetic(copy, mask, "cutpaste_patch")


def cutpaste_scar(image: np.ndarray, rng: np.random.Generator) -> Synthetic:
    """Paste a colour-jittered strip of the image, 2–16 wide and 10–25 high, elsewhere, turned by up to 45°.

    The place is drawn for the strip before it is turned; what then reaches over the border is cut off. Its edges are
    antialiased; the mask holds every pixel that the strip touches.

    Args:
        image: S×S×3 uint8 RGB, S at least 25.
        rng: decides everything.
    """
    side = len(image)
    width, height = int(rng.integers(2, 17)), int(rng.integers(10, 26))
    strip = colour_jitter(_cut(image, height, width, rng), rng).convert("RGBA")
    # Pillow antialiases a turned image only against what surrounds it, so it gets a transparent rim.
    strip = ImageOps.expand(strip, border=1, fill=(0, 0, 0, 0))
    strip = strip.rotate(rng.uniform(-45, 45), Image.Resampling.BILINEAR, expand=True)
    top, left = _place(side, height, width, rng)
    corner = left - 1, top - 1
    canvas, cover = Image.fromarray(image), Image.new("L", (side, side))
    alpha = strip.getchannel("A")
    canvas.paste(strip.convert("RGB"), corner, alpha)
    cover.paste(alpha, corner)
    return Synthetic(np.array(canvas), np.asarray(cover) > 0, "cutpaste_scar")


def shade(image: np.ndarray, rng: np.random.Generator) -> Synthetic:
    """Darken or brighten blobs of Perlin noise by 10 to 30 % of the full range: faint defects that keep the texture.
    Of no paper; it makes validation harder where pasted pieces are found too easily.

    Args:
        image: S×S×3 uint8 RGB.
        rng: decides everything.
    """
    mask = perlin_mask(len(image), rng)
    amount = rng.uniform(0.1, 0.3) * 255 * (1 if rng.random() < 0.5 else -1)
    copy = image.copy()
    copy[mask] = np.rint(np.clip(image[mask] + amount, 0, 255)).astype(np.uint8)
    return Synthetic(copy, mask & (copy != image).any(2), "shade")


def _place(side: int, height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return the top and left of a rectangle inside the image, uniform."""
    return int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))


def _cut(image: np.ndarray, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    top, left = _place(len(image), height, width, rng)
    return Image.fromarray(image[top : top + height, left : left + width])


def colour_jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by up to 40 % and hue by up to a tenth of the circle, in random order.

    Each step is as torchvision's ColorJitter defines it for Pillow images.

    Args:
        image: RGB.
        rng: decides everything.
    """
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    hue = rng.uniform(-0.1, 0.1)
    steps: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: ImageEnhance.Brightness(image).enhance(brightness),
        lambda image: ImageEnhance.Contrast(image).enhance(contrast),
        lambda image: ImageEnhance.Color(image).enhance(saturation),
        lambda image: _map_bands(image, "HSV", {0: (_LEVELS + int(hue * 255)) % 256}),
    )
    for step in rng.permutation(len(steps)):
        image = steps[step](image)
    return image


# DRAEM


def perlin_mask(side: int, rng: np.random.Generator) -> np.ndarray:
    """Return blobs where Perlin noise of 2, 4, 8, 16 or 32 cells each way, turned by up to 5°, exceeds 0.5.

    Args:
        side: S, in pixels.
        rng: decides everything.

    Returns:
        S×S bool, sometimes all false.
    """
    rows, columns = 2 ** rng.integers(1, 6, 2)
    angles = rng.uniform(0, 2 * math.pi, (rows + 1, columns + 1))
    padded = -(-side // 32) * 32  # every number of cells divides it
    noise = Image.fromarray(perlin_noise(padded, angles)[:side, :side])
    turned = noise.rotate(rng.uniform(-_NOISE_TURN, _NOISE_TURN), Image.Resampling.BILINEAR)
    return np.asarray(turned) > _NOISE_THRESHOLD


def perlin_noise(side: int, angles: np.ndarray) -> np.ndarray:
    """Return gradient noise of one octave with quintic fade (Perlin, SIGGRAPH 2002), times √2, so that it reaches ±1.

    Args:
        side: S, a multiple of both numbers of cells.
        angles: (rows + 1)×(columns + 1), direction of the unit gradient at each corner of a cell, in radians from the
            x axis towards the y axis.

    Returns:
        S×S float32.
    """
    rows, columns = angles.shape[0] - 1, angles.shape[1] - 1
    gradient_y, gradient_x = np.sin(angles, dtype=np.float32), np.cos(angles, dtype=np.float32)
    y = _within_cell(side // rows)[None, :, None]
    x = _within_cell(side // columns)[None, None, :]
    # Along y first, and only on the grid's columns: there each corner's ramp is a + b·x, x counted from that column.
    gradient_y, gradient_x = gradient_y[:, None], gradient_x[:, None]
    a = _mix(gradient_y[:-1] * y, gradient_y[1:] * (y - 1), _fade(y)).reshape(side, columns + 1, 1)
    b = _mix(gradient_x[:-1], gradient_x[1:], _fade(y)).reshape(side, columns + 1, 1)
    noise = _mix(a[:, :-1] + b[:, :-1] * x, a[:, 1:] + b[:, 1:] * (x - 1), _fade(x))
    return noise.reshape(side, side) * np.float32(math.sqrt(2))


def _within_cell(pixels: int) -> np.ndarray:
    """Return positions of a cell's pixels along one axis, from 0 to below 1."""
    return np.arange(pixels, dtype=np.float32) / pixels


def _fade(t: np.ndarray) -> np.ndarray:
    return t * t * t * (t * (t * 6 - 15) + 10)


def _mix(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    return low + share * (high - low)


def shuffle_tiles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut S×S×3 into 8×8 tiles and shuffle them; a side that 8 does not divide is mirrored at its end to fill them."""
    side = len(image)
    tile = -(-side // _TILES)
    missing = tile * _TILES - side
    tiles = np.pad(image, ((0, missing), (0, missing), (0, 0)), mode="reflect")
    tiles = tiles.reshape(_TILES, tile, _TILES, tile, 3).swapaxes(1, 2).reshape(_TILES * _TILES, tile, tile, 3)
    tiles = tiles[rng.permutation(_TILES * _TILES)].reshape(_TILES, _TILES, tile, tile, 3)
    return tiles.swapaxes(1, 2).reshape(tile * _TILES, tile * _TILES, 3)[:side, :side]


# The ten augmenters of DRAEM's textures. Each takes H×W×3 uint8 RGB and a generator, and returns a new image.


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply three different `AUGMENTERS` to H×W×3 uint8 RGB, in the order drawn."""
    for index in rng.permutation(len(AUGMENTERS))[:3]:
        image = AUGMENTERS[index](image, rng)
    return image


_LEVELS = np.arange(256)


def _levels(values: np.ndarray) -> np.ndarray:
    """Return a table from old to new levels, rounded and clipped to 0…255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _map_bands(image: Image.Image, mode: str, tables: dict[int, np.ndarray]) -> Image.Image:
    """Replace the levels of some bands of a colour mode, each by its table of 256; RGB in and out."""
    bands = list(image.convert(mode).split())
    for band, table in tables.items():
        bands[band] = bands[band].point(table.tolist())
    return Image.merge(mode, bands).convert("RGB")


def change_gamma(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Raise each channel to the power of 0.5–2."""
    tables = [_levels(255 * (_LEVELS / 255) ** gamma) for gamma in rng.uniform(0.5, 2, 3)]
    return np.asarray(Image.fromarray(image).point(np.concatenate(tables).tolist()))


def change_brightness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Multiply the luma of YCbCr or the value of HSV by 0.8–1.2, then add −30…30."""
    mode, band = ("YCbCr", 0) if rng.random() < 0.5 else ("HSV", 2)
    table = _levels(_LEVELS * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30))
    return np.asarray(_map_bands(Image.fromarray(image), mode, {band: table}))


def change_sharpness(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth or sharpen: between smoothed (0), as it is (1) and sharpened (2)."""
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(rng.uniform(0, 2)))


def shift_hue_and_saturation(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add −50…50 to the hue, the circle being 256, and another −50…50 to the saturation of 0…255."""
    hue, saturation = rng.integers(-50, 51, 2)
    tables = {0: (_LEVELS + hue) % 256, 1: _levels(_LEVELS + saturation)}
    return np.asarray(_map_bands(Image.fromarray(image), "HSV", tables))


def solarise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Invert, every other time, what is at or above a threshold of 32–128."""
    if rng.random() < 0.5:
        return image
    return np.asarray(ImageOps.solarize(Image.fromarray(image), int(rng.integers(32, 129))))


def posterise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep the 1–8 highest bits of each channel."""
    return np.asarray(ImageOps.posterize(Image.fromarray(image), int(rng.integers(1, 9))))


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror left and right, every other time."""
    return image if rng.random() < 0.5 else np.ascontiguousarray(image[:, ::-1])


def invert(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return 255 minus each value."""
    return 255 - image


def stretch_contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Stretch each channel to 0…255 after cutting off 0–20 % of the darkest and of the brightest pixels."""
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image), cutoff=int(rng.integers(21))))


def equalise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Equalise the histogram of each channel."""
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


AUGMENTERS: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...] = (
    change_gamma,
    change_brightness,
    change_sharpness,
    shift_hue_and_saturation,
    solarise,
    posterise,
    flip,
    invert,
    stretch_contrast,
    equalise,
)
