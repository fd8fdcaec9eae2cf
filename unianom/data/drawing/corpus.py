"""Pictures of the scenes with light, colour cast and noise, one at a time or as a corpus on disk."""

from __future__ import annotations

import difflib
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.ndimage
from PIL import Image

from unianom import files
from unianom.data.drawing.canvas import OVERSAMPLING, Array, Canvas, enlarge, mix, reduce
from unianom.data.drawing.scenes import DEFECTS, SCENES
from unianom.errors import DataError, OptionError

MIN_SIZE, MAX_SIZE = 64, 1024
MAX_COUNT = 1_000_000


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
    _check_name("category", category, tuple(SCENES))
    if defect is not None:
        _check_name(f"defect of {category}", defect, DEFECTS[category])
    _check_range("index", index, 0, None)
    _check_range("seed", seed, 0, None)
    _check_range("size", size, MIN_SIZE, MAX_SIZE)

    scene_rng = _generator(seed, category, index, "scene")
    scene = SCENES[category](scene_rng, Canvas(OVERSAMPLING * size))
    picture = scene.draw()
    mask = np.zeros((size, size), bool)
    if defect is not None:
        altered, coverage = scene.defects[defect](scene, _generator(seed, category, index, defect), picture)
        mask = reduce(coverage) > 0.5
        # Slivers that fill no pixel by half are left out, or the picture would change away from the mask.
        kept = scipy.ndimage.binary_dilation(mask, np.ones((3, 3), bool))
        picture = mix(picture, altered, coverage * enlarge(kept))
    exposed = _expose(reduce(picture), _generator(seed, category, index, "camera"))
    return (np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8), mask


def draw_corpus(
    root: str | Path,
    categories: Sequence[str] = tuple(SCENES),
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
        _check_name("category", category, tuple(SCENES))
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
    """Lay light, colour cast and sensor noise on a reduced scene, n×n×3."""
    n = len(picture)
    centres = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    slope_y, slope_x = rng.normal(0, 0.06, 2)
    light = rng.normal(1, 0.03) * (1 + slope_y * centres[:, None] + slope_x * centres)
    light -= rng.uniform(0.05, 0.2) * (centres[:, None] ** 2 + centres**2)
    cast = rng.normal(1, 0.01, 3).astype(np.float32)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0.008, 0.016)
    return picture * light[..., None] * cast + noise


def _generator(seed: int, category: str, index: int, part: str) -> np.random.Generator:
    """Return a generator of its own for each part of each scene."""
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
