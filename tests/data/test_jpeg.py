"""JPEG files decoded by libjpeg-turbo itself, against Pillow; and scaled while they are decoded."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from unianom.data.image import ImageLimits, InputPolicy, decode_image, decode_prepared, decode_upright, prepare_image
from unianom.data.image.jpeg import decode_jpeg
from unianom.errors import ImageError

RNG = np.random.default_rng(0)
PHOTO = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (30, 40, 3), np.uint8)).resize((203, 157), Image.Resampling.BICUBIC)
)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


FILES = {
    **{f"subsampling {s}, quality {q}": jpeg(PHOTO, subsampling=s, quality=q) for s in (0, 1, 2) for q in (30, 75, 95)},
    "progressive": jpeg(PHOTO, progressive=True),
    "restart markers": jpeg(PHOTO, restart_marker_rows=1),
    "RGB kept": jpeg(PHOTO, keep_rgb=True),
    "grey": jpeg(PHOTO[..., 0]),
    "grey, progressive": jpeg(PHOTO[..., 0], progressive=True, quality=95),
    "optimised": jpeg(PHOTO, optimize=True),
    "one pixel": jpeg(PHOTO[:1, :1]),
    "a row": jpeg(PHOTO[:1]),
    "a column": jpeg(PHOTO[:, :1]),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pillow(name):
    found = decode_jpeg(FILES[name], opened(FILES[name]))
    assert found is not None
    np.testing.assert_array_equal(found, np.asarray(opened(FILES[name])))


def test_pillow_decodes_the_rest():
    cmyk = io.BytesIO()
    Image.fromarray(PHOTO).convert("CMYK").save(cmyk, "JPEG")
    png = io.BytesIO()
    Image.fromarray(PHOTO).save(png, "PNG")
    for data in (cmyk.getvalue(), png.getvalue(), FILES["optimised"][:-40]):
        assert decode_jpeg(data, opened(data)) is None
    np.testing.assert_array_equal(decode_image(cmyk.getvalue()).pixels, opened(cmyk.getvalue()).convert("RGB"))


@pytest.mark.parametrize("name", ["subsampling 2, quality 75", "progressive", "grey", "restart markers"])
def test_what_pillow_refuses_is_refused_and_what_it_takes_is_taken(name):
    """Cut off or damaged anywhere: a decoder's mere warnings must not decide."""
    data = FILES[name]
    rng = np.random.default_rng(1)
    taken = 0
    for number in range(80):
        broken = bytearray(data if number % 2 else data[: rng.integers(len(data) // 2, len(data))])
        if number % 4:
            broken[rng.integers(len(data) // 3, len(broken))] ^= 1 << rng.integers(8)
        try:
            image = opened(bytes(broken))
            expected = np.asarray(image.convert("RGB"))
        except Exception:
            with pytest.raises(ImageError) as caught:
                decode_image(bytes(broken))
            assert caught.value.status == "corrupt"
            continue
        taken += 1
        np.testing.assert_array_equal(decode_image(bytes(broken)).pixels, expected)
    assert 0 < taken < 80


@pytest.mark.parametrize("value", range(1, 9))
def test_orientations_are_pillows(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = jpeg(PHOTO, exif=exif)
    found = decode_image(data)
    np.testing.assert_array_equal(found.pixels, ImageOps.exif_transpose(opened(data)))
    assert found.orientation == value


def test_limits_are_told_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(ImageError) as caught:
        decode_image(FILES["progressive"], ImageLimits(max_pixels=1000))
    assert caught.value.status == "too_large"


@pytest.mark.real
@pytest.mark.parametrize("folder", ["casting", "cookie", "kolektor_sdd", "magnetic_tile", "photos", "tiny_imagenet"])
def test_pixels_of_real_photographs_are_those_of_pillow(real_data, folder):
    found = sorted(path for path in (real_data / "images" / folder).rglob("*") if path.suffix in (".jpg", ".jpeg"))
    for path in found[:: max(1, len(found) // 12)]:
        data = path.read_bytes()
        pixels = decode_jpeg(data, opened(data))
        assert pixels is not None
        np.testing.assert_array_equal(pixels, np.asarray(opened(data)))


# ---- scaled while they are decoded ----------------------------------------------------------------------------------

SMOOTH = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).resize((1003, 757), Image.Resampling.BICUBIC)
)


@pytest.mark.parametrize("resize", ["short_side", "stretch"])
@pytest.mark.parametrize(("size", "scale"), [(400, 1), (378, 2), (300, 2), (189, 4), (90, 8), (20, 8)])
def test_files_are_scaled_by_the_largest_step_that_stays_above_the_target(resize, size, scale):
    policy = InputPolicy(resize, size, crop=min(size, 20) if resize == "short_side" else None, decode="scaled")
    upright = decode_upright(jpeg(SMOOTH, quality=95), policy)
    shape = upright.image.shape[:2] if isinstance(upright.image, np.ndarray) else upright.image.size[::-1]
    assert shape == (-(-757 // scale), -(-1003 // scale))
    assert shape[0] >= upright.size[1]
    assert shape[1] >= upright.size[0]
    assert (upright.height, upright.width) == (757, 1003)


@pytest.mark.parametrize("name", ["subsampling 2, quality 75", "progressive", "grey", "RGB kept"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_pixels_are_those_of_pillows_draft_mode(name, scale):
    ours, pillow = opened(FILES[name]), opened(FILES[name])
    for image in (ours, pillow):
        image.draft(None, (203 // scale, 157 // scale))
    found = decode_jpeg(FILES[name], ours)
    assert found is not None
    assert found.shape[:2] == (-(-157 // scale), -(-203 // scale))
    np.testing.assert_array_equal(found, np.asarray(pillow))


@pytest.mark.parametrize("value", [1, 6])
def test_scaled_decoding_gives_nearly_the_same_input(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = jpeg(SMOOTH, quality=95, exif=exif)
    full, scaled = (
        decode_prepared(data, InputPolicy(size=128, crop=112, decode=decode)) for decode in ("full", "scaled")
    )
    assert not np.array_equal(full, scaled)
    assert np.abs(full.astype(int) - scaled).mean() < 2


def test_what_cannot_be_scaled_is_decoded_in_full():
    policy = InputPolicy(size=300, crop=300, decode="scaled")
    for data in (jpeg(SMOOTH[:400, :500]), jpeg(PHOTO)):
        np.testing.assert_array_equal(
            decode_prepared(data, policy), prepare_image(decode_image(data).pixels, InputPolicy(size=300, crop=300))
        )


# ---- only what is seen is scaled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("side", [5, 64, 150, 224, 255, 257, 300])
@pytest.mark.parametrize(("size", "crop"), [(256, 224), (64, 51), (128, 1), (96, 80), (100, 90)])
def test_the_crop_of_a_square_image_is_that_of_the_whole_image_scaled(side, size, crop, interpolation):
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    resampling = Image.Resampling[interpolation.upper()]
    whole = np.asarray(Image.fromarray(pixels).resize((size, size), resampling) if side != size else pixels)
    first = round((size - crop) / 2)
    expected = whole[first : first + crop, first : first + crop]
    np.testing.assert_array_equal(
        prepare_image(pixels, InputPolicy("short_side", size, crop, None, interpolation)), expected
    )
