"""From encoded bytes to what a network sees, the same way in training, scoring, serving and export.

`decode_image` and `decode_mask` open bytes safely, `crop_image` and `crop_mask` cut out what a layout wants of them,
`prepare_image` and `prepare_mask` bring them to the model's input size; `tensors.normalise` makes the batch. Nothing
else in the project decodes, resizes or normalises images.
"""

from __future__ import annotations

import io
import math
import struct
import threading
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import scipy.ndimage
from annotated_types import Interval
from PIL import Image, ImageOps

from unianom.data.schema import Crop
from unianom.errors import ImageError, OptionError
from unianom.options import AtLeastOne, Options, Positive, ValueRefused

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
class ImageLimits(Options):
    """What an image may cost before it is refused unopened.

    Args:
        max_pixels: height times width, read from the header.
        max_bytes: size of the encoded file.
    """

    max_pixels: AtLeastOne = 100_000_000
    max_bytes: AtLeastOne = 256 << 20

    def check_bytes(self, size: int) -> None:
        """Raise ImageError "too_large" for an encoded file of more than `max_bytes`."""
        if size > self.max_bytes:
            raise ImageError("too_large", f"{size} bytes; the limit is {self.max_bytes} (--limits.max_bytes)")


MAX_SIDE = 4096
"""Pixels of a side of a network's input at most: beyond, one image takes gigabytes in the network."""

Side = Annotated[int, Interval(ge=1, le=MAX_SIDE)]
"""Pixels of a side of a network's input."""


@dataclass(frozen=True)
class InputPolicy(Options):
    """How an image becomes the network's input.

    Args:
        resize: "short_side" scales the shorter side to `size` and cuts the centre `crop`; "stretch" scales both
            sides to `size`, whatever the aspect. A centre crop hides what lies at the border.
        size: pixels after scaling.
        crop: pixels of the centre crop, for "short_side".
        pad: zero-pad to this many pixels on each side (black before normalisation), for small images.
        interpolation: filter for images; "bilinear", "bicubic" or "lanczos", antialiased.
        mask_resize: "nearest" neighbour, but a defect so thin that it would vanish or fall to pieces keeps every
            cell that it touches. The others follow published code: nearest neighbour alone
            ("nearest_only"), or bilinear, then ">0" ("bilinear_any"), ">0.5" ("bilinear_half") or full white only
            ("bilinear_full").
        mean, std: per channel, on a 0…1 scale; null takes those of the backbone's weights.
    """

    resize: Literal["short_side", "stretch"] = "short_side"
    size: Side = 256
    crop: Side | None = 224
    pad: Side | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    mask_resize: Literal["nearest", "nearest_only", "bilinear_any", "bilinear_half", "bilinear_full"] = "nearest"
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None

    def check(self) -> None:
        if self.resize == "short_side" and self.crop is None:
            raise ValueRefused("resize=short_side needs a crop, since images of a batch must be of one size")
        if self._cut > self.size:
            raise ValueRefused(f"crop={self.crop} must be at most size={self.size}")
        if self.pad is not None and self.pad < self._cut:
            raise ValueRefused(f"pad={self.pad} is smaller than the image of {self._cut} pixels it should hold")

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


@dataclass(frozen=True)
class _File:
    """An opened file and what its header says, which the decoded image no longer does.

    Attributes:
        image: not decoded yet.
        format: one of `FORMATS`.
        lossy: whether pixels may differ from those that were saved.
        sample_bits: bits that a sample is stored in, of PNG and TIFF; else 8.
        stated_bits: bits that the samples make use of, where the file states fewer than it stores them in.
    """

    image: Image.Image
    format: str
    lossy: bool
    sample_bits: int
    stated_bits: int | None


def _open(data: bytes, limits: ImageLimits) -> _File:
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
    return _File(image, file_format, _is_lossy(image, data), sample_bits, stated_bits)


_BITS_PER_SAMPLE, _LARGEST_SAMPLE = 258, 341  # tags of TIFF; the latter is SMaxSampleValue


def _significant_bits(data: bytes) -> int | None:
    """The largest figure in the sBIT chunk of a PNG file; None if it has none."""
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
    """Bits of samples whose largest possible value a TIFF file states. A value that is not all ones is none: some
    programs state the largest value that occurs, and scaling by that would change from image to image."""
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


def _load(image: Image.Image) -> tuple[Image.Image, int | None]:
    """Decode the pixels and turn them upright; also the EXIF orientation, None if the file has none."""
    try:
        image.load()
    except Exception as error:  # a decoder raises whatever its parser stumbled over
        raise ImageError("corrupt", f"cannot decode: {error}") from error
    try:
        orientation = image.getexif().get(_ORIENTATION)
        return ImageOps.exif_transpose(image), orientation if orientation in range(1, 9) else None
    except Exception as error:  # as above
        raise ImageError("corrupt", f"its EXIF data, and so its orientation, cannot be read: {error}") from error


def _to_rgb(image: Image.Image, file: _File) -> Image.Image:
    """Any colour mode to 8-bit RGB; alpha is dropped, 16 bits are scaled to 8 (Pillow would clip them)."""
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


def _sixteen_to_eight(image: Image.Image, file: _File) -> np.ndarray:
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
    """Whether samples of so many bits were scaled up to 16, as PNG asks for (ISO/IEC 15948, 12.5), though many cameras'
    programs leave them as they are: the lower bits are then all 0 or repeat the upper ones."""
    lower = values & ((1 << (16 - bits)) - 1)
    return bool((lower == 0).all() or (bits >= 8 and (lower == values >> bits).all()))


def _is_unscaled_colour(image: Image.Image, bits: int) -> bool:
    """Whether samples of so many bits lie at the lower end of 16, as far as the upper 8 bits show it."""
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
    file = _open(data, limits or ImageLimits())
    image, orientation = _load(file.image)
    if image.mode not in ("L", "RGB", "RGBA", "P", "CMYK", "1") or file.stated_bits is not None:
        _to_rgb(image, file)  # modes whose pixels decide
    return ImageFacts(file.format, image.height, image.width, orientation, _largest(image, file))


def _largest(image: Image.Image, file: _File) -> int | None:
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
    file = _open(data, limits or ImageLimits())
    image, orientation = _load(file.image)
    return DecodedImage(np.asarray(_to_rgb(image, file)), file.format, orientation, _largest(image, file))


def check_bits(bits: int | None) -> None:
    """Raise OptionError unless bits is None or 9…16."""
    if bits is not None and not (isinstance(bits, int) and 9 <= bits <= 16):
        raise OptionError(f"bits={bits!r} must lie in 9…16, the bits that samples stored in 16 bits make use of")


def spread_bits(data: bytes, bits: int, limits: ImageLimits | None = None) -> bytes:
    """Scale an image whose 16-bit samples use only the lower `bits` up to all 16, as an upright PNG; an image of 8 bits
    a sample is returned untouched.

    Raises:
        ImageError: as `decode_image`; "unsupported" also for values of more bits, and for 16-bit colours.
    """
    file = _open(data, limits or ImageLimits())
    if file.sample_bits <= 8:
        return data
    image, _ = _load(file.image)
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


MASK_WHITE = 250
"""A grey mask that reaches this value of 255 is black and white, whatever lies between."""

LOSSY_CLASSES = 32
"""In a mask of a lossy format smaller values are class numbers."""


@dataclass(frozen=True, eq=False)
class DecodedMask:
    """A mask and how its file was read.

    Attributes:
        pixels: H×W uint8 of 0 and 255, upright as the file's own EXIF orientation says.
        halved: whether values were shades, and only those of more than half of white are anomalous.
        orientation: of EXIF, 1…8; None if the file has none.
    """

    pixels: np.ndarray
    halved: bool
    orientation: int | None


def decode_mask(data: bytes, threshold: int | None = None, limits: ImageLimits | None = None) -> np.ndarray:
    """Decode a mask file to H×W uint8 of 0 and 255; see `read_mask`."""
    return read_mask(data, threshold, limits=limits).pixels


def read_mask(
    data: bytes, threshold: int | None = None, invert: bool = False, limits: ImageLimits | None = None
) -> DecodedMask:
    """Decode a mask file.

    Args:
        data: encoded image. Of a colour the brightest channel counts; what is wholly transparent is background, what
            is partly transparent lies on black. A palette of greys stands for its shades; of one of colours, the
            entries' numbers are class numbers where entry 0 is black or transparent, or no entry that is used, else its
            colours count.
        threshold: values above this are anomalous. None takes what the file shows to be right: 0 for class numbers and
            for black and white; half of white for shades, which are what a lossy format such as JPEG makes of black
            and white, and anti-aliased edges. Class numbers lie in areas and shades do not.
        invert: black is anomalous and white is not.
        limits: what the file may cost.

    Raises:
        ImageError: as `decode_image`.
    """
    file = _open(data, limits or ImageLimits())
    image, orientation = _load(file.image)
    values, colours, opaque = _mask_values(image, file)
    halved = False
    if threshold is None:
        white = 65535 if values.dtype.itemsize > 1 else 255
        largest = int(colours.max())
        if file.lossy and largest >= LOSSY_CLASSES:
            values, threshold = colours, largest // 2
            halved = True
        elif (
            not file.lossy and largest >= MASK_WHITE * white // 255 and _are_shades(colours, MASK_WHITE * white // 255)
        ):
            values, threshold = colours, white // 2
            halved = True
        else:
            threshold = 0
    marked = values > threshold
    if invert:
        marked = ~marked if opaque is None else ~marked & opaque
    return DecodedMask(np.where(marked, np.uint8(255), np.uint8(0)), halved, orientation)


def _mask_values(image: Image.Image, file: _File) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Values H×W that a threshold is held against, brightness H×W (of all but palettes the same), and which pixels are
    not wholly transparent, None for all."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # values of more than 8 bits
        hidden = image.info.get("transparency")
        if isinstance(hidden, int):
            opaque = values != hidden
            values = np.where(opaque, values, 0)
            return values, values, opaque
        return values, values, None
    if image.mode == "F":
        _to_rgb(image, file)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        values = np.asarray(image.convert("L"))
        return values, values, None
    if image.mode in ("P", "PA", "1", "L", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        layers = np.asarray(image.convert("RGBA"))
        alpha = layers[..., 3].astype(np.uint16)
        # rounded up, so that only what cannot be seen at all becomes black
        colours = ((layers[..., :3].max(axis=2) * alpha + 254) // 255).astype(np.uint8)
        opaque = alpha > 0
        if image.mode == "P" and not _has_grey_palette(image) and not _has_other_ground(image, layers):
            numbers = np.where(opaque, np.asarray(image), np.uint8(0))
            return numbers, colours, opaque
        return colours, colours, opaque
    colours = np.asarray(_to_rgb(image, file)).max(axis=2)
    return colours, colours, None


def _has_grey_palette(image: Image.Image) -> bool:
    """Whether this is a grey image saved with a palette; the order of its entries then means nothing."""
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _has_other_ground(image: Image.Image, layers: np.ndarray) -> bool:
    """Whether the background of a mask in colours, black or transparent, has another number than 0, as editors order
    palettes. Black may come again among the entries: where entry 0 is black, too, it is the background if it is used.
    """
    entries = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    numbers = np.asarray(image)
    if len(entries) and (_is_transparent(image, 0) or (not entries[0].any() and (numbers == 0).any())):
        return False
    # an index beyond the palette has no colour, whatever it is drawn as
    black = ~layers[..., :3].any(axis=2) & (numbers < len(entries))
    return bool((black | (layers[..., 3] == 0)).any())


def _is_transparent(image: Image.Image, entry: int) -> bool:
    hidden = image.info.get("transparency")
    return (
        hidden == entry if isinstance(hidden, int) else isinstance(hidden, bytes) and hidden[entry : entry + 1] == b"\0"
    )


def _are_shades(values: np.ndarray, white: int) -> bool:
    """Whether values between 0 and white are shades and no class numbers.

    They are if most of their pixels lie between a darker and a brighter neighbour, as at anti-aliased edges; or if few
    of them lie in areas of one value, and there are several up to three quarters of white or one that is nearly white,
    as JPEG leaves them around edges and a later file without loss keeps them.
    """
    between = (values > 0) & (values < white)
    count = np.count_nonzero(between)
    if not count:
        return False
    darkest, brightest = scipy.ndimage.minimum_filter(values, 3), scipy.ndimage.maximum_filter(values, 3)
    if 2 * np.count_nonzero(between & (darkest < values) & (values < brightest)) > count:
        return True
    found = np.unique(values[(values > 0) & (values < values.max())])
    several = len(found) >= 4 and found[-1] > 3 * (white // 4)
    flat = np.count_nonzero(between & (darkest == brightest))
    return bool((several or found[-1] >= white) and 2 * flat < count)


def covers_nearly_all(mask: np.ndarray) -> bool:
    """Whether an H×W mask marks so much that background and defect look exchanged: nine tenths of the image, or more
    than half of it and nine tenths of its border."""
    marked = mask > 0
    share = marked.mean()
    border = np.concatenate([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    return bool(share >= 0.9 or (share > 0.5 and border.mean() >= 0.9))


def turn_upright(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and flip an H×W mask as an EXIF orientation of 1…8 says of its image."""
    transpose = Image.Transpose
    how = {
        **{2: transpose.FLIP_LEFT_RIGHT, 3: transpose.ROTATE_180, 4: transpose.FLIP_TOP_BOTTOM},
        **{5: transpose.TRANSPOSE, 6: transpose.ROTATE_270, 7: transpose.TRANSVERSE, 8: transpose.ROTATE_90},
    }.get(orientation)
    return mask if how is None else np.asarray(Image.fromarray(mask).transpose(how))


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
    regions, count = scipy.ndimage.label(bright, _TOUCHING)
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
    cut = Image.fromarray(_cut_window(pixels, window))
    return np.asarray(cut.resize((window.side, window.side), Image.Resampling.BILINEAR))


def crop_mask(mask: np.ndarray, window: CropWindow) -> np.ndarray:
    """The window of an H×W mask, where `crop_image` has that of its image; resized as by `reduce_mask`."""
    return reduce_mask(_cut_window(mask, window), window.side, window.side)


def _cut_window(pixels: np.ndarray, window: CropWindow) -> np.ndarray:
    height, width = pixels.shape[:2]
    cut = np.zeros((window.length, window.length, *pixels.shape[2:]), np.uint8)
    top, bottom = max(window.top, 0), min(window.top + window.length, height)
    left, right = max(window.left, 0), min(window.left + window.length, width)
    cut[top - window.top : bottom - window.top, left - window.left : right - window.left] = pixels[
        top:bottom, left:right
    ]
    return cut


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
    """Resize an H×W mask of 0 and 255: nearest neighbour, but a thin defect keeps every cell that one of its pixels
    lies in.

    A defect is a connected region of the mask, pixels that touch at a corner included. It is thin if nearest neighbour
    leaves nothing of it, or less than half of its cells and these in pieces or without its ends.
    """
    reduced = _nearest(mask, height, width).copy()
    if mask.shape[0] <= height and mask.shape[1] <= width:
        return reduced  # every pixel has a cell
    regions, count = scipy.ndimage.label(mask, _TOUCHING)
    cells = _nearest(regions.astype(np.int32), height, width)
    # the cell of a pixel is the one its middle lies in
    row_of = (2 * np.arange(mask.shape[0]) + 1) * height // (2 * mask.shape[0])
    column_of = (2 * np.arange(mask.shape[1]) + 1) * width // (2 * mask.shape[1])
    first = regions > 0  # pixels whose neighbours to the left and above are of another region or cell
    first[:, 1:] &= (regions[:, 1:] != regions[:, :-1]) | (column_of[1:] != column_of[:-1])
    first[1:] &= (regions[1:] != regions[:-1]) | (row_of[1:] != row_of[:-1])[:, None]
    rows, columns = np.nonzero(first)
    pairs = np.unique(regions[first].astype(np.int64) * reduced.size + row_of[rows] * width + column_of[columns])
    numbers, places = np.divmod(pairs, reduced.size)
    touched, kept = np.bincount(numbers, minlength=count + 1), np.bincount(cells.ravel(), minlength=count + 1)
    reduced.flat[places[kept[numbers] == 0]] = 255
    ends = np.cumsum(touched)
    extents = scipy.ndimage.find_objects(cells, count)
    for number in np.flatnonzero((kept > 0) & (touched > 2 * kept)):
        own = places[ends[number] - touched[number] : ends[number]]
        extent = extents[number - 1]
        if _has_lost_parts(cells[extent] == number, own // width, own % width):
            reduced.flat[own] = 255
    return reduced


def _has_lost_parts(kept: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> bool:
    """Whether the cells kept of a defect that touches those in `rows` and `columns` are in pieces, or more than a cell
    short at an end."""
    shorter = max(np.ptp(rows) + 1 - kept.shape[0], np.ptp(columns) + 1 - kept.shape[1])
    return bool(shorter > 2 or scipy.ndimage.label(kept, _TOUCHING)[1] > 1)


_TOUCHING = np.ones((3, 3))  # pixels that touch at a corner are connected


def _nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))


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


LONGEST_SCALED = 64
MOST_SCALED = 1 << 26
"""An image that is to be enlarged and is more than so many times as long as wide, or would have more than so many
pixels, is not scaled as a whole: the part beyond the crop would cost gigabytes."""


def _scale_and_cut(image: Image.Image, policy: InputPolicy, resampling: Image.Resampling) -> np.ndarray:
    """Scale an image or mask, of any mode, and cut the crop."""
    width, height = _scaled_size(image.width, image.height, policy)
    long = max(width, height) > LONGEST_SCALED * min(width, height) or width * height > MOST_SCALED
    # a stretched image is no longer than wide
    if not long or policy.resize == "stretch" or policy.crop is None or min(width, height) <= min(image.size):
        if (width, height) != image.size:
            image = image.resize((width, height), resampling)
        return _cut(np.asarray(image), policy)
    top, left = round((height - policy.crop) / 2), round((width - policy.crop) / 2)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + policy.crop) * across, (top + policy.crop) * down)
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((policy.crop, policy.crop), resampling, box))


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
    if _scaled_size(width, height, policy) == (width, height):
        return np.ascontiguousarray(_pad(_cut(pixels, policy), policy))
    scaled = _scale_and_cut(Image.fromarray(pixels), policy, _INTERPOLATION[policy.interpolation])
    return np.ascontiguousarray(_pad(scaled, policy))


def decode_prepared(data: bytes, policy: InputPolicy, limits: ImageLimits | None = None) -> np.ndarray:
    """`prepare_image` of `decode_image`'s pixels, to the bit, in less time: grey is repeated after it is scaled.

    Raises:
        ImageError: as `decode_image`.
    """
    file = _open(data, limits or ImageLimits())
    image, _ = _load(file.image)
    if image.mode != "L":
        image = _to_rgb(image, file)
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
    width, height = _scaled_size(mask.shape[1], mask.shape[0], policy)
    if policy.mask_resize == "nearest" and (width < mask.shape[1] or height < mask.shape[0]):
        return _pad(_cut(reduce_mask(mask, height, width), policy), policy) > 0
    nearest = policy.mask_resize in ("nearest", "nearest_only")
    resampling = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    values = _pad(_scale_and_cut(Image.fromarray(mask), policy, resampling), policy)
    above = {"bilinear_half": 127, "bilinear_full": 254}.get(policy.mask_resize, 0)
    return values > above


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
