"""Encoded bytes to upright 8-bit RGB, safely. Nothing else in the project decodes images."""

from __future__ import annotations

import io
import struct
import threading
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from unianom.data.image.encode import encode_png
from unianom.data.image.jpeg import decode_jpeg
from unianom.data.image.options import ImageLimits
from unianom.errors import ImageError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
"""What is opened. Vector, scripted and layered formats are not, since their decoders run far more code."""

# Pillow's own limit is one figure for the whole process and only warns below its double, so ours, read from the
# header before anything is decoded, takes its place while a file is being opened.
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class ImageFile:
    """An opened file and what its header says, which the decoded image no longer does.

    Attributes:
        data: the file.
        image: not decoded yet.
        format: one of `FORMATS`.
        lossy: whether pixels may differ from those that were saved.
        sample_bits: bits that a sample is stored in, of PNG and TIFF; else 8.
        stated_bits: bits that the samples make use of, where the file states fewer than it stores them in.
    """

    data: bytes
    image: Image.Image
    format: str
    lossy: bool
    sample_bits: int
    stated_bits: int | None


def open_image(data: bytes, limits: ImageLimits) -> ImageFile:
    """Open a file and read its header, without decoding the image.

    Raises:
        ImageError: as `decode_image`.
    """
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
    # Pillow gives a JPEG with further pictures behind the first, as cameras write, another name
    file_format = "JPEG" if image.format == "MPO" else str(image.format)
    sample_bits, stated_bits = 8, None
    try:
        if file_format == "PNG":
            sample_bits, stated_bits = data[24], _significant_bits(data)
        elif file_format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            sample_bits = max(tags.get(_BITS_PER_SAMPLE, (8,)))
            stated_bits = _bits_of_maximum(tags.get(_LARGEST_SAMPLE)) or sample_bits
    except Exception as error:  # as above: tags of any type
        raise ImageError("corrupt", f"unreadable image header: {error}") from error
    if sample_bits <= 8 or (stated_bits is not None and stated_bits >= 16):
        stated_bits = None
    return ImageFile(data, image, file_format, _is_lossy(image, data), sample_bits, stated_bits)


_BITS_PER_SAMPLE, _LARGEST_SAMPLE = 258, 341  # tags of TIFF; the latter is SMaxSampleValue


def _significant_bits(data: bytes) -> int | None:
    """Return the largest figure in the sBIT chunk of a PNG file; None if it has none."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        if name == b"sBIT":
            return max(data[place + 8 : place + 8 + min(length, 4)], default=None)
        if name == b"IDAT":
            return None
        place += length + 12
    return None


def _bits_of_maximum(value: Any) -> int | None:
    """Return bits of samples whose largest possible value a TIFF file states. A value that is not all ones is none:
    some programs state the largest value that occurs, and scaling by that would change from image to image."""
    largest = max(value) if isinstance(value, tuple) and value else value
    if not isinstance(largest, int | float) or largest < 1 or largest != int(largest):
        return None
    bits = int(largest).bit_length()
    return bits if int(largest) == (1 << bits) - 1 else None


def _is_lossy(image: Image.Image, data: bytes) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in data[12:4096]  # VP8L is the lossless kind; metadata of some size may come before either
    return image.format in ("JPEG", "MPO") or image.info.get("compression") in ("jpeg", "tiff_jpeg")


_ORIENTATION = 0x0112  # tag of EXIF

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright; one of 1 is."""


def load_image(file: ImageFile) -> tuple[Image.Image, int | None]:
    """Decode the pixels and turn them upright; also the EXIF orientation, None if the file has none."""
    try:
        file.image.load()
    except Exception as error:  # a decoder raises whatever its parser stumbled over
        raise ImageError("corrupt", f"cannot decode: {error}") from error
    return _turn_upright(file.image, file.image)


def load_pixels(file: ImageFile) -> tuple[Image.Image | np.ndarray, int | None]:
    """Do as `load_image`; grey and coloured JPEG files that are upright become H×W or H×W×3 uint8 in less time."""
    pixels = decode_jpeg(file.data, file.image)
    return load_image(file) if pixels is None else _turn_upright(pixels, file.image)


P = TypeVar("P", Image.Image, np.ndarray)


def _turn_upright(pixels: P, image: Image.Image) -> tuple[P | Image.Image, int | None]:
    """Turn pixels by the EXIF orientation of the image whose they are; also that orientation, None if it has none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
        turn = _TURNS.get(orientation)  # type: ignore[arg-type]
    except Exception as error:  # as above
        raise ImageError("corrupt", f"its EXIF data, and so its orientation, cannot be read: {error}") from error
    known = orientation if orientation in range(1, 9) else None
    if turn is None:
        return pixels, known
    return (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).transpose(turn), known


def to_rgb(image: Image.Image, file: ImageFile) -> Image.Image:
    """Convert any colour mode to 8-bit RGB; alpha is dropped, 16 bits are scaled to 8 (Pillow would clip them)."""
    if image.mode == "RGB":
        if file.stated_bits is not None and _is_unscaled_colour(image, file.stated_bits):
            raise ImageError(
                "unsupported",
                f"colours of {file.stated_bits} bits in samples of {file.sample_bits}, of which only the upper 8 can "
                f"be read; convert the file to 8 bits a colour",
            )
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(_sixteen_to_eight(image, file)).convert("RGB")
    if image.mode == "F":
        raise ImageError("unsupported", "32-bit float pixels have no agreed range; convert the file to 8 or 16 bits")
    if image.mode == "P":
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError("unsupported", f"colour mode {image.mode} cannot be converted to RGB") from error


def _sixteen_to_eight(image: Image.Image, file: ImageFile) -> np.ndarray:
    values = _samples(image)
    bits = file.stated_bits
    if bits is None or values.max() >= 1 << bits or (file.format == "PNG" and _is_scaled_up(values, bits)):
        return ((values + 128) // 257).astype(np.uint8)
    white = (1 << bits) - 1
    return ((510 * values + white) // (2 * white)).astype(np.uint8)  # rounded


def _samples(image: Image.Image) -> np.ndarray:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", "32-bit pixels beyond 0…65535; convert the file to 8 or 16 bits")
    return values


def _is_scaled_up(values: np.ndarray, bits: int) -> bool:
    """Return whether samples of so many bits were scaled up to 16, as PNG asks for (ISO/IEC 15948, 12.5), though many
    cameras' programs leave them as they are: the lower bits are then all 0 or repeat the upper ones."""
    lower = values & ((1 << (16 - bits)) - 1)
    return bool((lower == 0).all() or (bits >= 8 and (lower == values >> bits).all()))


def _is_unscaled_colour(image: Image.Image, bits: int) -> bool:
    """Return whether samples of so many bits lie at the lower end of 16, as far as the upper 8 bits show it."""
    largest = int(np.asarray(image).max())
    return 0 < largest < 1 << max(bits - 8, 0)


@dataclass(frozen=True)
class ImageFacts:
    """What an image file holds.

    Attributes:
        format: one of `FORMATS`.
        height, width: pixels, upright.
        orientation: of EXIF, 1…8; None if the file has none.
        largest: of an image whose samples have 16 bits, and that does not state to use fewer, the largest value that
            occurs, else None. Of colours only the upper 8 bits are known, and the lower ones taken as ones.
    """

    format: str
    height: int
    width: int
    orientation: int | None = field(default=None, compare=False)
    largest: int | None = field(default=None, compare=False)


def check_image(data: bytes, limits: ImageLimits | None = None) -> ImageFacts:
    """Decode an image only to know that `decode_image` will take it.

    Raises:
        ImageError: as `decode_image`.
    """
    file = open_image(data, limits or ImageLimits())
    image, orientation = load_pixels(file)
    if isinstance(image, np.ndarray):
        return ImageFacts(file.format, image.shape[0], image.shape[1], orientation)
    if image.mode not in ("L", "RGB", "RGBA", "P", "CMYK", "1") or file.stated_bits is not None:
        to_rgb(image, file)  # modes whose pixels decide
    return ImageFacts(file.format, image.height, image.width, orientation, _largest(image, file))


def _largest(image: Image.Image, file: ImageFile) -> int | None:
    if file.stated_bits is not None or file.sample_bits != 16:
        return None
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    return int(np.asarray(image.convert("RGB")).max()) << 8 | 255


@dataclass(frozen=True)
class DecodedImage:
    """An image and what its file said.

    Attributes:
        pixels: H×W×3 uint8 RGB, upright.
        format: one of `FORMATS`.
        orientation, largest: as `ImageFacts` has them.
    """

    pixels: np.ndarray
    format: str
    orientation: int | None = None
    largest: int | None = None

    @property
    def facts(self) -> ImageFacts:
        """What `check_image` says of the file."""
        height, width = self.pixels.shape[:2]
        return ImageFacts(self.format, height, width, self.orientation, self.largest)


def decode_image(data: bytes, limits: ImageLimits | None = None) -> DecodedImage:
    """Decode PNG, JPEG, BMP, TIFF or WebP of any colour mode to upright 8-bit RGB.

    Grey is repeated, palettes are resolved, alpha is dropped, CMYK converted, the EXIF orientation applied; of
    several frames the first is taken. 16-bit grey is scaled to 8 bits and rounded; where the file states that its
    samples use fewer bits (sBIT of PNG, SMaxSampleValue or BitsPerSample of TIFF), these are what is scaled. Of 16-bit
    colours Pillow keeps the high byte.

    Raises:
        ImageError: status "corrupt" (unreadable, truncated, empty), "too_large" (over `limits`, told from the
            header) or "unsupported" (pixels without an agreed range).
    """
    file = open_image(data, limits or ImageLimits())
    image, orientation = load_pixels(file)
    if isinstance(image, np.ndarray):
        return DecodedImage(repeat_grey(image), file.format, orientation)
    return DecodedImage(np.asarray(to_rgb(image, file)), file.format, orientation, _largest(image, file))


def repeat_grey(pixels: np.ndarray) -> np.ndarray:
    """Return H×W×3 of what may be H×W."""
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def spread_bits(data: bytes, bits: int, limits: ImageLimits | None = None) -> bytes:
    """Scale an image whose 16-bit samples use only the lower `bits` up to all 16, as an upright PNG; an image of 8 bits
    a sample is returned untouched.

    Raises:
        ImageError: as `decode_image`; "unsupported" also for values of more bits, and for 16-bit colours.
    """
    file = open_image(data, limits or ImageLimits())
    if file.sample_bits <= 8:
        return data
    image, _ = load_image(file)
    if not image.mode.startswith("I"):
        raise ImageError(
            "unsupported",
            "colours of 16 bits, of which only the upper 8 can be read, so bits has no effect; convert the file to 8 "
            "bits a colour",
        )
    values, white = _samples(image), (1 << bits) - 1
    if values.max() > white:
        raise ImageError("unsupported", f"it holds values up to {values.max()}, more than bits={bits} can; raise bits")
    return encode_png(((2 * 65535 * values + white) // (2 * white)).astype(np.uint16))
