"""From encoded bytes to what a network sees, the same way in training, scoring, serving and export.

`decode_image` and `decode_mask` open bytes safely, `crop_image` and `crop_mask` cut out what a layout wants of them,
`prepare_image` and `prepare_mask` bring them to the model's input size; `tensors` makes the batch, on the host or on a
device. Nothing else in the project decodes, resizes or normalises images.
"""

from unianom.data.image.crop import CropWindow, crop_image, crop_mask, find_crop
from unianom.data.image.decode import FORMATS, DecodedImage, ImageFacts, check_image, decode_image, spread_bits
from unianom.data.image.encode import decode_map, encode_map, encode_png
from unianom.data.image.masks import (
    DecodedMask,
    covers_nearly_all,
    decode_mask,
    marks_anything,
    read_mask,
    turn_upright,
)
from unianom.data.image.options import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SIDE,
    Bits,
    ImageLimits,
    InputPolicy,
    Side,
    check_bits,
)
from unianom.data.image.prepare import (
    UprightImage,
    decode_prepared,
    decode_upright,
    fit_image,
    prepare_image,
    prepare_mask,
    reduce_image,
)
from unianom.data.image.reduce import reduce_mask

__all__ = [
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MAX_SIDE",
    "Bits",
    "CropWindow",
    "DecodedImage",
    "DecodedMask",
    "ImageFacts",
    "ImageLimits",
    "InputPolicy",
    "Side",
    "UprightImage",
    "check_bits",
    "check_image",
    "covers_nearly_all",
    "crop_image",
    "crop_mask",
    "decode_image",
    "decode_map",
    "decode_mask",
    "marks_anything",
    "decode_prepared",
    "decode_upright",
    "encode_map",
    "encode_png",
    "find_crop",
    "fit_image",
    "prepare_image",
    "prepare_mask",
    "read_mask",
    "reduce_image",
    "reduce_mask",
    "spread_bits",
    "turn_upright",
]
