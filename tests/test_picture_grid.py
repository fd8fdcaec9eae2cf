"""Pictures laid out in rows and columns."""

from __future__ import annotations

import numpy as np
import pytest

from unianom.picture_grid import GAP, LINE, crop_around, picture_grid
from unianom.visual import HeatScale, heat_colours

RED, BLUE = (np.full((10, 20, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))


def test_every_picture_lies_in_its_place() -> None:
    page = picture_grid([[RED, None], [None, BLUE]], side=40)
    assert page.shape == (2 * (40 + GAP) + GAP, 2 * (40 + GAP) + GAP, 3)
    where = [np.argwhere((page == colour).all(2)) for colour in ((200, 0, 0), (0, 0, 200))]
    step = 40 + GAP
    for found, corner in zip(where, ([GAP, GAP], [GAP + step, GAP + step]), strict=True):
        assert found.min(0).tolist() == corner
        assert (found.max(0) - found.min(0) + 1).tolist() == [20, 40]  # twice as wide as high, as it was
    assert (page == 255).all(2).sum() == page.shape[0] * page.shape[1] - 2 * 20 * 40


def test_words_stand_below_and_above_and_never_in_the_next_picture() -> None:
    long = "a caption that is far too long for one picture of this size"
    page = picture_grid([[RED, BLUE]], [[long, ""]], ["first", "second"], side=40)
    assert page.shape[0] == LINE + GAP + 40 + GAP + LINE + GAP - GAP
    under = page[LINE + GAP + 41 :]
    inked = np.argwhere((under != 255).any(2))[:, 1]
    assert inked.size
    assert inked.max() < GAP + 40 + GAP
    assert (page[:LINE] != 255).any()


def test_the_bar_runs_through_the_colours_of_the_scale() -> None:
    plain, page = (picture_grid([[RED] * 4], side=100, scale=scale) for scale in (None, HeatScale(0.5, 2000)))
    bar = page[plain.shape[0] + 5]
    colours = heat_colours()
    assert [tuple(colours[n]) for n in (0, 255)] == [
        tuple(bar[places[n]])
        for places, n in (
            (np.flatnonzero((bar == colours[0]).all(1)), 0),
            (np.flatnonzero((bar == colours[255]).all(1)), -1),
        )
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([[None]],), "needs a picture"),
        (([],), "needs a picture"),
        (([[RED, BLUE]], [["one"]]), "one caption for each"),
        (([[RED, BLUE]], (), ["one"]), "1 names for 2 columns"),
    ],
)
def test_what_is_no_grid_is_refused(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        picture_grid(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "corner"), [((5, 5), (3, 3)), ((0, 9.9), (0, 6)), ((20, -3), (6, 0))], ids=["inside", "edges", "beyond"]
)
def test_a_crop_lies_around_its_place_and_inside_the_picture(
    place: tuple[float, float], corner: tuple[int, int]
) -> None:
    picture = np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3)
    crop = crop_around(picture, place, 4)
    assert np.array_equal(crop, picture[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4])
    with pytest.raises(ValueError, match="no square of 11"):
        crop_around(picture, place, 11)
