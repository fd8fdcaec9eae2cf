"""Pictures in rows and columns with words beside them: what a notebook or a page shows at one look."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unianom.visual import HeatScale, Pixels, drawable, font_file

GAP, LINE, TEXT = 6, 15, 11
"""Pixels between pictures, of a line of text and of its letters."""

BAR_WIDTH, BAR_HEIGHT = 160, 10
"""Pixels of the bar that shows a heat scale."""

_INK = "#3a4150"


def picture_grid(
    rows: Sequence[Sequence[Pixels | None]],
    captions: Sequence[Sequence[str]] = (),
    columns: Sequence[str] = (),
    side: int = 150,
    scale: HeatScale | None = None,
) -> Pixels:
    """Lay pictures out in rows and columns, on white.

    Args:
        rows: pictures, H×W×3 uint8 RGB of any size; None leaves a place empty.
        captions: a text below each picture, of the same form as `rows`; lines are parted by "\\n". What is wider than
            the picture is cut off.
        columns: a text above each column.
        side: pixels of the longer side of each picture.
        scale: the one that heat maps in these pictures share; drawn as a bar below them, with its bounds.

    Returns:
        H×W×3 uint8 RGB.

    Raises:
        ValueError: there is no picture, or captions or columns are of another form than the rows.
    """
    width = max((len(row) for row in rows), default=0)
    if not any(picture is not None for row in rows for picture in row):
        raise ValueError("a grid needs a picture")
    if captions and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError(f"give one caption for each picture: {[len(row) for row in rows]} in the rows")
    if columns and len(columns) != width:
        raise ValueError(f"{len(columns)} names for {width} columns; give one each")
    lines = [max((text.count("\n") + 1 for text in row if text), default=0) for row in captions] or [0] * len(rows)
    head = LINE if columns else 0
    foot = BAR_HEIGHT + LINE if scale is not None else 0
    heights = [side + GAP + LINE * count for count in lines]
    page = Image.new("RGB", (width * (side + GAP) + GAP, head + sum(heights) + GAP + foot), "white")
    pen = ImageDraw.Draw(page)
    for number, name in enumerate(columns):
        _write(pen, GAP + number * (side + GAP), 1, name, side, bold=True)
    top = head + GAP
    for number, row in enumerate(rows):
        for place, picture in enumerate(row):
            left = GAP + place * (side + GAP)
            if picture is not None:
                page.paste(_sized(picture, side), (left, top))
            if captions:
                for line, text in enumerate(captions[number][place].split("\n")):
                    _write(pen, left, top + side + 1 + LINE * line, text, side)
        top += heights[number]
    if scale is not None:
        _draw_scale(page, pen, scale, top)
    return np.asarray(page)


def _sized(picture: Pixels, side: int) -> Image.Image:
    """Return a picture whose longer side is `side`; small ones are enlarged without smoothing, so that pixels show."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    longer = max(image.size)
    size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
    return image.resize(size, Image.Resampling.NEAREST if longer < side else Image.Resampling.LANCZOS)


def _draw_scale(page: Image.Image, pen: ImageDraw.ImageDraw, scale: HeatScale, top: int) -> None:
    width = min(BAR_WIDTH, page.width // 3)
    steps = np.linspace(scale.low, scale.high, width)
    low, high = (f"{bound:,.0f}" if abs(bound) >= 1000 else f"{bound:.3g}" for bound in (scale.low, scale.high))
    start = GAP + round(_font(False).getlength(low)) + GAP
    page.paste(Image.fromarray(np.tile(scale.colours(steps[None]), (BAR_HEIGHT, 1, 1))), (start, top + 2))
    pen.text((GAP, top), low, fill=_INK, font=_font(False))
    pen.text((start + width + GAP, top), f"{high}  anomaly value, one scale for all", fill=_INK, font=_font(False))


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, text: str, width: int, bold: bool = False) -> None:
    """Write one line, cut to a width in pixels."""
    shown = drawable(text)
    while shown and _font(bold).getlength(shown) > width:
        shown = shown[:-1]
    pen.text((left, top), shown, fill=_INK, font=_font(bold))


@cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    file = font_file()
    return ImageFont.truetype(file.replace("DejaVuSans.ttf", "DejaVuSans-Bold.ttf") if bold else file, TEXT)


def crop_around(picture: Pixels, place: tuple[float, float], side: int) -> Pixels:
    """Return a square of side × side pixels around a place, moved so that it lies inside the picture.

    Args:
        picture: H×W×3 uint8, no side shorter than `side`.
        place: y and x of its middle, in pixels.
        side: pixels.

    Raises:
        ValueError: the picture is smaller.
    """
    if min(picture.shape[:2]) < side:
        raise ValueError(f"a picture of shape {picture.shape} has no square of {side} pixels a side")
    top, left = (
        int(np.clip(round(middle - side / 2), 0, length - side)) for middle, length in zip(place, picture.shape[:2])
    )
    return picture[top : top + side, left : left + side]
