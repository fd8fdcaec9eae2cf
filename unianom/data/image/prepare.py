"""Images and masks as input of a network: scaled, cut and padded, the same way for every user."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from unianom.data.image.decode import decode_image, load_image, open_image, to_rgb
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


def _scale_and_cut(image: Image.Image, policy: InputPolicy, resampling: Image.Resampling) -> np.ndarray:
    """Scale an image or mask, of any mode, and cut the crop."""
    width, height = scaled_size(image.width, image.height, policy)
    long = max(width, height) > LONGEST_SCALED * min(width, height) or width * height > MOST_SCALED
    # a stretched image is no longer than wide
    if not long or policy.resize == "stretch" or policy.crop is None or min(width, height) <= min(image.size):
        if (width, height) != image.size:
            image = image.resize((width, height), resampling)
        return _cut(np.asarray(image), policy)
    side = policy.cut
    top, left = round((height - side) / 2), round((width - side) / 2)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((side, side), resampling, box))


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
    """Return `prepare_image` of `decode_image`'s pixels, to the bit, in less time: grey is repeated after it is scaled.

    Raises:
        ImageError: as `decode_image`.
    """
    file = open_image(data, limits or ImageLimits())
    image, _ = load_image(file.image)
    if image.mode != "L":
        image = to_rgb(image, file)
    pixels = _pad(_scale_and_cut(image, policy, _INTERPOLATION[policy.interpolation]), policy)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels)


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
