"""How an image becomes the input of a network, and what it may cost: options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from unianom.errors import ImageError, OptionError
from unianom.options import ADDED_LATER, AtLeastOne, Options, Positive, ValueRefused

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageLimits(Options):
    """What an image may cost before it is refused; one that is too large is not decoded.

    Args:
        max_pixels: height times width, read from the header.
        max_bytes: size of the encoded file.
        seconds: that reading and decoding it, with its masks, may take in a job; null for no limit. An image that takes
            longer has the status "timeout".
    """

    max_pixels: AtLeastOne = 100_000_000
    max_bytes: Annotated[int, Interval(ge=1, le=(1 << 31) - 1)] = 256 << 20  # what a column of a batch can hold
    # long enough for all tries at a store that is away for a while, which is no fault of an image
    seconds: Positive | None = field(default=200.0, metadata=ADDED_LATER)

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
        resize: scale the shorter side and crop ("short_side"), or "stretch" both; the centre crop hides what lies at
            the border.
        size: pixels of that side, or of both, after scaling.
        crop: pixels of the centre crop, for "short_side".
        pad: zero-pad to this many pixels on each side (black before normalisation), for small images.
        interpolation: filter for images; "bilinear", "bicubic" or "lanczos", antialiased.
        mask_resize: "nearest" neighbour, but a defect so thin that it would vanish or fall to pieces keeps every
            cell that it touches. The others follow published code: nearest neighbour alone
            ("nearest_only"), or bilinear, then ">0" ("bilinear_any"), ">0.5" ("bilinear_half") or full white only
            ("bilinear_full").
        mean, std: per channel, on a 0…1 scale; null takes those of the backbone's weights.
        decode: "full", or "scaled": JPEG files are decoded at a half, a quarter or an eighth of their size where that
            is no smaller than what they are scaled to. Large files then cost less, and pixels differ a little.
    """

    usual = ("resize", "size")

    resize: Literal["short_side", "stretch"] = "short_side"
    size: Side = 256
    crop: Side | None = 224
    pad: Side | None = None
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    mask_resize: Literal["nearest", "nearest_only", "bilinear_any", "bilinear_half", "bilinear_full"] = "nearest"
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    decode: Literal["full", "scaled"] = field(default="full", metadata=ADDED_LATER)

    def check(self) -> None:
        if self.resize == "short_side" and self.crop is None:
            raise ValueRefused("resize=short_side needs a crop, since images of a batch must be of one size")
        if self.cut > self.size:
            raise ValueRefused(f"crop={self.crop} must be at most size={self.size}")
        if self.pad is not None and self.pad < self.cut:
            raise ValueRefused(f"pad={self.pad} is smaller than the image of {self.cut} pixels it should hold")

    @property
    def cut(self) -> int:
        """Height and width after scaling and cutting, in pixels."""
        return self.size if self.resize == "stretch" or self.crop is None else self.crop

    @property
    def side(self) -> int:
        """Height and width of the network's input, in pixels."""
        return self.pad or self.cut


Bits = Annotated[int, Interval(ge=9, le=16)]
"""Bits that samples stored in 16 bits make use of."""


def check_bits(bits: int | None) -> None:
    """Raise OptionError unless bits is None or 9…16."""
    if bits is not None and not (isinstance(bits, int) and 9 <= bits <= 16):
        raise OptionError(f"bits={bits!r} must lie in 9…16, the bits that samples stored in 16 bits make use of")
