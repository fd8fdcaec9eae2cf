"""Pictures of results: heat maps, overlays, mask outlines, and figures of curves and score distributions.

Every heat map of a set is drawn on one `HeatScale`, so that one colour is one anomaly value in all of them; a map
stretched to its own minimum and maximum shows noise on a normal image as red as a defect.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from unianom.metrics.curves import Curve

if TYPE_CHECKING:  # Matplotlib takes a while to import, and most jobs draw at their end only, or never
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Pixels = NDArray[np.uint8]

OUTLINE = (0, 229, 255)
"""RGB of mask outlines: cyan, which neither the heat colours nor most products have."""

NORMAL_COLOUR, ANOMALOUS_COLOUR = "#3f83c9", "#dd6b33"
"""Blue and orange stay apart for colour-blind eyes, on white and on black."""

_INK, _FAINT, _GRID = "#3a4150", "#9aa3b0", "#dde1e7"
_CSS_COLOURS = {_INK: "var(--ink)", _FAINT: "var(--faint)", _GRID: "var(--grid)"}

_PANEL_WIDTH, _PANEL_HEIGHT, _TITLE_HEIGHT = 3.1, 2.6, 0.3
_MARGINS = (0.56, 0.44, 0.12, 0.26)
"""Inches left, below, right and above the axes of a panel: fixed, since fitting them takes longer than drawing."""

_BINS = 40

_LABEL_WIDTH, _ROW_WIDTH, _ROW_HEIGHT, _ROW_GAP = 1.45, 3.9, 0.36, 0.08
"""Inches of the names beside rows of histograms, of a row, its height and what lies between two."""

_LABEL_LENGTH = 20


@cache
def heat_colours() -> Pixels:
    """Return 256×3 RGB of the heat maps, from least to most anomalous.

    They are inferno, whose lightness rises evenly, so that it reads the same in grey and for colour-blind eyes.
    """
    import matplotlib

    table = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)
    return np.ascontiguousarray(np.asarray(table)[:, :3])


@dataclass(frozen=True)
class HeatScale:
    """The range of anomaly values that all heat maps of a set share.

    Attributes:
        low: this value and all below are drawn in the first colour.
        high: this value and all above are drawn in the last colour.

    Raises:
        ValueError: a bound is not finite, or high is not above low.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a heat scale needs finite low < high, got {self.low} and {self.high}")

    def levels(self, anomaly_map: ArrayLike) -> Pixels:
        """Return the step of `heat_colours`, 0 to 255, of each value of an H×W map."""
        values = np.asarray(anomaly_map, dtype=np.float64)
        share = np.clip((values - self.low) / (self.high - self.low), 0, 1)
        return np.rint(share * 255).astype(np.uint8)

    def colours(self, anomaly_map: ArrayLike) -> Pixels:
        """Return the heat map H×W×3 uint8 RGB of an H×W map."""
        return heat_colours()[self.levels(anomaly_map)]


def heat_scale(normal: ArrayLike, anomalous: ArrayLike) -> HeatScale:
    """Return a scale on which the ordinary is dark and the brightest is what few pixels reach.

    Args:
        normal: map values of pixels of normal images, any shape, may be empty.
        anomalous: map values of pixels of anomalous images, best as many as of normal ones, may be empty.

    Returns:
        low = median of `normal` (of all values if there is none), high = 99.9th percentile of all values; low + 1
        where that is not above low (constant maps).

    Raises:
        ValueError: no values at all, or one is not finite.
    """
    background = np.ravel(np.asarray(normal, dtype=np.float64))
    every = np.concatenate([background, np.ravel(np.asarray(anomalous, dtype=np.float64))])
    if len(every) == 0 or not np.isfinite(every).all():
        raise ValueError("a heat scale needs finite map values")
    low = float(np.median(background if len(background) else every))
    high = float(np.percentile(every, 99.9))
    return HeatScale(low, high if high > low else low + 1)


def overlay(image: Pixels, anomaly_map: ArrayLike, scale: HeatScale, opacity: float = 0.75) -> Pixels:
    """Lay a heat map over its image, the more opaque the more anomalous, so that ordinary parts stay as they are.

    Args:
        image: H×W×3 uint8 RGB.
        anomaly_map: H×W.
        scale: range of values.
        opacity: of the last colour, 0 to 1; level l of 255 has opacity · l / 255.

    Returns:
        H×W×3 uint8 RGB: image · (1 − a) + heat colour · a.
    """
    levels = scale.levels(anomaly_map)
    if image.shape != (*levels.shape, 3):
        raise ValueError(f"an image of shape {image.shape} does not fit an anomaly map of shape {levels.shape}")
    alpha = opacity * levels[:, :, None] / 255  # H W 1
    return np.rint(image * (1 - alpha) + heat_colours()[levels] * alpha).astype(np.uint8)


def outline(mask: NDArray[np.bool_], width: int = 1) -> NDArray[np.bool_]:
    """Return pixels just outside a mask: not in it, but at most `width` pixels from it in each direction (H×W bool)."""
    side = 2 * width + 1
    grown = sliding_window_view(np.pad(mask, width), (side, side)).any(axis=(2, 3))
    return grown & ~mask


def draw_outline(
    image: Pixels, mask: NDArray[np.bool_], width: int = 1, colour: tuple[int, int, int] = OUTLINE
) -> Pixels:
    """Return a copy of an H×W×3 uint8 image with the outline of an H×W bool mask; the masked pixels stay visible."""
    drawn = image.copy()
    drawn[outline(mask, width)] = colour
    return drawn


def webp(image: Pixels, quality: int = 82) -> bytes:
    """Encode H×W×3 uint8 RGB as WebP, which every browser since 2020 shows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def jpeg(image: Pixels, quality: int = 82) -> bytes:
    """Encode H×W×3 uint8 RGB as JPEG, which every notebook and mail program shows."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def new_figure(panels: int = 1, title: str = "") -> tuple[Figure, list[Axes]]:
    """Return a figure of panels side by side, each 3.1 × 2.6 inches, with a title above them if one is given."""
    from matplotlib.figure import Figure

    height = _PANEL_HEIGHT + (_TITLE_HEIGHT if title else 0)
    figure = Figure(figsize=(panels * _PANEL_WIDTH, height))
    left, bottom, right, top = _MARGINS
    width, rise = _PANEL_WIDTH - left - right, _PANEL_HEIGHT - bottom - top
    lefts = [(number * _PANEL_WIDTH + left) / figure.get_figwidth() for number in range(panels)]
    if title:
        y = 1 - _TITLE_HEIGHT / 2 / height
        figure.text(lefts[0], y, title, fontsize=10, color=_INK, va="center", parse_math=False)
    sizes = (width / figure.get_figwidth(), rise / height)
    return figure, [figure.add_axes((x, bottom / height, *sizes)) for x in lefts]


_AXES = {
    "roc": ("ROC", "false-positive rate", "true-positive rate", 1.0),
    "pr": ("Precision–recall", "recall", "precision", 1.0),
    "pro": ("PRO", "false-positive rate (pixels)", "mean overlap per region", 0.3),
}


def draw_curves(
    axes: Axes,
    kind: Literal["roc", "pr", "pro"],
    curves: Mapping[str, Curve],
    context: Sequence[Curve] = (),
    point: tuple[float, float] | None = None,
) -> None:
    """Draw curves of one kind with the usual axes; PRO is drawn up to the rate of 0.3 that AUPRO goes to.

    Args:
        axes: what to draw on.
        kind: ROC, precision–recall or per-region overlap.
        curves: by the label in the legend, two at most; empty curves say that they are undefined.
        context: further curves, thin and without a label, e.g. of every category behind the union.
        point: false-positive and true-positive rate where a threshold operates.
    """
    from matplotlib.patches import Ellipse
    from matplotlib.ticker import PercentFormatter

    title, x_label, y_label, limit = _AXES[kind]
    for curve in context:
        axes.plot(*_cut(curve, limit), color=_FAINT, linewidth=0.6, alpha=0.7, clip_on=False)
    if kind == "roc":
        axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=0.8, linestyle=(0, (2, 3)), clip_on=False)
    for (label, curve), colour in zip(curves.items(), (NORMAL_COLOUR, ANOMALOUS_COLOUR), strict=False):
        if len(curve.x):
            axes.plot(*_cut(curve, limit), color=colour, linewidth=1.6, label=label, zorder=3, clip_on=False)
    if point is not None:
        # a patch, since markers become <use> elements, which need ids
        dot = Ellipse(point, width=0.032 * limit, height=0.038, color=_INK, label="threshold", zorder=4, clip_on=False)
        axes.add_patch(dot)
    margin = 0.02
    axes.set_xlim(-margin * limit, limit * (1 + margin))
    axes.set_ylim(-margin, 1 + margin)
    ticks = np.linspace(0, limit, 4 if kind == "pro" else 6)
    _dress(axes, title, x_label, y_label, legend="best" if kind == "pr" else "lower right")
    axes.set_xticks(ticks)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if not any(len(curve.x) for curve in curves.values()):
        _write_undefined(axes)


def _cut(curve: Curve, limit: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y of a curve up to x = limit, where it ends on an interpolated point."""
    if len(curve.x) == 0 or curve.x[-1] <= limit:
        return curve.x, curve.y
    inside = curve.x < limit
    return np.append(curve.x[inside], limit), np.append(curve.y[inside], np.interp(limit, curve.x, curve.y))


def draw_histogram(axes: Axes, normal: ArrayLike, anomalous: ArrayLike, threshold: float | None = None) -> None:
    """Draw how scores are spread, normal and anomalous images on one axis, each as a share of its own number.

    Args:
        axes: what to draw on.
        normal: (n,) scores of normal images, may be empty.
        anomalous: (m,) scores of anomalous images, may be empty.
        threshold: scores above it fail.
    """
    groups = [(normal, "normal", NORMAL_COLOUR), (anomalous, "anomalous", ANOMALOUS_COLOUR)]
    draw_scores(axes, groups, threshold)


def draw_scores(axes: Axes, groups: Sequence[tuple[ArrayLike, str, str]], threshold: float | None = None) -> None:
    """Draw how the scores of groups of images are spread on one axis, each as a share of its own number.

    Args:
        axes: what to draw on.
        groups: (n,) scores, name and colour of each; scores may be empty.
        threshold: scores above it fail.
    """
    from matplotlib.ticker import MaxNLocator

    given = [(np.asarray(scores, dtype=np.float64), name, colour) for scores, name, colour in groups]
    every = np.concatenate([*(scores for scores, _, _ in given), np.zeros(0)])
    if len(every):
        edges = np.histogram_bin_edges(every, _BINS)
        for scores, name, colour in given:
            if len(scores):
                share = np.histogram(scores, edges)[0] / len(scores)
                label = f"{name} ({len(scores):,})"
                axes.stairs(share, edges, fill=True, color=colour, alpha=0.45, linewidth=0, clip_on=False)
                axes.stairs(share, edges, color=colour, linewidth=1.2, label=label, clip_on=False)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    if threshold is not None:
        label = f"threshold {threshold:.4g}"
        axes.axvline(threshold, color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), label=label, clip_on=False)
    _dress(axes, "Image scores", "score", "share of images", legend="best")
    if not len(every):
        _write_undefined(axes)


def score_rows(
    columns: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]], names: Sequence[str], thresholds: Sequence[float]
) -> Figure:
    """Score histograms, one row a category, all rows of a column on one axis: where categories lie apart, no one
    threshold suits them all (as Fig. 5 of the class-agnostic distribution alignment paper shows it).

    Args:
        columns: by title, scores of normal and of anomalous images of each category; either may be empty.
        names: of the categories.
        thresholds: of the first column; drawn through all rows.
    """
    from matplotlib.figure import Figure

    rows = len(names)
    top, bottom, gap = 0.52, 0.34, 0.3
    height = top + bottom + rows * (_ROW_HEIGHT + _ROW_GAP)
    width = _LABEL_WIDTH + len(columns) * (_ROW_WIDTH + gap)
    figure = Figure(figsize=(width, height))
    for place, (title, groups) in enumerate(columns.items()):
        left = _LABEL_WIDTH + place * (_ROW_WIDTH + gap)
        every = np.concatenate([np.ravel(np.asarray(scores, np.float64)) for pair in groups for scores in pair])
        edges = np.histogram_bin_edges(every, 2 * _BINS) if len(every) else np.linspace(0, 1, 3)
        figure.text(left / width, 1 - 0.14 / height, title, fontsize=9, fontweight="bold", color=_INK, va="center")
        for row, (normal, anomalous) in enumerate(groups):
            base = bottom + (rows - 1 - row) * (_ROW_HEIGHT + _ROW_GAP)
            axes = figure.add_axes((left / width, base / height, _ROW_WIDTH / width, _ROW_HEIGHT / height))
            _draw_row(axes, edges, normal, anomalous)
            for threshold in thresholds if place == 0 else ():
                axes.axvline(threshold, color=_INK, linewidth=1.0, linestyle=(0, (4, 2)), clip_on=False)
            axes.tick_params(length=0, labelsize=7, labelcolor=_INK, labelbottom=row == rows - 1)
            if place == 0:
                name = names[row]
                shown = name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…"
                at = (left - 0.1) / width
                middle = (base + _ROW_HEIGHT / 2) / height
                figure.text(at, middle, shown, fontsize=8, color=_INK, ha="right", va="center", parse_math=False)
    keys = [("normal", NORMAL_COLOUR), ("anomalous", ANOMALOUS_COLOUR)]
    for number, (word, colour) in enumerate(keys):
        at = (_LABEL_WIDTH + 0.75 * number) / width
        figure.text(at, 1 - 0.36 / height, word, fontsize=8, color=colour, va="center", fontweight="bold")
    if thresholds:
        at = (_LABEL_WIDTH + 1.75) / width
        figure.text(at, 1 - 0.36 / height, "dashed: threshold", fontsize=8, color=_INK, va="center")
    return figure


def _draw_row(axes: Axes, edges: NDArray[np.float64], normal: ArrayLike, anomalous: ArrayLike) -> None:
    """Return the normal and anomalous scores of one category, each to its own height."""
    for scores, colour in ((normal, NORMAL_COLOUR), (anomalous, ANOMALOUS_COLOUR)):
        counts = np.histogram(np.asarray(scores, np.float64), edges)[0]
        if counts.any():
            axes.stairs(counts / counts.max(), edges, fill=True, color=colour, alpha=0.5, linewidth=0, clip_on=False)
            axes.stairs(counts / counts.max(), edges, color=colour, linewidth=0.9, clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.08)
    axes.set_yticks([])
    axes.grid(axis="x", color=_GRID, linewidth=0.6, clip_on=False)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def quiet(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give axes a light grid, no frame and small type."""
    axes.set_title(title, fontsize=9, color=_INK, loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel(x_label, fontsize=8, color=_INK)
    axes.set_ylabel(y_label, fontsize=8, color=_INK)
    axes.tick_params(length=0, labelsize=7, labelcolor=_INK)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _dress(
    axes: Axes,
    title: str,
    x_label: str,
    y_label: str,
    legend: Literal["best", "lower right"],
) -> None:
    """Dress axes quietly, with a legend where there is anything to tell."""
    quiet(axes, title, x_label, y_label)
    axes.grid(color=_GRID, linewidth=0.6, clip_on=False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, frameon=False, loc=legend, labelcolor=_INK, handlelength=1.4)


def _write_undefined(axes: Axes) -> None:
    axes.text(0.5, 0.5, "undefined", transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_FAINT)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, 160 dots an inch; equal figures give equal bytes.

    Letters that the font lacks are taken from other fonts of this machine, and written as `drawable` does where it has
    none.
    """
    buffer = io.BytesIO()
    with _drawable_texts(figure):
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def drawable(text: str, letters: Collection[int] | None = None) -> str:
    """Return a text with letters that cannot be drawn written as their code, such as \\u87ba.

    Args:
        text: such as the name of a category.
        letters: code points that can be drawn; by default those of the font that Matplotlib brings along.
    """
    known = letters_of(font_file()) if letters is None else letters
    return "".join(
        letter if ord(letter) in known or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


@cache
def font_file() -> str:
    """Return the file of the font of all figures."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def letters_of(file: str) -> frozenset[int]:
    """Return the code points that a font file can draw; none for one that cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _other_fonts(missing: frozenset[int]) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return families of this machine that have some of the missing letters, as few as there must be, and these
    letters."""
    from matplotlib.font_manager import fontManager

    families: list[str] = []
    found: frozenset[int] = frozenset()
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        # the last resort has a box for every letter
        if missing <= found or "Last Resort" in entry.name or entry.style != "normal" or entry.name in families:
            continue
        if new := (letters_of(entry.fname) & missing) - found:
            families.append(entry.name)
            found |= new
    return tuple(families), found


@contextmanager
def _drawable_texts(figure: Figure) -> Iterator[None]:
    """Make all texts of a figure drawable without boxes, for the length of the block."""
    from matplotlib.text import Text

    before: list[tuple[Text, str, list[str], float | str]] = []
    for text in figure.findobj(Text):
        words = text.get_text()
        missing = frozenset(map(ord, words)) - letters_of(font_file()) - {10}
        if missing:
            before.append((text, words, text.get_fontfamily(), text.get_fontsize()))
            families, found = _other_fonts(missing)
            text.set_fontfamily([*text.get_fontfamily(), *families])
            text.set_text(drawable(words, letters_of(font_file()) | found))
            _shrink_to_fit(text, figure)
    try:
        yield
    finally:
        for text, words, family, size in before:
            text.set_text(words)
            text.set_fontfamily(family)
            text.set_fontsize(size)


def _shrink_to_fit(text: Text, figure: Figure) -> None:
    """Make a text smaller that would run over the left or right edge of its figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    box = text.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    over = max(-box.x0, box.x1 - figure.bbox.width, 0.0)
    if over:
        text.set_fontsize(text.get_fontsize() * max(0.97 - over / box.width, 0.1))  # widths differ with the size


def svg(figure: Figure) -> str:
    """Return a figure as an <svg> element for an HTML page.

    Text stays text in the page's font, so that letters which the fonts here lack show all the same. What is neither
    blue nor orange takes the page's CSS variables --ink, --faint and --grid, so that it shows on light and dark
    grounds. It holds no ids, so that many fit on a page.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # only measured here; the page draws it
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:id|xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\.(\d\d)\d+", r".\1", path[0]), text)  # a hundredth of a point
    for colour, variable in _CSS_COLOURS.items():
        text = text.replace(colour, variable)
    return text
