import colorsys
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, functional

from unianom.configs.synthesis import SynthesisConfig
from unianom.data import synthesis
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.synthesis import (
    AUGMENTERS,
    Synthesiser,
    TextureSource,
    augment,
    change_brightness,
    change_gamma,
    change_sharpness,
    colour_jitter,
    cutpaste_patch,
    cutpaste_scar,
    equalise,
    flip,
    invert,
    perlin_mask,
    perlin_noise,
    posterise,
    shade,
    shift_hue_and_saturation,
    shuffle_tiles,
    solarise,
    stretch_contrast,
)
from unianom.errors import DataError, OptionError

COLOURS = np.random.default_rng(3).integers(0, 256, (40, 31, 3)).astype(np.uint8)
COLOURS[0, :6] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]
COLOURS.flags.writeable = False

SAME_COLOURS = ([1.0, 1.0, 1.0], 0.0, [0, 1, 2, 3])
"""Draws of a colour jitter that leaves greys as they are."""


class Script:
    """A generator that gives out prepared values and notes what it was asked."""

    def __init__(self, *values):
        self.values, self.asked = list(values), []

    def _next(self, *request):
        self.asked.append(request)
        return self.values.pop(0)

    def random(self):
        return self._next("random")

    def uniform(self, *request):
        return np.asarray(self._next("uniform", *request))[()]

    def integers(self, *request):
        return np.asarray(self._next("integers", *request))[()]

    def permutation(self, count):
        return np.asarray(self._next("permutation", count))


def noise_image(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def grey_image(side, seed=0):
    """Random greys: a turn of the hue leaves them alone."""
    return np.repeat(noise_image(side, seed)[..., :1], 3, axis=2)


def photo(side):
    """Something smooth and coloured."""
    y, x = np.mgrid[:side, :side] / side
    return np.rint(255 * np.stack([y, x, (1 + np.sin(9 * x * y)) / 2], axis=-1)).astype(np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def textures(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(png(noise_image(40 + index, 10 + index)))
    return TextureSource(tmp_path, 64)


# CutPaste


def test_patch_by_hand():
    image = grey_image(100)
    # 8.1 % of 100² are 810 pixels; at aspect 0.5 width √405 = 20.1, height √1620 = 40.2
    rng = Script(0.081, 0.3, 0.5, 5, 60, *SAME_COLOURS, 12, 80)
    made = cutpaste_patch(image, rng)
    expected = image.copy()
    expected[12:52, 80:100] = image[5:45, 60:80]
    np.testing.assert_array_equal(made.image, expected)
    assert made.mask.sum() == 40 * 20
    assert made.mask[12:52, 80:100].all()
    assert made.source == "cutpaste_patch"
    place = [("integers", 61), ("integers", 81)]
    jitter = [("uniform", 0.6, 1.4, 3), ("uniform", -0.1, 0.1), ("permutation", 4)]
    assert rng.asked == [("uniform", 0.02, 0.15), ("random",), ("uniform", 0.3, 1), *place, *jitter, *place]


def test_a_wide_patch_by_hand():
    rng = Script(0.05, 0.7, 3.0, 0, 0, *SAME_COLOURS, 56, 0)
    made = cutpaste_patch(grey_image(64), rng)
    # 5 % of 64² are 204.8 pixels: width √614.4 = 24.8, height √68.3 = 8.3
    assert rng.asked[2] == ("uniform", 1, 3.3)
    rows, columns = np.nonzero(made.mask)
    assert (rows.min(), columns.min(), columns.max(), len(set(rows))) == (56, 0, 23, 8)


def test_patch_pastes_jittered_colours():
    image = photo(64)
    draws = ([1.3, 0.7, 1.2], 0.08, [3, 0, 2, 1])
    made = cutpaste_patch(image, Script(0.081, 0.3, 0.5, 5, 6, *draws, 20, 40))
    rows, columns = np.nonzero(made.mask)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    piece = Image.fromarray(image[5 : 5 + height, 6 : 6 + width])
    expected = np.asarray(colour_jitter(piece, Script(*draws)))
    np.testing.assert_array_equal(made.image[made.mask], expected.reshape(-1, 3))
    assert np.abs(expected.astype(int) - np.asarray(piece)).mean() > 10


def boxes(copies):
    """Top, left, height and width of each mask."""
    for made in copies:
        rows, columns = np.nonzero(made.mask)
        yield rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def test_patches_have_the_published_areas_aspects_and_places():
    side, image = 200, photo(200)
    rng = np.random.default_rng(1)
    top, left, height, width = np.array(list(boxes(cutpaste_patch(image, rng) for _ in range(1500)))).T
    # half a pixel back for what rounding down took
    area = (height + 0.5) * (width + 0.5) / side**2
    aspect = (width + 0.5) / (height + 0.5)
    assert area.min() < 0.022
    assert area.max() > 0.147
    assert stats.kstest(area, stats.uniform(0.02, 0.13).cdf).pvalue > 0.01

    def aspect_cdf(value):
        low, high = np.clip((value - 0.3) / 0.7, 0, 1), np.clip((value - 1) / 2.3, 0, 1)
        return (low + high) / 2

    # the aspect of whole pixels is off by up to 5 %, which a test of the whole distribution would see
    for value in (0.4, 0.65, 0.9, 1.25, 2.0, 3.0):
        assert (aspect < value).mean() == pytest.approx(aspect_cdf(value), abs=0.04)
    for start, length in ((top, height), (left, width)):
        share = (start + rng.random(len(start))) / (side - length + 1)
        assert stats.kstest(share, "uniform").pvalue > 0.01


def test_scar_by_hand():
    image = grey_image(50)
    rng = Script(4, 10, 30, 7, *SAME_COLOURS, 0.0, 33, 46)
    made = cutpaste_scar(image, rng)
    expected = image.copy()
    expected[33:43, 46:50] = image[30:40, 7:11]
    np.testing.assert_array_equal(made.image, expected)
    np.testing.assert_array_equal(np.argwhere(made.mask), [(y, x) for y in range(33, 43) for x in range(46, 50)])
    assert made.source == "cutpaste_scar"
    place = [("integers", 41), ("integers", 47)]
    jitter = [("uniform", 0.6, 1.4, 3), ("uniform", -0.1, 0.1), ("permutation", 4)]
    assert rng.asked == [("integers", 2, 17), ("integers", 10, 26), *place, *jitter, ("uniform", -45, 45), *place]


def test_a_turned_scar_grows_its_canvas_and_is_cut_off_at_the_border():
    image = grey_image(50)
    # by a right angle, for the sum: 4×10 becomes 10 wide and 4 high, of which four columns fit beside the border
    made = cutpaste_scar(image, Script(4, 10, 30, 7, *SAME_COLOURS, 90.0, 20, 46))
    expected = image.copy()
    expected[20:24, 46:50] = np.rot90(image[30:40, 7:11])[:, :4]
    np.testing.assert_array_equal(made.image, expected)
    assert made.mask.sum() == 16


def test_scar_edges_are_soft_and_in_the_mask():
    image = np.zeros((100, 100, 3), np.uint8)
    image[:, 50:] = 200
    made = cutpaste_scar(image, Script(16, 25, 40, 70, *SAME_COLOURS, 30.0, 30, 8))
    left = made.image[:, :50, 0].astype(float)
    np.testing.assert_array_equal(made.image[:, 50:], 200)
    assert left.sum() / 200 == pytest.approx(16 * 25, rel=0.02), "the strip keeps its area"
    soft = (left > 0) & (left < 200)
    assert soft.sum() > 40
    assert made.mask[:, :50][left > 0].all()

    # The strip's own axes: turned by 30° against the clock about the middle of the rim's canvas, grown to fit it.
    angle = math.radians(30)
    height = 27 * math.cos(angle) + 18 * math.sin(angle)
    width = 18 * math.cos(angle) + 27 * math.sin(angle)
    y, x = np.mgrid[:100, :100] + 0.5
    y, x = y - (29 + math.ceil(height) / 2), x - (7 + math.ceil(width) / 2)
    across, along = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    outside = np.maximum(abs(across) - 8, abs(along) - 12.5)
    assert made.mask[outside < 0].all()
    assert (made.image[outside < -1.5] == 200).all()
    assert not made.mask[outside > 1.5].any()


def test_colour_jitter_is_torchvisions():
    published = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    rng = np.random.default_rng(8)
    image = Image.fromarray(COLOURS)
    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for _ in range(12):
        factors = rng.uniform(0.6, 1.4, 3).tolist()
        hue = rng.uniform(-0.1, 0.1)
        order = rng.permutation(4)
        script = Script(factors, hue, order)
        jittered = colour_jitter(image, script)
        expected = image
        for step in order:
            expected = adjust[step](expected, [*factors, hue][step])
        np.testing.assert_array_equal(np.asarray(jittered), np.asarray(expected))
    assert published.brightness == published.contrast == published.saturation == script.asked[0][1:3]
    assert published.hue == script.asked[1][1:]


# DRAEM


def loop_noise(side, angles):
    """Perlin noise by its definition, pixel by pixel."""
    rows, columns = angles.shape[0] - 1, angles.shape[1] - 1
    noise = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * rows / side, j * columns / side
            for cy in (int(y), int(y) + 1):
                for cx in (int(x), int(x) + 1):
                    dy, dx = y - cy, x - cx
                    ramp = math.cos(angles[cy, cx]) * dx + math.sin(angles[cy, cx]) * dy
                    weight = 1.0
                    for t in (1 - abs(dy), 1 - abs(dx)):
                        weight *= 6 * t**5 - 15 * t**4 + 10 * t**3
                    noise[i, j] += weight * ramp
    return noise * math.sqrt(2)


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (8, 2), (16, 16)])
def test_noise_is_that_of_plain_loops(rows, columns):
    angles = np.random.default_rng(rows).uniform(0, 2 * math.pi, (rows + 1, columns + 1))
    noise = perlin_noise(32, angles)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, loop_noise(32, angles), atol=1e-5)


def test_noise_vanishes_at_corners_and_reaches_one_between():
    noise = perlin_noise(64, np.random.default_rng(0).uniform(0, 2 * math.pi, (5, 9)))
    assert not noise[::16, ::8].any()
    towards_the_middle = np.radians([[45, 135], [-45, -135]])
    assert perlin_noise(32, towards_the_middle)[16, 16] == pytest.approx(1)


def test_an_unturned_mask_is_the_noise_above_half():
    angles = np.random.default_rng(4).uniform(0, 2 * math.pi, (3, 9))
    rng = Script([1, 3], angles, 0.0)
    mask = perlin_mask(64, rng)
    np.testing.assert_array_equal(mask, loop_noise(64, angles) > 0.5)
    assert mask.any()
    assert rng.asked == [("integers", 1, 6, 2), ("uniform", 0, 2 * math.pi, (3, 9)), ("uniform", -5, 5)]


def test_other_sides_cut_the_next_multiple_of_32():
    angles = np.random.default_rng(4).uniform(0, 2 * math.pi, (33, 33))
    whole = perlin_mask(64, Script([5, 5], angles, 0.0))
    np.testing.assert_array_equal(perlin_mask(50, Script([5, 5], angles, 0.0)), whole[:50, :50])


def test_the_noise_turns_about_its_middle():
    side, degrees = 64, 5.0
    angles = np.random.default_rng(6).uniform(0, 2 * math.pi, (5, 5))
    mask = perlin_mask(side, Script([2, 2], angles, degrees))
    noise = loop_noise(side, angles)
    cos, sin, middle = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), side / 2
    compared = 0
    for i in range(side):
        for j in range(side):
            y, x = i + 0.5 - middle, j + 0.5 - middle
            y, x = y * cos + x * sin + middle, x * cos - y * sin + middle  # against the clock
            if not (0 <= y < side and 0 <= x < side):
                assert not mask[i, j]  # beyond the field there is nothing
                continue
            y, x = y - 0.5, x - 0.5
            value = 0.0
            for cy in (math.floor(y), math.floor(y) + 1):
                for cx in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - cy)) * (1 - abs(x - cx))
                    value += weight * noise[min(max(cy, 0), side - 1), min(max(cx, 0), side - 1)]
            if abs(value - 0.5) > 1e-4:
                assert mask[i, j] == (value > 0.5)
                compared += 1
    assert compared > 0.9 * side**2
    assert (mask != (noise > 0.5)).sum() > 50


def test_masks_are_rarely_empty_and_cover_about_a_twentieth():
    rng = np.random.default_rng(0)
    covered = np.array([perlin_mask(64, rng).mean() for _ in range(800)])
    assert 0.001 < (covered == 0).mean() < 0.03
    assert 0.04 < covered.mean() < 0.07


EMPTY = ([1, 1], np.zeros((3, 3)), 0.0)
"""Draws of a mask without any pixel: equal gradients nearly cancel each other."""
BLOB = ([1, 1], np.radians([[45, 90, 135], [0, 0, 180], [-45, -90, -135]]), 0.0)
"""Draws of a mask in every quarter, from gradients that point to the middle."""
UNTOUCHED = ([4, 6, 5, 0, 1, 2, 3, 7, 8, 9], 0.4, 0.4, 8)
"""Draws of augmenters that do nothing: no solarisation, no flip, all eight bits."""


def test_equal_gradients_stay_below_the_threshold():
    assert not perlin_mask(32, Script(*EMPTY)).any()
    assert perlin_mask(32, Script(*BLOB)).any()


def test_textures_are_blended_into_the_mask(textures):
    image, other = noise_image(64, 1), noise_image(64, 2)
    rng = Script(0.7, *BLOB, 2, *UNTOUCHED, 0.5)
    made = Synthesiser(SynthesisConfig(textures="given"), textures)(image, rng, other)
    assert rng.asked[0] == ("random",)
    assert ("integers", 3) in rng.asked
    texture, beta = textures[2], 0.8 * 0.5
    for i in range(64):
        for j in range(64):
            for c in range(3):
                if made.mask[i, j]:
                    blend = (1 - beta) * float(texture[i, j, c]) + beta * float(image[i, j, c])
                    assert abs(float(made.image[i, j, c]) - blend) <= 0.5001
                else:
                    assert made.image[i, j, c] == image[i, j, c]
    assert made.source == "draem_texture"
    assert not rng.values


def test_textures_are_augmented(textures):
    order = [7, *UNTOUCHED[0][:2], 0, 1, 2, 3, 5, 8, 9]  # inverted, then left alone
    rng = Script(0.7, *BLOB, 0, order, 0.4, 0.4, 0.0)
    made = Synthesiser(SynthesisConfig(textures="given"), textures)(noise_image(64), rng, noise_image(64))
    np.testing.assert_array_equal(made.image[made.mask], 255 - textures[0][made.mask])


def test_without_textures_another_image_is_shuffled():
    image, other = noise_image(64, 1), noise_image(64, 2)
    order = np.random.default_rng(0).permutation(64)
    rng = Script(0.7, *BLOB, *UNTOUCHED, order, 0.0)
    made = Synthesiser(SynthesisConfig())(image, rng, other)
    texture = np.zeros_like(other)
    for place, taken in enumerate(order):
        (to_y, to_x), (y, x) = divmod(place, 8), divmod(taken, 8)
        texture[8 * to_y : 8 * to_y + 8, 8 * to_x : 8 * to_x + 8] = other[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
    np.testing.assert_array_equal(made.image[made.mask], texture[made.mask])
    np.testing.assert_array_equal(made.image[~made.mask], image[~made.mask])
    assert made.mask.any()
    assert made.source == "draem_self"


def test_tiles_of_a_side_that_eight_does_not_divide():
    image = noise_image(50)
    np.testing.assert_array_equal(shuffle_tiles(image, Script(np.arange(64))), image)
    mirrored = np.pad(image, ((0, 6), (0, 6), (0, 0)), mode="reflect")
    swapped = np.arange(64)
    swapped[[0, 63]] = 63, 0
    shuffled = shuffle_tiles(image, Script(swapped))
    assert shuffled.shape == image.shape
    np.testing.assert_array_equal(shuffled[:7, :7], mirrored[49:, 49:])
    np.testing.assert_array_equal(shuffled[49:, 49:], image[:1, :1])


@pytest.mark.parametrize("with_textures", [False, True])
def test_an_empty_mask_leaves_the_image(with_textures, textures):
    image = noise_image(64)
    config = SynthesisConfig(textures="given" if with_textures else None)
    rng = Script(0.7, *EMPTY)
    made = Synthesiser(config, textures if with_textures else None)(image, rng, image)
    assert not made.mask.any()
    np.testing.assert_array_equal(made.image, image)
    assert made.image is not image
    assert made.source == ("draem_texture" if with_textures else "draem_self")


def test_empty_masks_are_drawn_again_as_often_as_allowed():
    image = noise_image(64)
    synthesiser = Synthesiser(SynthesisConfig(empty_retries=2))
    rest = (*UNTOUCHED, np.arange(64), 0.0)
    assert synthesiser(image, Script(0.7, *EMPTY, *EMPTY, *BLOB, *rest), image).mask.any()
    assert synthesiser(image, Script(0.7, *EMPTY, *BLOB, *rest), image).mask.any()
    given_up = Script(0.7, *EMPTY, *EMPTY, *EMPTY)
    assert not synthesiser(image, given_up, image).mask.any()
    assert not given_up.values


# Shading


@pytest.mark.parametrize(("coin", "sign"), [(0.2, 1), (0.7, -1)])
def test_shading_by_hand(coin, sign):
    image = np.full((64, 64, 3), (30, 128, 240), np.uint8)
    image.flags.writeable = False
    blob = perlin_mask(64, Script(*BLOB))
    rng = Script(*BLOB, 0.2, coin)
    made = shade(image, rng)
    assert rng.asked[-2:] == [("uniform", 0.1, 0.3), ("random",)]
    np.testing.assert_array_equal(made.mask, blob)
    np.testing.assert_array_equal(made.image[~blob], image[~blob])
    # a fifth of 255 is 51; nothing goes below 0 or above 255
    expected = {1: (81, 179, 255), -1: (0, 77, 189)}[sign]
    np.testing.assert_array_equal(made.image[blob], np.tile(expected, (blob.sum(), 1)))
    assert made.source == "shade"


def test_shading_marks_what_it_changes():
    """White does not become brighter, nor black darker."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    blob = perlin_mask(64, Script(*BLOB))
    halves = blob.copy(), blob.copy()
    halves[0][:, 32:], halves[1][:, :32] = False, False
    for coin, half in zip((0.2, 0.7), halves, strict=True):
        made = shade(image, Script(*BLOB, 0.25, coin))
        assert half.any()
        np.testing.assert_array_equal(made.mask, half)
        np.testing.assert_array_equal((made.image != image).any(2), half)


def test_shading_is_a_tenth_to_three_tenths_of_the_range_either_way():
    grey, rng = np.full((64, 64, 3), 127, np.uint8), np.random.default_rng(2)
    steps = []
    for _ in range(800):
        made = shade(grey, rng)
        changed = np.unique(made.image[made.mask].astype(int)) - 127
        assert len(changed) <= 1, "one amount for all blobs"
        steps += changed.tolist()
    amount = np.array(steps)
    assert (amount > 0).mean() == pytest.approx(0.5, abs=0.06)
    amount = abs(amount)
    assert amount.min() in (25, 26)
    assert amount.max() in (76, 77)
    # levels are whole: moved about within one, they are even again
    spread = (amount + rng.uniform(-0.5, 0.5, len(amount))) / 255
    assert stats.kstest(spread, stats.uniform(0.1, 0.2).cdf).pvalue > 0.01


def test_empty_noise_shades_nothing():
    image = photo(64)
    made = shade(image, Script(*EMPTY, 0.2, 0.2))
    assert not made.mask.any()
    np.testing.assert_array_equal(made.image, image)


# The ten augmenters


def by_pixel(image, function):
    """`function` of (r, g, b) on 0…1, for every pixel; 0…255 floats."""
    return np.array([[[255 * v for v in function(*(pixel / 255))] for pixel in row] for row in image])


def test_gamma():
    rng = Script([0.5, 1.0, 2.0])
    changed = change_gamma(COLOURS, rng)
    expected = by_pixel(COLOURS, lambda r, g, b: (math.sqrt(r), g, b * b))
    assert np.abs(changed - expected).max() <= 0.5 + 1e-9
    assert rng.asked == [("uniform", 0.5, 2, 3)]


def test_brightness_by_luma():
    rng = Script(0.2, 0.9, 25.0)
    changed = change_brightness(COLOURS, rng)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    change = np.clip(0.9 * luma + 25, 0, 255) - luma
    expected = np.clip(COLOURS + change[..., None], 0, 255)
    difference = np.abs(changed - expected)
    assert difference.max() <= 4  # three bands of whole numbers lie between, and Pillow cuts off on the way back
    assert difference.mean() < 1.5
    assert rng.asked == [("random",), ("uniform", 0.8, 1.2), ("uniform", -30, 30)]


def test_brightness_by_value():
    changed = change_brightness(COLOURS, Script(0.8, 1.1, -20.0))

    def expected(r, g, b):
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb(hue, saturation, min(max(1.1 * value - 20 / 255, 0), 1))

    difference = np.abs(changed - by_pixel(COLOURS, expected))
    assert difference.max() <= 7  # a step of the 8-bit hue is up to 6 levels of a channel
    assert difference.mean() < 1


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 2.0])
def test_sharpness(factor):
    rng = Script(factor)
    changed = change_sharpness(COLOURS, rng)
    values = COLOURS.astype(float)
    smooth = values.copy()
    for i in range(1, values.shape[0] - 1):
        for j in range(1, values.shape[1] - 1):
            smooth[i, j] = (values[i - 1 : i + 2, j - 1 : j + 2].sum(axis=(0, 1)) + 4 * values[i, j]) / 13
    expected = np.clip(smooth + factor * (values - smooth), 0, 255)
    assert np.abs(changed - expected).max() <= 1.5
    assert rng.asked == [("uniform", 0, 2)]


def test_hue_and_saturation():
    rng = Script([40, -30])
    changed = shift_hue_and_saturation(COLOURS, rng)

    def expected(r, g, b):
        hue, saturation, value = colorsys.rgb_to_hsv(r, g, b)
        return colorsys.hsv_to_rgb((hue + 40 / 256) % 1, max(saturation - 30 / 255, 0), value)

    difference = np.abs(changed - by_pixel(COLOURS, expected))
    assert difference.max() <= 8  # as above
    assert difference.mean() < 1.5
    assert np.abs(changed.astype(int) - COLOURS).mean() > 20
    assert rng.asked == [("integers", -50, 51, 2)]


def test_the_hue_goes_round():
    red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    back = shift_hue_and_saturation(shift_hue_and_saturation(red, Script([-50, 0])), Script([50, 0]))
    assert np.abs(back.astype(int) - red).max() <= 6


def test_solarise():
    rng = Script(0.6, 100)
    changed = solarise(COLOURS, rng)
    expected = [255 - v if v >= 100 else v for v in COLOURS.ravel().tolist()]
    np.testing.assert_array_equal(changed.ravel(), expected)
    assert rng.asked == [("random",), ("integers", 32, 129)]
    np.testing.assert_array_equal(solarise(COLOURS, Script(0.4)), COLOURS)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_posterise(bits):
    rng = Script(bits)
    step = 2 ** (8 - bits)
    np.testing.assert_array_equal(posterise(COLOURS, rng), COLOURS // step * step)
    assert rng.asked == [("integers", 1, 9)]


def test_flip_and_invert():
    np.testing.assert_array_equal(flip(COLOURS, Script(0.6)), COLOURS[:, ::-1])
    np.testing.assert_array_equal(flip(COLOURS, Script(0.4)), COLOURS)
    np.testing.assert_array_equal(invert(COLOURS, Script()), 255 - COLOURS.astype(int))


@pytest.mark.parametrize("cutoff", [0, 7, 20])
def test_contrast(cutoff):
    image = (COLOURS // 2 + 40).astype(np.uint8)
    rng = Script(cutoff)
    changed = stretch_contrast(image, rng)
    for channel in range(3):
        values = image[..., channel].astype(float)
        ordered = sorted(values.ravel())
        cut = len(ordered) * cutoff // 100
        low, high = ordered[cut], ordered[-1 - cut]
        expected = np.clip((values - low) * 255 / (high - low), 0, 255)
        assert np.abs(changed[..., channel] - expected).max() < 1 + 1e-6
    assert rng.asked == [("integers", 21)]


def test_equalise():
    image = (photo(48) // 3 + 50).astype(np.uint8)
    changed = equalise(image, Script())
    for channel in range(3):
        values = image[..., channel].ravel().tolist()
        # Pillow's definition: 255 even steps of the pixels, those of the brightest level not counted
        step = (len(values) - values.count(max(values))) // 255
        for value in set(values):
            below = sum(other < value for other in values)
            assert changed[..., channel].ravel()[values.index(value)] == min((step // 2 + below) // step, 255)
    assert changed.min() == 0
    assert changed.max() == 255


def test_three_different_augmenters_are_applied_in_drawn_order(monkeypatch):
    assert len({function.__name__ for function in AUGMENTERS}) == 10
    applied = []

    def tag(index):
        def apply(image, rng):
            applied.append(index)
            return image

        return apply

    monkeypatch.setattr(synthesis, "AUGMENTERS", tuple(tag(index) for index in range(10)))
    augment(COLOURS, Script([7, 2, 9, 0, 1, 3, 4, 5, 6, 8]))
    assert applied == [7, 2, 9]
    applied.clear()
    rng = np.random.default_rng(0)
    for _ in range(1500):
        augment(COLOURS, rng)
    trios = np.array(applied).reshape(-1, 3)
    assert all(len(set(trio)) == 3 for trio in trios.tolist())
    for place in range(3):
        assert stats.chisquare(np.bincount(trios[:, place], minlength=10)).pvalue > 0.01


def test_augmenters_leave_their_input_and_its_kind():
    frozen = photo(33)
    frozen.flags.writeable = False
    before = frozen.copy()
    rng = np.random.default_rng(2)
    for function in AUGMENTERS:
        for _ in range(4):
            changed = function(frozen, rng)
            assert changed.shape == frozen.shape
            assert changed.dtype == np.uint8
    np.testing.assert_array_equal(frozen, before)


def test_augmenters_take_plain_images():
    rng = np.random.default_rng(2)
    for value in (0, 130, 255):
        plain = np.full((32, 32, 3), value, np.uint8)
        for function in AUGMENTERS:
            assert np.ptp(function(plain, rng)[..., 0]) == 0


# The synthesiser


def test_shares_of_the_kinds(textures, tmp_path):
    image = photo(32)
    textures_of_its_size = TextureSource(tmp_path, 32)

    def shares(config, opened=None):
        synthesiser = Synthesiser(config, opened)
        rng = np.random.default_rng(5)
        made = [synthesiser(image, rng, image).source for _ in range(600)]
        return {kind: made.count(kind) / len(made) for kind in set(made)}

    def about(expected):  # within three standard deviations
        return {kind: pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / 600)) for kind, p in expected.items()}

    assert shares(SynthesisConfig()) == about({"cutpaste_patch": 0.25, "cutpaste_scar": 0.25, "draem_self": 0.5})
    expected = about({"cutpaste_patch": 0.1, "cutpaste_scar": 0.1, "draem_texture": 0.8})
    assert shares(SynthesisConfig(0.2, textures="given"), textures_of_its_size) == expected
    assert set(shares(SynthesisConfig(0.0))) == {"draem_self"}
    assert set(shares(SynthesisConfig(1.0))) == {"cutpaste_patch", "cutpaste_scar"}


@pytest.mark.parametrize("side", [32, 50, 64])
def test_a_copy_differs_in_its_mask_only(side, textures, tmp_path):
    image, other = photo(side), noise_image(side)
    for array in (image, other):
        array.flags.writeable = False
    before = image.copy(), other.copy()
    opened = TextureSource(tmp_path, side)
    seen = set()
    for synthesiser in (Synthesiser(SynthesisConfig()), Synthesiser(SynthesisConfig(textures="given"), opened)):
        for seed in range(80):
            made = synthesiser(image, np.random.default_rng(seed), other)
            assert made.image.shape == image.shape
            assert made.mask.shape == image.shape[:2]
            assert (made.image.dtype, made.mask.dtype) == (np.uint8, bool)
            np.testing.assert_array_equal(made.image[~made.mask], image[~made.mask])
            seen.add(made.source)
    assert len(seen) == 4
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(other, before[1])


def test_the_generator_decides_everything(textures, tmp_path):
    image, other = photo(64), noise_image(64)
    config = SynthesisConfig(textures="given", empty_retries=1)
    warm, seen = Synthesiser(config, textures), []
    for sample in range(30):
        first = warm(image, np.random.default_rng([9, 0, sample]), other)
        # another process with an empty cache, and numpy's global generator elsewhere
        np.random.seed(sample)  # noqa: NPY002
        fresh = Synthesiser(config, TextureSource(tmp_path, 64))
        again = fresh(image, np.random.default_rng([9, 0, sample]), other)
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.mask, again.mask)
        assert first.source == again.source
        seen.append(first.image.tobytes())
    assert len(set(seen)) == 30


def test_images_too_small_for_a_scar_are_refused():
    small = photo(31)
    with pytest.raises(OptionError, match=r"at least 32×32 pixels, these have 31"):
        Synthesiser(SynthesisConfig())(small, np.random.default_rng(0), small)


@pytest.mark.parametrize("options", [{"cutpaste_share": 1.1}, {"cutpaste_share": -0.1}, {"empty_retries": -1}])
def test_nonsense_is_refused(options):
    with pytest.raises(OptionError, match="must be"):
        SynthesisConfig(**options)


def test_named_textures_must_be_opened_and_others_not(textures):
    with pytest.raises(OptionError, match="together"):
        Synthesiser(SynthesisConfig(textures="given"))
    with pytest.raises(OptionError, match="together"):
        Synthesiser(SynthesisConfig(), textures)


# Texture folders


def test_textures_are_found_below_and_stretched(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (20, 60, 3)).astype(np.uint8)
    red = np.full((8, 8, 3), (250, 10, 20), np.uint8)
    for name, pixels in {"b/striped/1.PNG": wide, "a/2.png": red, "3.bmp": wide}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    source = TextureSource(tmp_path, 48)
    assert len(source) == 3
    stretched = decode_prepared(png(wide), InputPolicy("stretch", 48, None))
    np.testing.assert_array_equal(source[0], stretched)
    np.testing.assert_array_equal(source[1], np.full((48, 48, 3), (250, 10, 20)))
    np.testing.assert_array_equal(source[2], stretched)
    assert not source[0].flags.writeable


def test_textures_of_an_object_store():
    fs = fsspec.filesystem("memory")
    fs.pipe("/store-of-textures/dotted/1.png", png(photo(16)))
    source = TextureSource("memory://store-of-textures", 16)
    np.testing.assert_array_equal(source[0], photo(16))


def test_every_texture_is_drawn_as_often():
    drawn = []

    class Textures(list):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    synthesiser = Synthesiser(SynthesisConfig(0.0, textures="given"), Textures(noise_image(32, n) for n in range(5)))
    rng = np.random.default_rng(0)
    for _ in range(400):
        synthesiser(photo(32), rng, photo(32))
    assert len(drawn) > 350
    assert stats.chisquare(np.bincount(drawn, minlength=5)).pvalue > 0.01


def counted_reads(monkeypatch, source):
    reads = []
    decode = source._decode

    def counting(index):
        reads.append(index)
        return decode(index)

    monkeypatch.setattr(source, "_decode", counting)
    return reads


def test_the_textures_used_last_are_kept(tmp_path, monkeypatch):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(png(noise_image(16, index)))
    source = TextureSource(tmp_path, 16, cache_bytes=2 * 16 * 16 * 3)
    reads = counted_reads(monkeypatch, source)
    for index in (0, 1, 0, 1, 2, 1, 2, 0, 2):
        np.testing.assert_array_equal(source[index], noise_image(16, index))
    assert reads == [0, 1, 2, 0]
    source[1]  # 0 was used before 2, so it goes
    assert reads == [0, 1, 2, 0, 1]
    source[2]
    assert reads == [0, 1, 2, 0, 1]


def test_nothing_is_decoded_before_it_is_drawn(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    (tmp_path / "1.png").write_bytes(png(photo(16)))
    source = TextureSource(tmp_path, 16)
    np.testing.assert_array_equal(source[1], photo(16))
    with pytest.raises(DataError, match=r"cannot use the texture .*/0\.png: not an image .*replace the file"):
        source[0]


def test_a_broken_texture_stops_the_synthesiser(tmp_path):
    (tmp_path / "only.png").write_bytes(png(photo(16))[:-40])
    synthesiser = Synthesiser(SynthesisConfig(0.0, textures="given"), TextureSource(tmp_path, 32))
    with pytest.raises(DataError, match=r"only\.png"):
        synthesiser(photo(32), Script(0.7, *BLOB, 0), photo(32))


def test_limits_hold_for_textures(tmp_path):
    (tmp_path / "large.png").write_bytes(png(photo(16)))
    with pytest.raises(DataError, match=r"large\.png: 16 x 16 = 256 pixels"):
        TextureSource(tmp_path, 32, ImageLimits(max_pixels=255))[0]


def test_a_texture_that_vanished_is_named(tmp_path):
    file = tmp_path / "gone.png"
    file.write_bytes(png(photo(16)))
    source = TextureSource(tmp_path, 16)
    file.unlink()
    with pytest.raises(DataError, match=r"gone\.png"):
        source[0]


def test_folders_without_textures_are_refused(tmp_path):
    (tmp_path / "read.me").write_text("nothing")
    with pytest.raises(DataError, match=r"no images in or below .*found: read\.me"):
        TextureSource(tmp_path, 32)
    with pytest.raises(DataError, match=r"no folder .*missing"):
        TextureSource(tmp_path / "missing", 32)


def test_textures_travel_to_other_processes_and_threads(textures, tmp_path):
    copy = pickle.loads(pickle.dumps(textures))
    for index in range(len(textures)):
        np.testing.assert_array_equal(copy[index], textures[index])
    narrow = TextureSource(tmp_path, 64, cache_bytes=0)
    with ThreadPoolExecutor(4) as pool:
        for index, pixels in zip(range(90), pool.map(lambda n: narrow[n % 3], range(90))):
            np.testing.assert_array_equal(pixels, textures[index % 3])
