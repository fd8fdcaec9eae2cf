"""Where on an image a model looked."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.reporting.sample_view import SampleView, place_map, sample_view, seen_box
from unianom.data.image import InputPolicy, encode_png, prepare_image


def _view(image: np.ndarray) -> SampleView:
    return sample_view({"image": encode_png(image), "mask": None, "height": len(image), "width": image.shape[1]})


def test_pictures_keep_their_aspect_and_are_never_enlarged():
    assert _view(np.zeros((1260, 500, 3), np.uint8)).image.shape == (320, 127, 3)
    assert _view(np.zeros((40, 90, 3), np.uint8)).image.shape == (40, 90, 3)


def test_a_thin_defect_survives_in_a_small_picture():
    mask = np.zeros((2000, 2000), np.uint8)
    mask[1000, 100:1900] = 255
    stored = {"image": encode_png(np.zeros((2000, 2000, 3), np.uint8)), "mask": encode_png(mask)}
    view = sample_view({**stored, "height": 2000, "width": 2000})
    assert view.mask is not None
    assert view.mask.any(axis=0).sum() == pytest.approx(0.9 * 320, abs=2)


def test_a_stretched_image_is_seen_whole_and_a_crop_in_its_middle():
    assert seen_box(300, 400, InputPolicy("stretch", 224, None)) == (0, 0, 1, 1)
    # the shorter side of 300 becomes 256, of which 224 are kept; the longer becomes 341.33
    top, left, bottom, right = seen_box(300, 400, InputPolicy("short_side", 256, 224))
    assert (top, bottom) == pytest.approx((16 / 256, 240 / 256))
    assert (left, right) == pytest.approx(((1 - 224 / (256 * 4 / 3)) / 2, (1 + 224 / (256 * 4 / 3)) / 2))


@pytest.mark.parametrize(
    "policy",
    [
        InputPolicy("stretch", 64, None),
        InputPolicy("short_side", 64, 48),
        InputPolicy("short_side", 64, 48, pad=64),
        InputPolicy("stretch", 48, None, pad=64),
    ],
)
def test_a_map_lies_where_the_model_saw_it(policy: InputPolicy):
    """The brightest spot of an image, found in the model's input, lies on itself in the picture."""
    image = np.zeros((160, 240, 3), np.uint8)
    image[70:80, 130:140] = 255
    seen_by_model = prepare_image(image, policy).mean(2).astype(np.float32)
    view = _view(image)
    placed, seen = place_map(seen_by_model, view, policy)
    rows, columns = np.nonzero(placed > 0.6 * placed.max())
    assert (rows.mean(), columns.mean()) == pytest.approx((74.5, 134.5), abs=1.5)
    assert (placed[~seen] == 0).all()
    assert seen.all() == (policy.resize == "stretch")
