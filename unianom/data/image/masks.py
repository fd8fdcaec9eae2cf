"""Mask files to black and white."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from unianom.data.image.decode import ImageFile, load_image, open_image, to_rgb
from unianom.data.image.options import ImageLimits

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


def marks_anything(data: bytes, threshold: int | None = None, limits: ImageLimits | None = None) -> bool:
    """Return whether any pixel of a mask file is anomalous, as `decode_mask` would have it, but sooner.

    Raises:
        ImageError: as `decode_image`.
    """
    file = open_image(data, limits or ImageLimits())
    image, _ = load_image(file)
    if image.mode in ("1", "L") and "transparency" not in image.info:
        # whatever threshold `read_mask` takes, it lies below the largest value unless that is 0
        return int(np.asarray(image.convert("L")).max()) > (threshold or 0)
    return bool(decode_mask(data, threshold, limits).any())


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
    file = open_image(data, limits or ImageLimits())
    image, orientation = load_image(file)
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


def _mask_values(image: Image.Image, file: ImageFile) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return values H×W that a threshold is held against, brightness H×W (of all but palettes the same), and which
    pixels are not wholly transparent, None for all."""
    if image.mode.startswith("I"):
        values = np.asarray(image)  # values of more than 8 bits
        hidden = image.info.get("transparency")
        if isinstance(hidden, int):
            opaque = values != hidden
            values = np.where(opaque, values, 0)
            return values, values, opaque
        return values, values, None
    if image.mode == "F":
        to_rgb(image, file)
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
    colours = np.asarray(to_rgb(image, file)).max(axis=2)
    return colours, colours, None


def _has_grey_palette(image: Image.Image) -> bool:
    """Return whether this is a grey image saved with a palette; the order of its entries then means nothing."""
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _has_other_ground(image: Image.Image, layers: np.ndarray) -> bool:
    """Return whether the background of a mask in colours, black or transparent, has another number than 0, as editors
    order palettes. Black may come again among the entries: where entry 0 is black, too, it is the background if it is
    used."""
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
    """Return whether values between 0 and white are shades and no class numbers.

    They are if most of their pixels lie between a darker and a brighter neighbour, as at anti-aliased edges; or if few
    of them lie in areas of one value, and there are several up to three quarters of white or one that is nearly white,
    as JPEG leaves them around edges and a later file without loss keeps them.
    """
    between = (values > 0) & (values < white)
    count = np.count_nonzero(between)
    if not count:
        return False
    from scipy import ndimage  # slow to import, and few images need it

    darkest, brightest = ndimage.minimum_filter(values, 3), ndimage.maximum_filter(values, 3)
    if 2 * np.count_nonzero(between & (darkest < values) & (values < brightest)) > count:
        return True
    found = np.unique(values[(values > 0) & (values < values.max())])
    several = len(found) >= 4 and found[-1] > 3 * (white // 4)
    flat = np.count_nonzero(between & (darkest == brightest))
    return bool((several or found[-1] >= white) and 2 * flat < count)


def covers_nearly_all(mask: np.ndarray) -> bool:
    """Return whether an H×W mask marks so much that background and defect look exchanged: nine tenths of the image, or
    more than half of it and nine tenths of its border."""
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
