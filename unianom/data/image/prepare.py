"""Images and masks as input of a network: scaled, cut and padded, the same way for every user."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unianom.data.image.decode import ImageFile, decode_image, load_pixels, open_image, repeat_grey, to_rgb
from unianom.data.image.encode import encode_png
from unianom.data.image.options import ImageLimits, InputPolicy
from unianom.data.image.reduce import reduce_mask

_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def scaled_size(width: int, height: int, policy: InputPolicy) -> tuple[int, int]:
    if policy.resize == "stretch":
        return policy.size, policy.size
    if width <= height:
        return policy.size, max(policy.size, policy.size * height // width)
    return max(policy.size, policy.size * width // height), policy.size


LONGEST_SCALED = 64
MOST_SCALED = 1 << 26
"""An image that is to be enlarged and is more than so many times as long as wide, or would have more than so many
pixels, is not scaled as a whole: the part beyond the crop would cost gigabytes."""


def _scale_and_cut(
    image: Image.Image, policy: InputPolicy, resampling: Image.Resampling, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Scale an image or mask, of any mode, and cut the crop.

    Args:
        image: the image, whole.
        policy: the model's input policy.
        resampling: how it is scaled.
        size: width and height that it is scaled to; None takes those of the policy.
    """
    width, height = size or scaled_size(image.width, image.height, policy)
    if policy.resize == "stretch" or policy.crop is None:
        return np.asarray(image if (width, height) == image.size else image.resize((width, height), resampling))
    long = max(width, height) > LONGEST_SCALED * min(width, height) or width * height > MOST_SCALED
    if long and min(width, height) > min(image.size):
        side = policy.cut
        top, left = round((height - side) / 2), round((width - side) / 2)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return np.asarray(image.resize((side, side), resampling, box))
    if (width, height) == image.size:
        return _cut(np.asarray(image), policy)
    if resampling == Image.Resampling.NEAREST or not _scales_exactly(image, width, height):
        return _cut(np.asarray(image.resize((width, height), resampling)), policy)
    first = round((width - policy.crop) / 2)
    begin, end = (edge * image.width / width for edge in (first, first + policy.crop))
    return np.asarray(image.resize((policy.crop, policy.crop), resampling, (begin, begin, end, end)))


def _scales_exactly(image: Image.Image, width: int, height: int) -> bool:
    """Return whether the crop alone can be scaled, to the pixels that it has where the whole image is.

    Pillow computes where a scaled pixel lies from where the crop begins and from length / scaled length, in floating
    point. Nothing is rounded there if the latter has a power of two as its denominator: always, where a side is scaled
    to 256. In which order Pillow scales width and height depends on both, so only images with equal sides are taken.
    """
    denominator = width // math.gcd(width, image.width)
    return image.width == image.height and width == height and denominator & (denominator - 1) == 0


def _cut(pixels: np.ndarray, policy: InputPolicy) -> np.ndarray:
    if policy.resize != "short_side" or policy.crop is None:
        return pixels
    top = round((pixels.shape[0] - policy.crop) / 2)
    left = round((pixels.shape[1] - policy.crop) / 2)
    return pixels[top : top + policy.crop, left : left + policy.crop]


def _pad(pixels: np.ndarray, policy: InputPolicy) -> np.ndarray:
    if policy.pad is None:
        return pixels
    before = (policy.pad - pixels.shape[0]) // 2
    after = policy.pad - pixels.shape[0] - before
    return np.pad(pixels, [(before, after)] * 2 + [(0, 0)] * (pixels.ndim - 2))


def prepare_image(pixels: np.ndarray, policy: InputPolicy) -> np.ndarray:
    """Scale, crop and pad an upright RGB image.

    Args:
        pixels: H×W×3 uint8.
        policy: the model's input policy.

    Returns:
        S×S×3 uint8 with S = `policy.side`.
    """
    height, width = pixels.shape[:2]
    if scaled_size(width, height, policy) == (width, height):
        return np.ascontiguousarray(_pad(_cut(pixels, policy), policy))
    scaled = _scale_and_cut(Image.fromarray(pixels), policy, _INTERPOLATION[policy.interpolation])
    return np.ascontiguousarray(_pad(scaled, policy))


def decode_prepared(data: bytes, policy: InputPolicy, limits: ImageLimits | None = None) -> np.ndarray:
    """Return a file's image as `prepare_image` gives it, in less time.

    Equal to the bit to `prepare_image` of `decode_image`'s pixels, unless the policy decodes JPEG scaled.

    Raises:
        ImageError: as `decode_image`.
    """
    return fit_image(decode_upright(data, policy, limits), policy)


@dataclass(frozen=True)
class UprightImage:
    """An upright image that is decoded and not scaled to the network's input yet.

    Attributes:
        image: H×W or H×W×3 uint8, or a Pillow image of mode L or RGB.
        size: width and height that it is scaled to, before the crop is cut.
        height, width: of the file's image, upright; `image` is smaller where the decoder has scaled it.
    """

    image: np.ndarray | Image.Image
    size: tuple[int, int]
    height: int
    width: int


def decode_upright(data: bytes, policy: InputPolicy, limits: ImageLimits | None = None) -> UprightImage:
    """Decode a file as a policy wants it: the first half of `decode_prepared`, and the errors of it."""
    file = open_image(data, limits or ImageLimits())
    width, height = file.image.size
    size = scaled_size(width, height, policy)
    if policy.decode == "scaled":
        file = _scaled_by_decoder(file, size)
    image, orientation = load_pixels(file)
    if not isinstance(image, np.ndarray) and image.mode != "L":
        image = to_rgb(image, file)
    if orientation in _LYING:
        return UprightImage(image, size[::-1], height=width, width=height)
    return UprightImage(image, size, height, width)


_LYING = (5, 6, 7, 8)
"""EXIF orientations in which width and height change places."""


def _scaled_by_decoder(file: ImageFile, size: tuple[int, int]) -> ImageFile:
    """Have a JPEG file decoded at a half, a quarter or an eighth of its size, the smallest that is no smaller than
    `size`: fewer coefficients of the cosine transform, and pixels that differ."""
    if file.image.format == "JPEG":
        file.image.draft(None, size)  # type: ignore[attr-defined]
    return file


def fit_image(upright: UprightImage, policy: InputPolicy) -> np.ndarray:
    """Scale, crop and pad what `decode_upright` gave to S×S×3 uint8, the second half of `decode_prepared`."""
    image = upright.image
    if isinstance(image, np.ndarray) and upright.size == (image.shape[1], image.shape[0]):
        pixels = _cut(image, policy)
    else:
        whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        pixels = _scale_and_cut(whole, policy, _INTERPOLATION[policy.interpolation], upright.size)
    return np.ascontiguousarray(repeat_grey(_pad(pixels, policy)))


def prepare_mask(mask: np.ndarray, policy: InputPolicy) -> np.ndarray:
    """Bring a mask where `prepare_image` brings its image.

    Args:
        mask: H×W uint8 of 0 and 255, of the image's size.
        policy: the model's input policy.

    Returns:
        S×S bool.
    """
    width, height = scaled_size(mask.shape[1], mask.shape[0], policy)
    if policy.mask_resize == "nearest" and (width < mask.shape[1] or height < mask.shape[0]):
        return _pad(_cut(reduce_mask(mask, height, width), policy), policy) > 0
    nearest = policy.mask_resize in ("nearest", "nearest_only")
    resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    values = _pad(_scale_and_cut(Image.fromarray(mask), policy, resampling), policy)
    above = {"bilinear_half": 127, "bilinear_full": 254}.get(policy.mask_resize, 0)
    return values > above


def reduce_image(data: bytes, short_side: int, limits: ImageLimits | None = None) -> bytes:
    """Re-encode an image whose shorter side exceeds `short_side`, upright RGB: JPEG stays JPEG at quality 95, the
    rest becomes PNG. Smaller images are returned untouched.

    Raises:
        ImageError: as `decode_image`.
    """
    decoded = decode_image(data, limits)
    height, width = decoded.pixels.shape[:2]
    if min(height, width) <= short_side:
        return data
    size = scaled_size(width, height, InputPolicy("short_side", short_side, crop=short_side))
    reduced = Image.fromarray(decoded.pixels).resize(size, Image.Resampling.BILINEAR)
    if decoded.format != "JPEG":
        return encode_png(np.asarray(reduced))
    buffer = io.BytesIO()
    reduced.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
