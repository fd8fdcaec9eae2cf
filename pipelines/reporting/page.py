"""What every page is filled from: the templates, and the parts that all kinds of reports have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.reporting.gallery import Judged
from pipelines.reporting.heat_scales import MarkedScale, scale_key
from pipelines.reporting.inputs import ReportInput
from pipelines.reporting.pictures import Card, Pictures
from pipelines.reporting.samples import text_column
from unianom import visual

TALLEST, WIDEST = 1.0, 1.8
"""Width by height of the frame of a picture; what is taller or wider stands inside it."""


@cache
def templates() -> jinja2.Environment:
    """Return the templates of this folder."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def svg(draw: Callable[[Axes], None]) -> Markup:
    """Draw one panel as inline SVG."""
    figure, (axes,) = visual.new_figure()
    draw(axes)
    return figure_svg(figure)


def figure_svg(figure: Figure) -> Markup:
    """Return a figure as inline SVG."""
    return Markup(visual.svg(figure))  # matplotlib escapes the text it writes


def colours() -> dict[str, str]:
    """Return the heat colours as a CSS gradient, and the colour of outlines."""
    return {
        "heat_gradient": ", ".join("rgb({} {} {})".format(*colour) for colour in visual.heat_colours()[::15]),
        "outline": "rgb({} {} {})".format(*visual.OUTLINE),
    }


def frame_ratio(cards: Sequence[Card]) -> float:
    """Return width by height of the frames of some pictures: that of the median one, within bounds."""
    ratios = sorted(card.ratio for card in cards)
    middle = ratios[len(ratios) // 2] if ratios else 1.0
    return round(min(WIDEST, max(TALLEST, middle)), 3)


def scales_of(
    inputs: Sequence[ReportInput], pictures: Pictures, samples: Judged, rows: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the scales of the heat maps of some samples: the input's name, the scale, and where its threshold is.

    The name is "" where the report has one input.
    """
    shown: list[dict[str, Any]] = []
    for number, entry in enumerate(inputs):
        model = text_column(entry.table, "model")[samples.rows[list(rows), number]]
        keys = dict.fromkeys(scale_key(entry, *pair) for pair in zip(model, samples.category[list(rows)], strict=True))
        for key in keys:
            if scale := pictures.scales[number].get(key):
                shown.append(_scale(entry.name if len(inputs) > 1 else "", scale))
    return shown


def _scale(name: str, scale: MarkedScale) -> dict[str, Any]:
    position = scale.position
    return {
        "name": name,
        "low": number(scale.heat.low),
        "high": number(scale.heat.high),
        "mark": None if scale.threshold is None else "" if not scale.exact else number(scale.threshold),
        "position": None if position is None else f"{100 * position:.1f}",
    }


def number(value: float) -> str:
    """Return a number with four digits or more, none of them an exponent's unless it is tiny."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def legend(pictures: Pictures) -> dict[str, bool]:
    """Return what of the pictures has to be explained."""
    cards = pictures.cards.values()
    return {
        "pictures": bool(pictures.cards),
        "maps": pictures.have_maps,
        "mask": any(card.has_mask for card in cards),
        "hidden": any(card.hidden for card in cards),
    }
