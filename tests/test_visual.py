"""Heat maps, overlays and outlines against pixels worked out by hand; figures by what is drawn into them."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from unianom import visual
from unianom.metrics.curves import Curve
from unianom.visual import (
    HeatScale,
    draw_curves,
    draw_histogram,
    draw_outline,
    heat_colours,
    heat_scale,
    jpeg,
    new_figure,
    outline,
    overlay,
    png,
    score_rows,
    svg,
    webp,
)


def test_levels_are_linear_between_the_bounds_and_cut_outside():
    scale = HeatScale(10.0, 20.0)
    assert scale.levels(np.array([[0, 10, 12], [15, 20, 99]])).tolist() == [[0, 0, 51], [128, 255, 255]]


def test_heat_colours_are_those_of_inferno():
    colours = HeatScale(0, 1).colours(np.array([[0.0, 1.0, 0.2]]))
    expected = np.array([matplotlib.colormaps["inferno"](share)[:3] for share in (0.0, 1.0, 0.2)])
    assert colours.dtype == np.uint8
    np.testing.assert_allclose(colours[0] / 255, expected, atol=1 / 255)


def test_equal_values_have_equal_colours_whatever_else_is_in_the_map():
    scale = HeatScale(0, 4)
    quiet, loud = np.array([[0.0, 1.0]]), np.array([[1.0, 400.0]])
    assert scale.colours(quiet)[0, 1].tolist() == scale.colours(loud)[0, 0].tolist()


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (float("nan"), 1), (0, float("inf"))])
def test_scale_refuses_bounds_that_are_no_range(low: float, high: float):
    with pytest.raises(ValueError, match="finite low < high"):
        HeatScale(low, high)


def test_heat_scale_goes_from_the_median_of_normal_pixels_to_the_top_of_all():
    normal, anomalous = np.arange(1000.0), np.arange(1000.0, 2000.0)
    scale = heat_scale(normal.reshape(10, 100), anomalous)
    assert scale.low == 499.5
    assert scale.high == pytest.approx(1999 * 0.999)  # values 0 … 1999: percentile p is 1999 · p / 100


def test_heat_scale_without_normal_images_or_without_variation():
    assert heat_scale([], [1.0, 2.0, 3.0]).low == 2.0
    assert heat_scale([5.0, 5.0], [5.0]) == HeatScale(5.0, 6.0)
    with pytest.raises(ValueError, match="finite map values"):
        heat_scale([], [])
    with pytest.raises(ValueError, match="finite map values"):
        heat_scale([1.0, float("nan")], [2.0])


def test_overlay_is_transparent_where_nothing_is_anomalous_and_blends_by_level():
    image = np.full((1, 3, 3), (200, 100, 50), np.uint8)
    scale = HeatScale(0, 255)
    got = overlay(image, np.array([[0, 102, 255]]), scale, opacity=0.5)
    assert got[0, 0].tolist() == [200, 100, 50]
    # level 102 of 255 at opacity 0.5 is alpha 0.2; level 255 is alpha 0.5
    for column, alpha in ((1, 0.2), (2, 0.5)):
        level = (0, 102, 255)[column]
        expected = [
            round(p * (1 - alpha) + int(c) * alpha) for p, c in zip((200, 100, 50), heat_colours()[level], strict=True)
        ]
        assert got[0, column].tolist() == expected
    assert image[0, 2].tolist() == [200, 100, 50], "the image itself stays as it was"


def test_overlay_refuses_a_map_of_another_size():
    with pytest.raises(ValueError, match="does not fit"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2)), HeatScale(0, 1))


def test_outline_surrounds_the_mask_and_leaves_it_visible():
    mask = np.zeros((5, 6), bool)
    mask[2, 2:4] = True
    expected = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 1, 0, 0, 1, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
        bool,
    )
    np.testing.assert_array_equal(outline(mask), expected)
    drawn = draw_outline(np.full((5, 6, 3), 7, np.uint8), mask, colour=(1, 2, 3))
    np.testing.assert_array_equal((drawn == (1, 2, 3)).all(axis=2), expected)
    np.testing.assert_array_equal((drawn == 7).all(axis=2), ~expected)


def test_outline_of_a_given_width_stops_at_the_border():
    mask = np.zeros((6, 6), bool)
    mask[0, 0] = True
    got = outline(mask, width=2)
    assert got.sum() == 8  # 3 × 3 in the corner without the pixel itself
    assert got[:3, :3].sum() == 8
    assert not outline(np.ones((3, 3), bool)).any()


def test_webp_keeps_size_and_nearly_the_colours():
    image = np.zeros((16, 24, 3), np.uint8)
    image[:, 12:] = (0, 229, 255)
    got = np.asarray(Image.open(io.BytesIO(webp(image))).convert("RGB")).astype(int)
    assert got.shape == image.shape
    assert np.abs(got - image).mean() < 6


CURVE = Curve(np.array([0, 0, 0.5, 1]), np.array([0, 0.5, 0.75, 1]))
EMPTY = Curve(np.empty(0), np.empty(0))


def _line(axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def test_jpeg_keeps_size_and_nearly_the_colours():
    ramp = np.linspace(0, 255, 64)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 128), axis=2).astype(np.uint8)
    got = np.asarray(Image.open(io.BytesIO(jpeg(image)))).astype(int)
    assert got.shape == image.shape
    assert np.abs(got - image).mean() < 4


def test_curves_are_drawn_as_given():
    figure, (axes,) = new_figure()
    draw_curves(axes, "roc", {"image": CURVE, "pixel": EMPTY}, context=[CURVE, CURVE], point=(0.25, 0.6))
    assert _line(axes, "image") == (CURVE.x.tolist(), CURVE.y.tolist())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["image", "threshold"]
    (dot,) = axes.patches
    assert dot.center == (0.25, 0.6)
    assert len(axes.lines) == 4  # two categories, chance, the curve
    assert figure.axes == [axes]


def test_pro_ends_at_its_limit_on_an_interpolated_point():
    _, (axes,) = new_figure()
    draw_curves(axes, "pro", {"AUPRO": CURVE})
    x, y = _line(axes, "AUPRO")
    assert x == [0, 0, 0.3]
    assert y == pytest.approx([0, 0.5, 0.5 + 0.25 * 0.3 / 0.5])


def test_undefined_curves_and_scores_are_said_to_be_undefined():
    for draw in (
        lambda axes: draw_curves(axes, "pr", {"image": EMPTY}),
        lambda axes: draw_histogram(axes, [], []),
    ):
        figure, (axes,) = new_figure()
        draw(axes)
        assert "undefined" in svg(figure)


def test_histogram_shows_shares_of_each_kind_on_one_axis():
    _, (axes,) = new_figure()
    normal, anomalous = np.array([0.0, 0.0, 0.0, 1.0]), np.array([1.0, 40.0])
    draw_histogram(axes, normal, anomalous, threshold=3.5)
    outlines = {patch.get_label(): patch.get_data() for patch in axes.patches if not patch.get_fill()}
    assert list(outlines) == ["normal (4)", "anomalous (2)"]
    first, second = outlines.values()
    np.testing.assert_array_equal(first.edges, second.edges)
    assert (first.edges[0], first.edges[-1]) == (0, 40)
    assert first.values[[0, 1]].tolist() == [0.75, 0.25]
    assert second.values[[1, -1]].tolist() == [0.5, 0.5]
    assert axes.lines[-1].get_xdata() == [3.5, 3.5]


def test_rows_of_scores_share_the_axis_of_their_column():
    raw = [(np.array([0.0, 1.0]), np.array([2.0])), (np.array([40.0]), np.array([])), (np.array([]), np.array([60.0]))]
    moved = [(np.array([0.0]), np.array([1.0])) for _ in raw]
    names = ["disc", "a very long name of a category", "$x_1$"]
    figure = score_rows({"Raw scores": raw, "Calibrated scores": moved}, names, [30.0])
    left, right = figure.axes[:3], figure.axes[3:]
    assert len(right) == 3
    assert {axes.get_xlim() for axes in left} == {(0.0, 60.0)}
    assert {axes.get_xlim() for axes in right} == {(0.0, 1.0)}
    assert [len(axes.lines) for axes in left + right] == [1, 1, 1, 0, 0, 0], "the threshold is of raw scores"
    assert [len(axes.patches) for axes in left] == [4, 2, 2], "filled and outlined, of each kind that there is"
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "Raw scores"
    assert "a very long name of…" in words
    assert "clip-path" not in svg(figure), "it would need ids"


def test_svg_is_well_formed_and_fits_into_a_page():
    figure, (axes,) = new_figure()
    draw_curves(axes, "roc", {"<b>&$x": CURVE}, point=(0.1, 0.5))
    text = svg(figure)
    root = ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert "viewBox" in root.attrib
    assert not re.search(r"https?://|\sid=|url\(|<style|href", text), "nothing outside, and no ids that could clash"
    assert "var(--ink)" in text
    assert "var(--grid)" in text
    assert any("<b>&$x" in (node.text or "") for node in root.iter("text")), "text stays text, and is escaped"


def test_figures_are_the_same_bytes_every_time():
    def draw() -> tuple[bytes, str]:
        figure, axes = new_figure(2)
        draw_curves(axes[0], "pr", {"image": CURVE})
        draw_histogram(axes[1], [1.0, 2.0], [3.0])
        return png(figure), svg(figure)

    assert draw() == draw()
    assert Image.open(io.BytesIO(draw()[0])).size == (round(6.2 * 160), round(2.6 * 160))


# ---- letters that the font lacks -------------------------------------------------------------------------------------

STIX = visual.font_file().replace("DejaVuSans", "STIXGeneral")
FOREIGN = "螺丝 ضوء 🦊"


@pytest.fixture
def only_own_font(monkeypatch):
    """As on a machine without other fonts."""
    monkeypatch.setattr(visual, "_other_fonts", lambda missing: ((), frozenset()))


def test_letters_that_cannot_be_drawn_are_written_as_their_code():
    assert visual.drawable("Schraube é ✓ [a]\n") == "Schraube é ✓ [a]\n"
    assert visual.drawable("螺丝 1🦊") == "\\u87ba\\u4e1d 1\\U0001f98a"
    assert visual.drawable("螺丝", {ord("螺")}) == "螺\\u4e1d"


def test_control_characters_are_written_as_their_code(only_own_font):
    assert visual.drawable("a\tb\x01\n") == "a\\tb\\x01\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visual.png(named("a\tb\x01"))


def test_codes_do_not_run_over_the_edge_of_a_figure(only_own_font):
    """The name's codes are five times as long as its letters; half an inch of margin stays white."""
    figure = Figure(figsize=(3, 1))
    figure.text(0.5, 0.5, "螺丝螺丝螺丝", fontsize=8, ha="right")
    pixels = np.asarray(Image.open(io.BytesIO(visual.png(figure))).convert("L"))
    columns = np.flatnonzero((pixels < 128).any(axis=0))
    assert 0 < columns[0] < 40
    assert columns[-1] < 245
    assert figure.texts[0].get_fontsize() == 8


def named(words: str) -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.set_title(words, parse_math=False)
    axes.plot([0, 1], label=words)
    axes.legend()
    return figure


def test_a_picture_has_no_boxes_and_draws_without_a_warning(only_own_font):
    figure = named(FOREIGN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = visual.png(figure)
    assert content == visual.png(named(visual.drawable(FOREIGN)))
    assert figure.axes[0].get_title() == FOREIGN


def test_a_page_keeps_the_letters_and_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = visual.svg(named(FOREIGN))
    assert page.count(FOREIGN) == 2


def test_other_fonts_of_the_machine_are_taken(monkeypatch):
    """The letter is one that DejaVu Sans lacks and a mathematical font has."""
    letter = next(
        iter(sorted(visual.letters_of(STIX) - visual.letters_of(visual.font_file()) - set(range(0xE000, 0xF900))))
    )
    families, found = visual._other_fonts(frozenset({letter, 0x87BA}))
    assert letter in found
    assert families
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = visual.png(named(chr(letter)))
    assert content != visual.png(named(visual.drawable(chr(letter))))
