"""Heat maps of single images: as bright as the score is high."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from pipelines.serving.heat_maps import FAINTEST, brightness, draw_map, map_fields
from unianom.data.image import decode_map
from unianom.visual import heat_colours


def test_brightness_is_half_at_the_threshold() -> None:
    assert brightness(3.0, 3.0, 0.5) == 0.5
    assert brightness(3.0 + 4 * 0.5, 3.0, 0.5) == 1.0
    assert brightness(3.0 + 2 * 0.5, 3.0, 0.5) == 0.75
    assert brightness(1e9, 3.0, 0.5) == 1.0
    assert brightness(-1e9, 3.0, 0.5) == FAINTEST


@pytest.fixture
def anomaly_map() -> np.ndarray:
    made = np.zeros((8, 8), np.float32)
    made[2, 3] = 10.0
    return made


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize(("bright", "level"), [(1.0, 255), (0.5, 128), (None, 255)])
def test_the_brightest_pixel_has_that_brightness(anomaly_map: np.ndarray, bright: float | None, level: int) -> None:
    drawn = opened(draw_map("heat", np.zeros((8, 8, 3), np.uint8), anomaly_map, bright))
    np.testing.assert_array_equal(drawn[2, 3], heat_colours()[level])
    np.testing.assert_array_equal(drawn[0, 0], heat_colours()[0])


def test_an_overlay_leaves_what_is_ordinary_as_it_is(anomaly_map: np.ndarray) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    drawn = opened(draw_map("overlay", pixels, anomaly_map, 1.0))
    changed = (drawn != pixels).any(axis=2)
    assert changed[2, 3]
    assert changed.sum() == 1


def test_a_map_without_structure_is_dark() -> None:
    drawn = opened(draw_map("heat", np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 7.0, np.float32), 1.0))
    np.testing.assert_array_equal(drawn, np.broadcast_to(heat_colours()[0], (8, 8, 3)))


def test_a_raw_map_comes_back(anomaly_map: np.ndarray) -> None:
    told = map_fields("raw", np.zeros((8, 8, 3), np.uint8), anomaly_map, 0.5)
    found = decode_map(base64.b64decode(told["png"]), told["offset"], told["scale"])
    np.testing.assert_allclose(found, anomaly_map, atol=told["scale"])
