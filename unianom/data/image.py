"""From encoded bytes to what a network sees, the same way in training, scoring, serving and export.

`decode_image` and `decode_mask` open bytes safely, `crop_image` and `crop_mask` cut out what a layout wants of them,
`prepare_image` and `prepare_mask` bring them to the model's input size, `normalise` makes the tensor. Nothing else in
the project decodes, resizes or normalises images.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.ndimage
import torch
from PIL import Image, ImageOps

from unianom.data.schema import Crop
from unianom.errors import ImageError, OptionError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""What is opened. Vector, scripted and layered formats are not, since their decoders run far more code."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_INTERPOLATION = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost before it is refused unopened.

    Args:
        max_pixels: height times width, read from the header.
        max_bytes: size of the encoded file.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.max_pixels < 1 or self.max_bytes < 1:
            raise OptionError("image limits: max_pixels and max_bytes must be positive")

    def check_bytes(self, size: int) -> None:
        """Raise ImageError "too_large" for an encoded file of more than `max_bytes`."""
        if size > self.max_bytes:
            raise ImageError("too_large", f"{size} bytes; the limit is {self.max_bytes} (--limits.max_bytes)")


@dataclass(frozen=True)
class InputPolicy:
    """How an image becomes the network's input.

    Args:
        resize: "short_side" scales the shorter side to `size` and cuts the centre `crop`; "stretch" scales both
            sides to `size`, whatever the aspect. A centre crop hides what lies at the border.
        size: pixels after scaling.
        crop: pixels of the centre crop, for "short_side".
        pad: zero-pad to this many pixels on each side (black before normalisation), for small images.
        interpolation: filter for images; "bilinear", "bicubic" or "lanczos", antialiased.
        mask_resize: "nearest" keeps every value, any non-zero pixel is anomalous. The others follow published
            code: bilinear, then ">0" ("bilinear_any"), ">0.5" ("bilinear_half") or full white only
            ("bilinear_full").
        mean, std: per channel, on a 0…1 scale; null takes those of the backbone's weights.
    """

    resize: Literal["short_side", "stretch"] = "short_side"
    size: int = 256
    crop: int | None = 224
    pad: int | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    mask_resize: Literal["nearest", "bilinear_any", "bilinear_half", "bilinear_full"] = "nearest"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.resize == "short_side" and self.crop is None:
            raise OptionError("input.resize=short_side needs input.crop, since images of a batch must be of one size")
        if not 1 <= self._cut <= self.size:
            raise OptionError(f"input.size={self.size} and input.crop={self.crop}: need 1 <= crop <= size")
        if self.pad is not None and self.pad < self._cut:
            raise OptionError(f"input.pad={self.pad} is smaller than the image of {self._cut} pixels it should hold")
        if self.std is not None and min(self.std) <= 0:
            raise OptionError("input.std must be positive")

    @property
    def _cut(self) -> int:
        return self.size if self.resize == "stretch" or self.crop is None else self.crop

    @property
    def side(self) -> int:
        """Height and width of the network's input, in pixels."""
        return self.pad or self._cut


# Pillow's own limit is one figure for the whole process and only warns below its double, so ours, read from the
# header before anything is decoded, takes its place while a file is being opened.
_pillow_limit = threading.Lock()


def _open(data: bytes, limits: ImageLimits) -> Image.Image:
    if not data:
        raise ImageError("corrupt", "the file is empty")
    limits.check_bytes(len(data))
    try:
        with _pillow_limit:
            default, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = default
    except Image.UnidentifiedImageError as error:
        raise ImageError("corrupt", f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # a decoder raises whatever its parser stumbled over
        raise ImageError("corrupt", f"unreadable image header: {error}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            "too_large",
            f"{width} x {height} = {width * height} pixels; the limit is {limits.max_pixels} (--limits.max_pixels)",
        )
    return image


def _load(image: Image.Image) -> Image.Image:
    """Decode the pixels and turn them upright."""
    try:
        image.load()
    except Exception as error:  # a decoder raises whatever its parser stumbled over
        raise ImageError("corrupt", f"cannot decode: {error}") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # as above
        raise ImageError("corrupt", f"its EXIF data, and so its orientation, cannot be read: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode to 8-bit RGB; alpha is dropped, 16 bits are scaled to 8 (Pillow would clip them)."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight(image)).convert("RGB")
    if image.mode == "F":
        raise ImageError("unsupported", "32-bit float pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError("unsupported", f"colour mode {image.mode} cannot be converted to RGB") from error


def _sixteen_to_eight(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", "32-bit pixels beyond 0…65535; convert the file to 8 or 16 bits")
    return ((values + 128) // 257).astype(np.uint8)


def _format(image: Image.Image) -> str:
    """One of `FORMATS`. Pillow gives a JPEG with further pictures behind the first, as cameras write, another name."""
    return "JPEG" if image.format == "MPO" else str(image.format)


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds.

    Attributes:
        format: one of `FORMATS`.
        height, width: pixels, upright.
    """

    format: str
    height: int
    width: int


def check_image(data: bytes, limits: ImageLimits | None = None) -> ImageFacts:
    """Decode an image only to know that `decode_image` will take it.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _open(data, limits or ImageLimits())
    file_format = _format(image)
    image = _load(image)
    if image.mode not in ("L", "RGB", "RGBA", "P", "CMYK", "1"):
        _to_rgb(image)  # modes whose pixels decide
    return ImageFacts(file_format, image.height, image.width)


@dataclass(frozen=True)
class DecodedImage:
    """An image and what its file said.

    Attributes:
        pixels: H×W×3 uint8 RGB, upright.
        format: one of `FORMATS`.
    """

    pixels: np.ndarray
    format: str


def decode_image(data: bytes, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode PNG, JPEG, BMP, TIFF or WebP of any colour mode to upright 8-bit RGB.

    Grey is repeated, palettes are resolved, alpha is dropped, CMYK converted, the EXIF orientation applied; of
    several frames the first is taken. 16-bit grey is scaled to 8 bits and rounded; of 16-bit colours Pillow keeps
    the high byte.

    Raises:
        ImageError: status "corrupt" (unreadable, truncated, empty), "too_large" (over `limits`, told from the
            header) or "unsupported" (pixels without an agreed range).
    """
    image = _open(data, limits or ImageLimits())
    file_format = _format(image)
    return DecodedImage(np.asarray(_to_rgb(_load(image))), file_format)


def decode_mask(data: bytes, threshold: int = 0, limits: ImageLimits | None = None) -> np.ndarray:
    """Decode a mask file to H×W uint8 of 0 and 255.

    Args:
        data: encoded image. Of a colour mask any channel counts, alpha does not; a palette of greys stands for its
            shades, one of colours for class numbers.
        threshold: values above this are anomalous. 0 suits 0/255 masks and masks of small class numbers alike.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _load(_open(data, limits or ImageLimits()))
    if image.mode.startswith("I") or (image.mode == "P" and not _has_grey_palette(image)):
        values = np.asarray(image)  # indices into colours, and values of more than 8 bits, are class numbers
    elif image.mode in ("1", "L"):
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
    else:
        values = np.asarray(_to_rgb(image)).max(axis=2)
    return np.where(values > threshold, np.uint8(255), np.uint8(0))


def _has_grey_palette(image: Image.Image) -> bool:
    """Whether this is a grey image saved with a palette; the order of its entries then means nothing."""
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


@dataclass(frozen=True)
class CropWindow:
    """The square of one image that a crop keeps.

    Attributes:
        top, left: its first row and column; below 0 where it begins beyond the image.
        length: its height and width in pixels of the image. What lies beyond the image is black.
        side: height and width that it is resized to.
    """

    top: int
    left: int
    length: int
    side: int


def find_crop(pixels: np.ndarray, crop: Crop, limits: ImageLimits | None = None) -> CropWindow:
    """Where a crop lies in an image.

    Args:
        pixels: H×W×3 uint8, upright.
        crop: what to cut out.
        limits: what the window may cost; of a thin strip it is far larger than the image.

    Raises:
        ImageError: status "unsupported" for an image that is smaller than a centre crop without padding, or too dark
            for a fundus crop; "too_large" for a window over `limits`.
    """
    height, width = pixels.shape[:2]
    if crop.kind == "fundus":
        window = _fundus_window(pixels, crop)
    elif min(height, width) < crop.side and not crop.pad:
        raise ImageError(
            "unsupported",
            f"{width} x {height} pixels, smaller than its layout's crop of {crop.side}; the layout's option crop=false "
            f"stores whole images",
        )
    else:
        window = CropWindow(_before(height, crop.side), _before(width, crop.side), crop.side, crop.side)
    if window.length**2 > (limits or ImageLimits()).max_pixels:
        raise ImageError(
            "too_large",
            f"its crop has {window.length} x {window.length} pixels, more than --limits.max_pixels allows",
        )
    return window


def _before(length: int, side: int) -> int:
    """Pixels before the middle `side` of `length`, below 0 if that is less; as torchvision's CenterCrop counts."""
    return round((length - side) / 2) if length >= side else -((side - length) // 2)


def _fundus_window(pixels: np.ndarray, crop: Crop) -> CropWindow:
    bright = pixels.sum(axis=2, dtype=np.uint16) > crop.threshold
    regions, count = scipy.ndimage.label(bright, np.ones((3, 3)))  # pixels that touch at a corner are connected
    if not count:
        raise ImageError(
            "unsupported",
            f"no pixel has R + G + B above {crop.threshold}, so there is no retina to crop to; the layout's option "
            f"crop=false stores whole images",
        )
    region = regions == 1 + np.bincount(regions.ravel())[1:].argmax()
    (y, height), (x, width) = _extent(region.sum(axis=1)), _extent(region.sum(axis=0))
    length = max(height, width)
    top, left = math.floor(y - length / 2), math.floor(x - length / 2)
    return CropWindow(top - crop.margin, left - crop.margin, length + 2 * crop.margin, crop.side)


def _extent(counts: np.ndarray) -> tuple[float, int]:
    """Centroid and length along one axis of a region that has so many pixels in each row."""
    rows = np.flatnonzero(counts)
    return float((counts * np.arange(len(counts))).sum() / counts.sum()), int(rows[-1] - rows[0]) + 1


def crop_image(pixels: np.ndarray, window: CropWindow) -> np.ndarray:
    """The window of an H×W×3 image; where its size changes, bilinear and antialiased."""
    return _crop(pixels, window, Image.Resampling.BILINEAR)


def crop_mask(mask: np.ndarray, window: CropWindow) -> np.ndarray:
    """The window of an H×W mask, where `crop_image` has that of its image; nearest neighbour."""
    return _crop(mask, window, Image.Resampling.NEAREST)


def _crop(pixels: np.ndarray, window: CropWindow, resampling: Image.Resampling) -> np.ndarray:
    height, width = pixels.shape[:2]
    cut = np.zeros((window.length, window.length, *pixels.shape[2:]), np.uint8)
    top, bottom = max(window.top, 0), min(window.top + window.length, height)
    left, right = max(window.left, 0), min(window.left + window.length, width)
    cut[top - window.top : bottom - window.top, left - window.left : right - window.left] = pixels[
        top:bottom, left:right
    ]
    return np.asarray(Image.fromarray(cut).resize((window.side, window.side), resampling))


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
    size = _scaled_size(width, height, InputPolicy("short_side", short_side, crop=short_side))
    reduced = Image.fromarray(decoded.pixels).resize(size, Image.Resampling.BILINEAR)
    if decoded.format != "JPEG":
        return encode_png(np.asarray(reduced))
    buffer = io.BytesIO()
    reduced.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def reduce_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an H×W mask to its reduced image's size, nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode H×W or H×W×3 uint8, or H×W uint16, as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _scaled_size(width: int, height: int, policy: InputPolicy) -> tuple[int, int]:
    if policy.resize == "stretch":
        return policy.size, policy.size
    if width <= height:
        return policy.size, max(policy.size, policy.size * height // width)
    return max(policy.size, policy.size * width // height), policy.size


def _cut_and_pad(pixels: np.ndarray, policy: InputPolicy) -> np.ndarray:
    if policy.resize == "short_side" and policy.crop is not None:
        top = round((pixels.shape[0] - policy.crop) / 2)
        left = round((pixels.shape[1] - policy.crop) / 2)
        pixels = pixels[top : top + policy.crop, left : left + policy.crop]
    if policy.pad is not None:
        before = (policy.pad - pixels.shape[0]) // 2
        after = policy.pad - pixels.shape[0] - before
        pixels = np.pad(pixels, [(before, after)] * 2 + [(0, 0)] * (pixels.ndim - 2))
    return pixels


def prepare_image(pixels: np.ndarray, policy: InputPolicy) -> np.ndarray:
    """Scale, crop and pad an upright RGB image.

    Args:
        pixels: H×W×3 uint8.
        policy: the model's input policy.

    Returns:
        S×S×3 uint8 with S = `policy.side`.
    """
    height, width = pixels.shape[:2]
    size = _scaled_size(width, height, policy)
    if size != (width, height):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, _INTERPOLATION[policy.interpolation]))
    return np.ascontiguousarray(_cut_and_pad(pixels, policy))


def decode_prepared(data: bytes, policy: InputPolicy, limits: ImageLimits | None = None) -> np.ndarray:
    """`prepare_image` of `decode_image`'s pixels, to the bit, in less time: grey is repeated after it is scaled.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _load(_open(data, limits or ImageLimits()))
    if image.mode != "L":
        image = _to_rgb(image)
    size = _scaled_size(image.width, image.height, policy)
    if size != image.size:
        image = image.resize(size, _INTERPOLATION[policy.interpolation])
    pixels = _cut_and_pad(np.asarray(image), policy)
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else np.ascontiguousarray(pixels)


def prepare_mask(mask: np.ndarray, policy: InputPolicy) -> np.ndarray:
    """Bring a mask where `prepare_image` brings its image.

    Args:
        mask: H×W uint8 of 0 and 255, of the image's size.
        policy: the model's input policy.

    Returns:
        S×S bool.
    """
    size = _scaled_size(mask.shape[1], mask.shape[0], policy)
    nearest = policy.mask_resize == "nearest"
    resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    values = _cut_and_pad(np.asarray(Image.fromarray(mask).resize(size, resampling)), policy)
    above = {"nearest": 0, "bilinear_any": 0, "bilinear_half": 127, "bilinear_full": 254}[policy.mask_resize]
    return values > above


def normalise(images: Sequence[np.ndarray], policy: InputPolicy) -> torch.Tensor:
    """Stack prepared images into the network's input.

    Args:
        images: B arrays of S×S×3 uint8.
        policy: the model's input policy, with mean and std.

    Returns:
        B×3×S×S float32.
    """
    if policy.mean is None or policy.std is None:
        raise OptionError("input.mean and input.std are not set; a method fills them in from its backbone")
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float()  # B 3 S S
    mean = torch.tensor(policy.mean).view(1, 3, 1, 1)
    std = torch.tensor(policy.std).view(1, 3, 1, 1)
    return batch.div_(255).sub_(mean).div_(std)


def encode_map(anomaly_map: np.ndarray) -> tuple[bytes, float, float]:
    """Pack an anomaly map into a 16-bit PNG: 65,536 even steps between its own minimum and maximum.

    Args:
        anomaly_map: H×W float32.

    Returns:
        PNG bytes, offset and scale: value = offset + scale · pixel, off by at most scale / 2.

    Raises:
        ValueError: a value is not finite.
    """
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("the anomaly map holds NaN or infinite values")
    offset, scale = float(np.float32(low)), float(np.float32((high - low) / 65535))
    if scale == 0:
        steps = np.zeros(anomaly_map.shape, np.uint16)
    else:
        steps = np.clip(np.rint((anomaly_map.astype(np.float64) - offset) / scale), 0, 65535).astype(np.uint16)
    return encode_png(steps), offset, scale


def decode_map(data: bytes, offset: float, scale: float) -> np.ndarray:
    """Unpack what `encode_map` packed, as H×W float32."""
    steps = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",))).astype(np.float64)
    return (offset + scale * steps).astype(np.float32)
