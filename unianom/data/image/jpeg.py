"""JPEG files decoded by libjpeg-turbo itself, at less cost than through Pillow and to the same pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image


def decode_jpeg(data: bytes, image: Image.Image) -> np.ndarray | None:
    """Decode a grey or coloured JPEG file.

    Args:
        data: the file.
        image: the same, as Pillow opened it; a size that its draft mode has reduced is kept to.

    Returns:
        H×W or H×W×3 uint8, equal to Pillow's pixels; the EXIF orientation is not applied. None where Pillow has to
        decode it, or to say what is wrong: other formats and colour modes, and files that are damaged.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    import simplejpeg  # where nothing is decoded, as beside a network alone, it need not be there

    colours = "GRAY" if image.mode == "L" else "RGB"
    try:  # the least size is that of the file, or what Pillow's draft mode made of it
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, colours, min_height=image.height, min_width=image.width)
    except Exception:  # libjpeg only warned, and Pillow takes it; or Pillow says what is wrong
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    return pixels[:, :, 0] if image.mode == "L" else pixels
