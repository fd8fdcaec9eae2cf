import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw, TiffImagePlugin
from scipy import ndimage
from torchvision import transforms
from torchvision.transforms import functional

from unianom.data.image import (
    FORMATS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CropWindow,
    ImageFacts,
    ImageLimits,
    InputPolicy,
    check_image,
    covers_nearly_all,
    crop_image,
    crop_mask,
    decode_image,
    decode_map,
    decode_mask,
    decode_prepared,
    decode_upright,
    encode_map,
    encode_png,
    find_crop,
    marks_anything,
    prepare_image,
    prepare_mask,
    read_mask,
    reduce_image,
    reduce_mask,
    spread_bits,
    turn_upright,
)
from unianom.data.schema import Crop
from unianom.data.tensors import normalise
from unianom.errors import ImageError, OptionError
from unianom.options import from_plain, to_plain

RNG = np.random.default_rng(20)
COLOURS = RNG.integers(0, 256, (24, 37, 3)).astype(np.uint8)
GREYS = COLOURS[..., 0]
SIXTEEN = RNG.integers(0, 65536, (24, 37)).astype(np.uint16)
SIXTEEN[0, :6] = 0, 128, 129, 257, 65406, 65535

# exact ways to write each format
LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
}

# what EXIF orientation 1…8 asks of a reader, as H×W×… array operations
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


def saved(image, file_format="PNG", **options):
    """An array or Pillow image as encoded bytes."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def palette_image(indices, colours):
    """A Pillow image of mode P."""
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
    return image


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG put together by hand; `rows` are its raw scan lines, each with its filter byte."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    between = b"".join(chunk(kind, content) for kind, content in chunks)
    data = rows if isinstance(rows, bytes) else b"".join(b"\0" + row.tobytes() for row in rows)
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def status_of(function, *arguments, **options):
    with pytest.raises(ImageError) as caught:
        function(*arguments, **options)
    return caught.value.status


def outcome(function, data):
    try:
        return "ok", function(data)
    except ImageError as error:
        return error.status, None


# ---- colour modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", LOSSLESS)
def test_colours_come_back_as_they_were_written(file_format):
    decoded = decode_image(saved(COLOURS, file_format, **LOSSLESS[file_format]))
    assert decoded.format == file_format
    assert decoded.pixels.dtype == np.uint8
    np.testing.assert_array_equal(decoded.pixels, COLOURS)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_grey_is_repeated(file_format):
    np.testing.assert_array_equal(decode_image(saved(GREYS, file_format)).pixels, np.stack([GREYS] * 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_one_bit_becomes_black_and_white(file_format):
    bits = GREYS > 100
    decoded = decode_image(saved(Image.fromarray(bits), file_format))
    np.testing.assert_array_equal(decoded.pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))


def test_alpha_is_dropped_and_the_colours_under_it_are_kept():
    alpha = RNG.integers(0, 256, GREYS.shape).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(saved(np.dstack([COLOURS, alpha]))).pixels, COLOURS)
    grey_alpha = Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode_image(saved(grey_alpha)).pixels[..., 1], GREYS)


@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 99, 255])}])
def test_palettes_are_resolved_with_and_without_alpha(options):
    palette = np.array([[10, 20, 30], [200, 100, 0], [7, 7, 255]], np.uint8)
    indices = RNG.integers(0, 3, (5, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode_image(saved(palette_image(indices, palette), **options))
    np.testing.assert_array_equal(decoded.pixels, palette[indices])


def test_cmyk_is_converted():
    inks = RNG.integers(0, 256, (8, 9, 4)).astype(np.uint8)
    image = Image.frombytes("CMYK", (9, 8), inks.tobytes())
    left = 255 - inks.astype(float)
    expected = left[..., :3] * left[..., 3:] / 255
    np.testing.assert_allclose(decode_image(saved(image, "TIFF")).pixels, expected, atol=1.01)


def test_cmyk_and_grey_jpeg():
    """JPEG stores CMYK inverted; a smooth picture keeps its colours."""
    smooth = np.tile(np.linspace(20, 235, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    cmyk = saved(Image.fromarray(smooth).convert("CMYK"), "JPEG", quality=98)
    np.testing.assert_allclose(decode_image(cmyk).pixels, smooth, atol=4)
    grey = decode_image(saved(smooth[..., 0], "JPEG", quality=98)).pixels
    np.testing.assert_allclose(grey, smooth, atol=4)


@pytest.mark.parametrize(
    "data",
    [
        saved(SIXTEEN),
        saved(SIXTEEN, "TIFF"),
        saved(Image.frombytes("I;16B", SIXTEEN.shape[::-1], SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        saved(SIXTEEN.astype(np.int32), "TIFF"),
    ],
    ids=["PNG", "TIFF", "big-endian TIFF", "32-bit TIFF"],
)
def test_sixteen_bit_grey_is_scaled_not_clipped(data):
    expected = np.rint(SIXTEEN / 257)
    np.testing.assert_array_equal(decode_image(data).pixels, np.stack([expected] * 3, axis=2))


def test_sixteen_bit_colours_keep_their_high_byte():
    values = RNG.integers(0, 65536, (6, 5, 3)).astype(">u2")
    np.testing.assert_array_equal(decode_image(png(5, 6, 16, 2, values)).pixels, values >> 8)


@pytest.mark.parametrize(
    "pixels",
    [
        SIXTEEN.astype(np.int32) - 1000,
        SIXTEEN.astype(np.int32) + 1000,
        SIXTEEN.astype(np.float32),
        GREYS.astype(np.float32) / 255,
    ],
    ids=["negative", "beyond 16 bits", "float", "float in 0…1"],
)
def test_pixels_without_an_agreed_range_are_refused(pixels):
    data = saved(pixels, "TIFF")
    assert status_of(decode_image, data) == "unsupported"
    assert status_of(check_image, data) == "unsupported"


# ---- orientation and frames ---------------------------------------------------------------------------------------

BLOCKS = np.kron(RNG.integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1))).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("value", UPRIGHT)
def test_every_exif_orientation_is_turned_upright(value, file_format):
    options = {"JPEG": {"quality": 98, "subsampling": 0}}.get(file_format, LOSSLESS.get(file_format, {}))
    data = saved(BLOCKS, file_format, exif=orientation(value), **options)
    upright = UPRIGHT[value](BLOCKS)
    decoded = decode_image(data).pixels
    assert decoded.shape == upright.shape
    np.testing.assert_allclose(decoded, upright, atol=3 if file_format == "JPEG" else 0)
    assert check_image(data) == ImageFacts(file_format, *upright.shape[:2])
    prepared = decode_upright(data, InputPolicy(decode="scaled"))
    assert (prepared.height, prepared.width) == upright.shape[:2]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", UPRIGHT)
def test_sixteen_bit_images_and_masks_are_turned_upright_too(value, file_format):
    data = saved(BLOCKS[..., 0].astype(np.uint16) * 257, file_format, exif=orientation(value))
    np.testing.assert_array_equal(decode_image(data).pixels[..., 0], UPRIGHT[value](BLOCKS[..., 0]))
    mask = saved(np.where(BLOCKS[..., 0] > 99, np.uint8(255), np.uint8(0)), file_format, exif=orientation(value))
    np.testing.assert_array_equal(decode_mask(mask) > 0, UPRIGHT[value](BLOCKS[..., 0] > 99))


def test_an_orientation_beyond_eight_means_nothing():
    np.testing.assert_array_equal(decode_image(saved(COLOURS, exif=orientation(9))).pixels, COLOURS)


def test_unreadable_exif_data_is_told():
    data = png(2, 1, 8, 0, np.array([[1, 2]], np.uint8), (b"eXIf", b"garbage!"))
    with pytest.raises(ImageError, match="EXIF") as caught:
        decode_image(data)
    assert caught.value.status == "corrupt"


@pytest.mark.parametrize(
    ("file_format", "options"), [("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("MPO", {"quality": 98})]
)
def test_of_several_frames_the_first_is_taken(file_format, options):
    frames = [Image.new("RGB", (16, 16), shade) for shade in ((10, 10, 10), (200, 200, 200))]
    data = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded.pixels, np.full((16, 16, 3), 10))
    assert decoded.format == check_image(data).format
    assert decoded.format in FORMATS


# ---- what is not an image, or only part of one --------------------------------------------------------------------

SVG = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
NO_IMAGES = {
    "empty": b"",
    "text": b"this is no image\n" * 20,
    "zeros": bytes(1000),
    "GIF": saved(COLOURS, "GIF"),
    "SVG": SVG,
    "EPS": EPS,
    "ICO": saved(COLOURS, "ICO"),
    "PPM": saved(COLOURS, "PPM"),
    "PNG signature alone": b"\x89PNG\r\n\x1a\n",
    "PNG without pixels": png(0, 5, 8, 0, b""),
    "broken palette": png(2, 1, 8, 3, b"\0\1\1", (b"PLTE", b"")),
}


@pytest.mark.parametrize("name", [name for name in NO_IMAGES if name != "broken palette"])
def test_what_is_no_image_of_a_known_format_is_corrupt(name):
    for function in (decode_image, check_image, decode_mask):
        assert status_of(function, NO_IMAGES[name]) == "corrupt"


WHOLE = {
    "PNG": saved(COLOURS),
    "PNG, palette": saved(Image.fromarray(COLOURS).quantize(16)),
    "PNG, 16 bits": saved(SIXTEEN),
    "JPEG": saved(COLOURS, "JPEG"),
    "JPEG, progressive": saved(COLOURS, "JPEG", progressive=True),
    "BMP": saved(COLOURS, "BMP"),
    "BMP, 1 bit": saved(Image.fromarray(GREYS > 99), "BMP"),
    "TIFF": saved(COLOURS, "TIFF"),
    "TIFF, deflate": saved(COLOURS, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, 16 bits": saved(SIXTEEN, "TIFF"),
    "WEBP": saved(COLOURS, "WEBP"),
    "WEBP, lossless": saved(COLOURS, "WEBP", lossless=True),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", WHOLE)
def test_a_cut_off_file_is_corrupt_unless_every_pixel_is_there(name):
    """Never a picture of which a part is missing. A PNG does without its last chunk, a BMP without its padding."""
    rng = np.random.default_rng(3)
    data = WHOLE[name]
    whole = decode_image(data).pixels
    lengths = {*range(0, 40, 5), *range(len(data) - 30, len(data)), *rng.integers(0, len(data), 40).tolist()}
    refused = 0
    for length in lengths:
        status, decoded = outcome(decode_image, data[:length])
        if status == "ok":
            np.testing.assert_array_equal(decoded.pixels, whole)
            assert len(data) - length <= 20
        else:
            assert status == "corrupt"
            refused += 1
        assert outcome(check_image, data[:length])[0] == status
        assert outcome(decode_mask, data[:length])[0] == status
    assert refused >= len(lengths) - 20


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", ["PNG", "PNG, palette", "JPEG", "BMP", "TIFF, 16 bits", "WEBP"])
def test_damaged_bytes_end_in_pixels_or_an_image_error_and_every_reader_agrees(name):
    limits = ImageLimits(max_pixels=10**6)
    rng = np.random.default_rng(4)
    for _ in range(60):
        damaged = bytearray(WHOLE[name])
        for position in rng.integers(0, min(len(damaged), 300), 2):
            damaged[position] = rng.integers(256)
        decoded, checked = (outcome(lambda d, f=f: f(d, limits), bytes(damaged)) for f in (decode_image, check_image))
        assert decoded[0] == checked[0]
        if decoded[0] == "ok":
            assert checked[1] == ImageFacts(decoded[1].format, *decoded[1].pixels.shape[:2])


def test_fewer_pixels_than_the_header_claims_are_corrupt():
    assert status_of(decode_image, png(100, 100, 8, 0, b"\0" * 101 * 100)[:-30]) == "corrupt"
    bmp = bytearray(WHOLE["BMP"])
    bmp[22:26] = struct.pack("<i", 80)
    assert status_of(decode_image, bytes(bmp)) == "corrupt"


# ---- limits -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_decoding(monkeypatch):
    def load(*_):
        raise AssertionError("decoded before the limits were checked")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)


def with_header_size(file_format, width, height):
    """A small file whose header claims another size."""
    if file_format == "PNG":
        return png(width, height, 8, 0, b"\0")
    data = bytearray(WHOLE[file_format])
    if file_format == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif file_format == "JPEG":
        frame = data.find(b"\xff\xc0") + 5
        data[frame : frame + 4] = struct.pack(">HH", height, width)
    else:
        directory = struct.unpack_from("<I", data, 4)[0]
        for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
            tag = struct.unpack_from("<H", data, entry)[0]
            if tag in (256, 257):
                data[entry : entry + 12] = struct.pack("<HHII", tag, 4, 1, width if tag == 256 else height)
    return bytes(data)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "JPEG", "TIFF"])
@pytest.mark.usefixtures("no_decoding")
def test_too_many_pixels_are_refused_by_the_header_alone(file_format):
    data = with_header_size(file_format, 20_000, 20_000)
    assert len(data) < 5000
    for function in (decode_image, check_image, decode_mask):
        with pytest.raises(ImageError, match=r"20000 x 20000 = 400000000 pixels.*100000000.*max_pixels") as caught:
            function(data)
        assert caught.value.status == "too_large"


@pytest.mark.usefixtures("no_decoding")
def test_too_many_bytes_are_refused_unopened():
    data = WHOLE["PNG"]
    assert status_of(check_image, data, ImageLimits(max_bytes=len(data) - 1)) == "too_large"
    assert status_of(decode_mask, data, limits=ImageLimits(max_bytes=len(data) - 1)) == "too_large"


def test_limits_are_inclusive():
    data = WHOLE["PNG"]
    limits = ImageLimits(max_pixels=24 * 37, max_bytes=len(data))
    assert decode_image(data, limits).pixels.shape == (24, 37, 3)
    assert status_of(decode_image, data, ImageLimits(max_pixels=24 * 37 - 1)) == "too_large"


def test_pillows_own_limit_gives_way_to_ours_and_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(WHOLE["PNG"]).pixels.shape == (24, 37, 3)
    assert status_of(decode_image, b"text") == "corrupt"
    assert Image.MAX_IMAGE_PIXELS == 100


def test_limits_from_before_there_was_one_of_time_are_the_same_plain_data():
    """What plans and records of the last version hold."""
    plain = {"max_pixels": 100_000_000, "max_bytes": 268_435_456}
    assert to_plain(ImageLimits()) == plain
    assert from_plain(ImageLimits, plain) == ImageLimits(seconds=200.0)
    for seconds in (None, 5.0):
        assert to_plain(ImageLimits(seconds=seconds)) == {**plain, "seconds": seconds}
        assert from_plain(ImageLimits, {**plain, "seconds": seconds}) == ImageLimits(seconds=seconds)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_pixels": 0}, "at least 1"),
        ({"max_bytes": -1}, r"in \[1, 2147483647\]"),
        ({"max_bytes": 1 << 31}, r"in \[1, 2147483647\]"),  # more than a column of Arrow's binaries holds
        ({"seconds": 0}, "positive or null"),
    ],
)
def test_limits_have_bounds(limits, words):
    with pytest.raises(OptionError, match=f"must be .*{words}"):
        ImageLimits(**limits)


# ---- samples of fewer bits than they are stored in ------------------------------------------------------------------

TWELVE = (np.arange(24 * 37).reshape(24, 37) * 4095 // (24 * 37 - 1)).astype(np.uint16)
"""A ramp over all of 12 bits."""

EIGHT_OF_TWELVE = np.floor(TWELVE.astype(np.float64) * 255 / 4095 + 0.5).astype(np.uint8)


def grey_png(values, *chunks):
    """A 16-bit grey PNG of H×W uint16, with chunks of one's own."""
    return png(values.shape[1], values.shape[0], 16, 0, values.astype(">u2"), *chunks)


def tiff(values, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info.tagtype[int(tag[1:])] = 3  # a whole number of 16 bits
        info[int(tag[1:])] = value
    return saved(values, "TIFF", tiffinfo=info)


@pytest.mark.parametrize(
    "data",
    [grey_png(TWELVE, (b"sBIT", bytes([12]))), tiff(TWELVE, _341=4095)],
    ids=["sBIT", "SMaxSampleValue"],
)
def test_bits_that_a_file_states_are_scaled_to_the_whole_range(data):
    decoded = decode_image(data)
    np.testing.assert_array_equal(decoded.pixels[..., 0], EIGHT_OF_TWELVE)
    assert decoded.largest is None  # nothing to wonder about
    np.testing.assert_array_equal(decode_prepared(data, InputPolicy("stretch", 24)),
                                  prepare_image(decoded.pixels, InputPolicy("stretch", 24)))  # fmt: skip


def test_samples_of_twelve_bits_in_twelve():
    """TIFF packs them: two samples in three bytes."""
    flat = TWELVE[:, :36].reshape(-1, 2).astype(np.uint32)
    joined = flat[:, 0] << 12 | flat[:, 1]
    packed = np.stack([joined >> 16, joined >> 8 & 255, joined & 255], axis=1).astype(np.uint8).tobytes()
    entries = [(256, 36), (257, 24), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 24), (279, len(packed))]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    data = head + packed + struct.pack("<H", len(entries)) + table + struct.pack("<I", 0)
    np.testing.assert_array_equal(decode_image(data).pixels[..., 0], EIGHT_OF_TWELVE[:, :36])


@pytest.mark.parametrize("scaled", [TWELVE << 4, TWELVE << 4 | TWELVE >> 8], ids=["shifted", "repeated"])
@pytest.mark.parametrize("brightest", [4095, 200])
def test_samples_that_were_scaled_up_as_png_asks_are_not_scaled_again(scaled, brightest):
    values = np.where(brightest >= TWELVE, scaled, 0).astype(np.uint16)  # a dark image, too
    plain, stated = decode_image(grey_png(values)), decode_image(grey_png(values, (b"sBIT", bytes([12]))))
    np.testing.assert_array_equal(plain.pixels, stated.pixels)


@pytest.mark.parametrize("largest", [3000, 65535, 255])
def test_a_largest_value_that_is_no_depth_or_exceeded_is_not_taken_for_one(largest):
    """Some programs state the largest value that occurs; images would be scaled each by another factor."""
    plain = decode_image(saved(TWELVE, "TIFF")).pixels
    np.testing.assert_array_equal(decode_image(tiff(TWELVE, _341=largest)).pixels, plain)


def test_colours_of_few_bits_in_sixteen_are_refused_where_the_file_tells():
    values = np.dstack([TWELVE] * 3).astype(">u2").reshape(24, -1)
    colours = png(37, 24, 16, 2, values, (b"sBIT", bytes([12, 12, 12])))
    for function in (decode_image, check_image):
        assert status_of(function, colours) == "unsupported"
    scaled = png(37, 24, 16, 2, (values.astype(np.uint16) << 4).astype(">u2"), (b"sBIT", bytes([12, 12, 12])))
    np.testing.assert_array_equal(decode_image(scaled).pixels[..., 1], TWELVE >> 4)


def test_sixteen_bits_tell_the_largest_value():
    assert check_image(saved(TWELVE)).largest == decode_image(saved(TWELVE)).facts.largest == 4095
    assert check_image(saved(SIXTEEN, "TIFF")).largest == 65535
    assert check_image(saved(GREYS)).largest is None
    colours = png(37, 24, 16, 2, np.dstack([TWELVE] * 3).astype(">u2").reshape(24, -1))
    assert check_image(colours).largest == 4095


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_bits_are_spread_on_request(file_format):
    spread = spread_bits(saved(TWELVE, file_format), 12)
    with Image.open(io.BytesIO(spread)) as image:
        assert image.format == "PNG"
        stored = np.asarray(image)
    np.testing.assert_array_equal(stored, np.floor(TWELVE.astype(np.float64) * 65535 / 4095 + 0.5))
    np.testing.assert_allclose(decode_image(spread).pixels[..., 0].astype(int), EIGHT_OF_TWELVE, atol=1)
    assert len(np.unique(decode_image(saved(TWELVE, file_format)).pixels)) == 17
    assert len(np.unique(decode_image(spread).pixels)) == 256


def test_bits_that_an_image_does_not_have():
    assert spread_bits(saved(GREYS), 12) == saved(GREYS)
    assert status_of(spread_bits, saved(TWELVE), 11) == "unsupported"
    colours = png(37, 24, 16, 2, np.dstack([TWELVE] * 3).astype(">u2").reshape(24, -1))
    assert status_of(spread_bits, colours, 12) == "unsupported"


# ---- masks --------------------------------------------------------------------------------------------------------

CLASSES = RNG.integers(0, 4, (11, 13)).astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "threshold", "expected"),
    [
        (saved(CLASSES * np.uint8(85)), 0, CLASSES > 0),
        (saved(CLASSES), 0, CLASSES > 0),
        (saved(CLASSES, "BMP"), 0, CLASSES > 0),
        (saved(CLASSES), 1, CLASSES > 1),
        (saved(palette_image(CLASSES, [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]])), 0, CLASSES > 0),
        (saved(palette_image(CLASSES, [[255, 255, 255], [128, 0, 0], [0, 90, 0], [0, 0, 1]])), 0, CLASSES > 0),
        (saved(CLASSES.astype(np.uint16) * 300), 0, CLASSES > 0),
        (saved(CLASSES.astype(np.uint16)), 0, CLASSES > 0),
        (saved(CLASSES.astype(np.int32), "TIFF"), 2, CLASSES > 2),
        (saved(Image.fromarray(CLASSES > 1)), 0, CLASSES > 1),
        (saved(GREYS), 127, GREYS > 127),
        (saved(np.dstack([GREYS] * 3)), 127, GREYS > 127),
        (saved(COLOURS), 200, COLOURS.max(axis=2) > 200),
        (saved(np.dstack([GREYS] * 3 + [np.full_like(GREYS, 255)])), 127, GREYS > 127),
        (saved(np.zeros((4, 5), np.uint8)), 0, np.zeros((4, 5), bool)),
    ],
    ids=[
        "shades",
        "class numbers",
        "class numbers, BMP",
        "class numbers above 1",
        "palette, background black",
        "palette, background white",
        "16 bits",
        "16-bit class numbers",
        "32-bit class numbers",
        "1 bit",
        "anti-aliased",
        "anti-aliased, RGB",
        "colours",
        "RGBA",
        "normal",
    ],
)
def test_masks_of_every_kind_become_zero_and_255(data, threshold, expected):
    mask = decode_mask(data, threshold)
    assert mask.dtype == np.uint8
    for above in (threshold, None, 254):
        assert marks_anything(data, above) == decode_mask(data, above).any()
    np.testing.assert_array_equal(mask, np.where(expected, 255, 0))


@pytest.mark.parametrize("threshold", [0, 127])
def test_a_palette_of_greys_stands_for_shades_whatever_the_order_of_its_entries(threshold):
    """Programs that shrink PNG files turn grey masks into palettes; brightest first, index 0 is white."""
    shades = np.array([255, 200, 100, 0], np.uint8)
    quantised = Image.fromarray(shades[CLASSES]).quantize(4)
    assert quantised.getpalette()[:3] == [255, 255, 255]
    for image in (quantised, palette_image(CLASSES, np.stack([shades] * 3, axis=1))):
        np.testing.assert_array_equal(decode_mask(saved(image), threshold) > 0, shades[CLASSES] > threshold)


def blob(height=64, width=64):
    """A defect of 12 × 10 pixels and one of 5 × 30, H×W bool."""
    mask = np.zeros((height, width), bool)
    mask[8:20, 10:20] = True
    mask[40:45, 20:50] = True
    return mask


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1), (0, 2, 1)])
def test_the_order_of_a_palette_in_colours_changes_nothing(order):
    """Black background, a red and a blue defect, at any of the entries 0, 1 and 2."""
    defect = blob()
    classes = defect.astype(np.uint8)
    classes[40:45] *= 2
    colours = np.array([[0, 0, 0], [200, 30, 30], [0, 0, 180]], np.uint8)
    places = np.argsort(order)
    data = saved(palette_image(places[classes], colours[list(order)]))
    np.testing.assert_array_equal(decode_mask(data) > 0, defect)


def test_class_numbers_hold_where_entry_0_of_a_palette_is_black():
    """As in VOC: 255 marks the rim of objects; black may come again, for entries that a program left undefined."""
    classes = np.zeros((20, 20), np.uint8)
    classes[4:14, 4:14], classes[6:12, 6:12], classes[8:10, 8:10] = 255, 3, 15
    colours = np.zeros((256, 3), np.uint8)
    colours[15], colours[255] = (192, 128, 128), (224, 224, 192)
    for threshold, expected in ((None, classes > 0), (3, classes > 3), (20, classes > 20)):
        np.testing.assert_array_equal(decode_mask(saved(palette_image(classes, colours)), threshold) > 0, expected)


def test_black_that_comes_twice_in_a_palette_is_background_where_entry_0_is_not_used():
    defect = blob()
    colours = [[0, 0, 0], [200, 30, 30], [0, 0, 180], [0, 0, 0]]
    np.testing.assert_array_equal(decode_mask(saved(palette_image(np.where(defect, 1, 3), colours))) > 0, defect)


def layered(values, alpha):
    return np.dstack([values, values, values, alpha]).astype(np.uint8)


@pytest.mark.parametrize("below", [0, 128, 255])
def test_what_is_wholly_transparent_is_background(below):
    defect = blob()
    shades = np.where(defect, 255, below)
    alpha = np.where(defect, 255, 0)
    masks = [
        saved(layered(shades, alpha)),
        saved(Image.fromarray(layered(shades, alpha)).convert("LA")),
        saved(layered(shades, alpha), "TIFF"),
        saved(layered(shades, alpha), "WEBP", lossless=True),
        saved(palette_image(defect, [[below] * 3, [90, 200, 10]]), transparency=0),
        saved(palette_image(~defect, [[90, 200, 10], [below] * 3]), transparency=bytes([255, 0])),
    ]
    if below not in (0, 255):  # a shade that stands for transparency
        masks.append(saved(shades.astype(np.uint8), transparency=below))
        masks.append(saved(np.dstack([shades.astype(np.uint8)] * 3), transparency=(below, below, below)))
        masks.append(saved(shades.astype(np.uint16), transparency=below))
    for data in masks:
        np.testing.assert_array_equal(decode_mask(data) > 0, defect)


def test_partly_transparent_marks_count():
    """A translucent overlay, as annotation tools draw it."""
    defect = blob()
    np.testing.assert_array_equal(decode_mask(saved(layered(np.where(defect, 255, 0), defect * 100))) > 0, defect)


@pytest.mark.parametrize("value", [0, 1, 20, 40, 128, 251, 255])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP"])
def test_whether_a_mask_marks_anything(value, file_format):
    """The shortcut agrees with the decoded mask, faint and lossy ones included."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[4:9, 4:9] = value
    data = saved(pixels, file_format)
    for threshold in (None, 0, 19, 127, 254):
        assert marks_anything(data, threshold) == decode_mask(data, threshold).any()


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("shift", [0, 3])
def test_the_ringing_of_jpeg_does_not_enlarge_a_mask(quality, shift):
    """20 × 10 pixels: as JPEG some 275 of them and their surroundings are above 0."""
    defect = np.zeros((64, 64), np.uint8)
    defect[20 + shift : 40 + shift, 20 + shift : 30 + shift] = 255
    jpeg = saved(defect, "JPEG", quality=quality)
    assert (decode_mask(jpeg, 0) > 0).sum() > 230
    converted = saved(np.asarray(Image.open(io.BytesIO(jpeg))))  # the same pixels, in a format without loss
    red = saved(Image.open(io.BytesIO(saved(np.dstack([defect, defect * 0, defect * 0]), "JPEG", quality=95))))
    webp = saved(np.dstack([defect] * 3), "WEBP", quality=quality)
    for data in (jpeg, converted):
        np.testing.assert_array_equal(decode_mask(data), defect)
        assert read_mask(data).halved
    assert read_mask(webp).halved
    assert (decode_mask(webp) != defect).sum() <= 40
    assert abs(int((decode_mask(red) > 0).sum()) - 200) <= 30  # JPEG halves the resolution of colours


def test_a_grey_mask_in_jpeg_is_read_at_half_of_its_own_brightness():
    defect = np.where(blob(), np.uint8(100), np.uint8(0))
    np.testing.assert_array_equal(decode_mask(saved(defect, "JPEG", quality=80)) > 0, defect > 0)


@pytest.mark.parametrize("factor", [2, 4, 7])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "16"])
def test_anti_aliased_edges_are_read_at_half(factor, mode):
    """A disc drawn larger and reduced: what is covered by half is anomalous, whatever the file's colours."""
    y, x = np.mgrid[: 64 * factor, : 64 * factor]
    large = (np.hypot(y - 31.3 * factor, x - 30.7 * factor) < 17.2 * factor) * 255.0
    cover = large.reshape(64, factor, 64, factor).mean((1, 3))
    shades = np.rint(cover).astype(np.uint8)
    data = {
        "L": lambda: saved(shades),
        "RGB": lambda: saved(np.dstack([shades, shades * 0, shades // 2])),
        "RGBA": lambda: saved(np.dstack([np.full_like(shades, 255)] * 3 + [shades])),
        "P": lambda: saved(Image.fromarray(shades).quantize(200)),
        "16": lambda: saved(np.rint(cover * 257).astype(np.uint16)),
    }[mode]()
    read = read_mask(data)
    assert read.halved
    certain = np.abs(cover - 127.5) > (0.6 if mode != "P" else 4)
    np.testing.assert_array_equal((read.pixels > 0)[certain], (cover > 127.5)[certain])
    assert (decode_mask(data, 0) > 0).sum() > (read.pixels > 0).sum()  # every shade, where it is asked for


@pytest.mark.parametrize(
    "values", [(1,), (1, 2, 3), (1, 255), (1, 128, 255), (85, 170, 255), (254, 255), (10, 11, 150)]
)
@pytest.mark.parametrize("thickness", [1, 2, 9])
def test_class_numbers_are_no_shades(values, thickness):
    """Areas and scratches of one class each, side by side or one within the other."""
    classes = np.zeros((120, 120), np.uint8)
    for number, value in enumerate(values):
        classes[5 + 30 * number : 5 + 30 * number + thickness, 10:90] = value
        classes[60 + 8 * number : 110 - 8 * number, 40 + 8 * number : 90 - 8 * number] = value
    read = read_mask(saved(classes))
    assert not read.halved
    np.testing.assert_array_equal(read.pixels > 0, classes > 0)


def test_inverted_masks():
    defect = blob()
    white = np.where(defect, np.uint8(0), np.uint8(255))
    for data in (saved(white), saved(Image.fromarray(~defect)), saved((~defect).astype(np.uint8))):
        assert covers_nearly_all(decode_mask(data))
        np.testing.assert_array_equal(read_mask(data, invert=True).pixels > 0, defect)
    outside = np.zeros_like(defect)
    outside[:, 55:] = True  # transparent, so neither defect nor its contrary
    data = saved(layered(white, ~outside * 255))
    np.testing.assert_array_equal(read_mask(data, invert=True).pixels > 0, defect & ~outside)


def test_what_covers_nearly_all_of_an_image():
    empty, full = np.zeros((40, 50), np.uint8), np.full((40, 50), 255, np.uint8)
    hole, large, half = full.copy(), empty.copy(), full.copy()
    hole[5:30, 5:40] = 0  # 56 % of the image, and all its border
    large[2:-2, 2:-2] = 255  # 83 %, within
    half[:, :26] = 0
    found = {name: covers_nearly_all(mask) for name, mask in
             {"empty": empty, "full": full, "hole": hole, "large": large, "half": half}.items()}  # fmt: skip
    assert found == {"empty": False, "full": True, "hole": True, "large": False, "half": False}


@pytest.mark.parametrize("value", UPRIGHT)
def test_a_mask_is_turned_as_its_image(value):
    mask = CLASSES.astype(np.uint8) * np.uint8(85)
    np.testing.assert_array_equal(turn_upright(mask, value), UPRIGHT[value](mask))
    assert read_mask(saved(mask, exif=orientation(value))).orientation == value
    assert read_mask(saved(mask)).orientation is None


def test_an_index_beyond_the_palette_is_no_crash():
    assert outcome(decode_mask, NO_IMAGES["broken palette"])[0] in ("ok", "corrupt")
    assert outcome(decode_image, NO_IMAGES["broken palette"])[0] == outcome(check_image, NO_IMAGES["broken palette"])[0]


def test_float_masks_are_refused():
    assert status_of(decode_mask, saved(GREYS.astype(np.float32), "TIFF")) == "unsupported"


# ---- to the network's input ---------------------------------------------------------------------------------------


def random_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width"), [(256, 256), (300, 401), (401, 300), (257, 255), (900, 700), (31, 47), (256, 391), (224, 224)]
)
def test_the_default_policy_is_torchvisions_resize_and_centre_crop(height, width):
    image = random_image(height, width)
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(image))
    prepared = prepare_image(image, InputPolicy())
    assert prepared.shape == (224, 224, 3)
    assert prepared.flags.c_contiguous
    np.testing.assert_array_equal(prepared, np.asarray(expected))


@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    size=st.integers(1, 40),
    spare=st.integers(0, 15),
    interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
@settings(max_examples=150, deadline=None)
def test_short_side_agrees_with_torchvision_at_every_size(height, width, size, spare, interpolation):
    crop = max(1, size - spare)
    image = random_image(height, width)
    mode = transforms.InterpolationMode(interpolation)
    expected = functional.center_crop(functional.resize(Image.fromarray(image), size, mode), crop)
    policy = InputPolicy("short_side", size, crop, interpolation=interpolation)
    np.testing.assert_array_equal(prepare_image(image, policy), np.asarray(expected))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(100, 37), (64, 64), (20, 150)])
def test_stretch_agrees_with_torchvision(height, width, interpolation):
    image = random_image(height, width)
    mode = transforms.InterpolationMode(interpolation)
    expected = functional.resize(Image.fromarray(image), [64, 64], mode)
    policy = InputPolicy("stretch", 64, interpolation=interpolation)
    assert policy.side == 64
    np.testing.assert_array_equal(prepare_image(image, policy), np.asarray(expected))


def test_an_image_of_the_right_size_is_not_touched():
    image = random_image(64, 64)
    np.testing.assert_array_equal(prepare_image(image, InputPolicy("stretch", 64)), image)
    np.testing.assert_array_equal(prepare_image(image, InputPolicy("short_side", 64, 64)), image)


def test_padding_is_black_and_even():
    image = random_image(32, 32)
    policy = InputPolicy("stretch", 32, pad=39)
    padded = prepare_image(image, policy)
    assert policy.side == 39
    assert padded.shape == (39, 39, 3)
    np.testing.assert_array_equal(padded[3:35, 3:35], image)
    padded[3:35, 3:35] = 0
    assert not padded.any()
    mask = prepare_mask(np.full((32, 32), 255, np.uint8), policy)
    assert mask.shape == (39, 39)
    assert mask.sum() == 32 * 32


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"crop": None}, "crop"),
        ({"crop": 0}, "crop"),
        ({"size": 200}, "crop"),
        ({"size": 0, "resize": "stretch"}, "size"),
        ({"pad": 223}, "pad"),
        ({"resize": "stretch", "size": 300, "pad": 299}, "pad"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(options, names):
    with pytest.raises(OptionError, match=names):
        InputPolicy(**options)


def test_stretching_pays_no_heed_to_the_crop():
    assert InputPolicy("stretch", 128).side == 128


def noisy_mask(height, width, seed=1):
    smooth = functional.gaussian_blur(torch.rand(1, height, width, generator=torch.manual_seed(seed)), 5)[0]
    return np.where(smooth.numpy() > 0.5, np.uint8(255), np.uint8(0))


@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (40, 40)])
@pytest.mark.parametrize("resize", ["short_side", "stretch"])
def test_mask_policies_against_torchvision(height, width, resize):
    mask = noisy_mask(height, width)
    wanted = [64, 64] if resize == "stretch" else 64

    def expected(mode):
        image = functional.resize(Image.fromarray(mask), wanted, mode)
        image = image if resize == "stretch" else functional.center_crop(image, 50)
        return functional.to_tensor(image)[0].numpy()

    def prepared(mask_resize):
        return prepare_mask(mask, InputPolicy(resize, 64, 50, mask_resize=mask_resize))

    smooth = expected(transforms.InterpolationMode.BILINEAR)
    np.testing.assert_array_equal(prepared("nearest_only"), expected(transforms.InterpolationMode.NEAREST) > 0)
    np.testing.assert_array_equal(prepared("bilinear_any"), smooth > 0)
    np.testing.assert_array_equal(prepared("bilinear_half"), smooth > 0.5)
    np.testing.assert_array_equal(prepared("bilinear_full"), smooth == 1)
    assert prepared("nearest").dtype == bool


def test_mask_policies_by_hand():
    """Halving a mask: the bilinear filter spans four pixels with weights 1, 3, 3, 1."""
    mask = np.zeros((4, 8), np.uint8)
    mask[:, :3] = 255

    def row(mask_resize):
        return prepare_mask(np.repeat(mask, 2, axis=0), InputPolicy("stretch", 4, mask_resize=mask_resize))[1].tolist()

    # without the two columns beyond the edge: 1, (1 + 3) / 8, 0, 0
    assert row("bilinear_any") == [True, True, False, False]
    assert row("bilinear_half") == [True, True, False, False]
    assert row("bilinear_full") == [True, False, False, False]
    assert row("nearest") == [True, False, False, False]


EIGHT = np.ones((3, 3))


@pytest.mark.parametrize(("height", "width"), [(20, 30), (37, 90), (7, 200)])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_every_defect_keeps_a_cell_and_none_gets_one_it_does_not_touch(height, width, density):
    """Against one region after the other, in specks and in clusters."""
    mask = np.where(np.random.default_rng(0).random((90, 120)) < density, np.uint8(255), np.uint8(0))
    nearest = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)) > 0
    found = reduce_mask(mask, height, width) > 0
    regions, count = ndimage.label(mask, EIGHT)
    allowed = nearest.copy()
    for number in range(1, count + 1):
        rows, columns = np.nonzero(regions == number)
        touched = (((rows + 0.5) * height / 90).astype(int), ((columns + 0.5) * width / 120).astype(int))
        assert found[touched].any()
        allowed[touched] = True
    assert not (nearest & ~found).any()
    assert not (found & ~allowed).any()


def thin_masks():
    """Scratches, hairs and specks in 1024 × 1024, by name."""
    masks = {}
    for width, (rise, run) in [(w, slope) for w in (1, 2, 3) for slope in ((0, 600), (5, 600), (40, 600), (300, 600))]:
        for offset in range(4):
            canvas = Image.new("L", (1024, 1024))
            start = (200, 301 + offset)
            ImageDraw.Draw(canvas).line((*start, start[0] + run, start[1] + rise), 255, width)
            masks[f"{width} wide, rising {rise}, at {offset}"] = np.asarray(canvas)
    speck = np.zeros((1024, 1024), np.uint8)
    speck[500, 501] = 255
    ring = np.zeros((1024, 1024), np.uint8)
    distance = np.hypot(*(np.mgrid[:1024, :1024] - 511.5))
    ring[np.abs(distance - 300) < 1] = 255
    return {**masks, "speck": speck, "ring": ring}


@pytest.mark.parametrize("name", thin_masks())
def test_thin_defects_are_kept_whole(name):
    mask = thin_masks()[name]
    touched = mask.reshape(256, 4, 256, 4).any((1, 3))  # any pixel of the cell
    for found in (
        prepare_mask(mask, InputPolicy("stretch", 256)),
        prepare_mask(mask, InputPolicy("short_side", 256, 256)),
        reduce_mask(mask, 256, 256) > 0,
        crop_mask(mask, CropWindow(0, 0, 1024, 256)) > 0,
    ):
        assert not (found & ~touched).any()
        assert ndimage.label(found, EIGHT)[1] == 1
        for axis in (0, 1):  # from end to end
            assert abs(int(found.any(axis).sum()) - int(touched.any(axis).sum())) <= 2
    np.testing.assert_array_equal(
        prepare_mask(mask, InputPolicy("stretch", 256, mask_resize="nearest_only")),
        np.asarray(Image.fromarray(mask).resize((256, 256), Image.Resampling.NEAREST)) > 0,
    )


def test_a_scratch_of_two_pixels_has_the_cells_it_lies_in():
    mask = np.zeros((1024, 1024), np.uint8)
    mask[400:402, 200:800] = 255
    expected = np.zeros((256, 256), bool)
    expected[100, 50:200] = True
    np.testing.assert_array_equal(prepare_mask(mask, InputPolicy("stretch", 256)), expected)


@pytest.mark.parametrize("side", [256, 224, 97])
def test_other_defects_are_those_of_nearest_neighbour(side):
    """To the pixel: discs and squares, with a speck beside them that alone is added."""
    rng = np.random.default_rng(side)
    for _ in range(20):
        canvas = Image.new("L", (900, 700))
        for x, y, size in zip(*rng.integers(0, 600, (2, 3)), rng.integers(30, 90, 3), strict=True):
            ImageDraw.Draw(canvas).ellipse((x, y, x + size, y + 0.7 * size), 255)
        mask = np.asarray(canvas).copy()
        nearest = np.asarray(canvas.resize((side, side), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(reduce_mask(mask, side, side), nearest)
        mask[690, 890] = 255  # between the pixels that nearest neighbour looks at, or one of them
        speck = np.zeros((side, side), np.uint8)
        speck[1381 * side // 1400, 1781 * side // 1800] = 255
        np.testing.assert_array_equal(reduce_mask(mask, side, side), np.maximum(nearest, speck))


def test_enlarged_masks_are_those_of_nearest_neighbour():
    mask = noisy_mask(30, 40)
    expected = np.asarray(Image.fromarray(mask).resize((80, 60), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(reduce_mask(mask, 60, 80), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(20_000, 2), (2, 20_000), (1, 20_000), (1, 500), (65 * 7, 7)])
def test_of_a_narrow_strip_only_what_the_crop_keeps_is_scaled(height, width, interpolation, monkeypatch):
    """The whole would have up to 1.3 billion pixels; the largest picture made here has those of the input."""
    made = []
    resize = Image.Image.resize

    def watched(self, size, *arguments, **options):
        made.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    along = np.linspace(0, 255, max(height, width))
    shades = np.rint(along).astype(np.uint8)
    strip = np.tile(shades[:, None] if height > width else shades[None], (1, width) if height > width else (height, 1))
    data = saved(np.dstack([strip] * 3))
    for policy in (InputPolicy(interpolation=interpolation), InputPolicy("short_side", 64, 64, 80, interpolation)):
        found = decode_prepared(data, policy)
        assert found.shape == (policy.side, policy.side, 3)
        np.testing.assert_array_equal(found, prepare_image(np.dstack([strip] * 3), policy))
        assert max(made) <= policy.side**2
        kept = _inner(found, policy)
        assert abs(kept.mean() - 127.5) < 2  # the middle of the ramp
        mask = prepare_mask(np.full((height, width), 255, np.uint8), policy)
        assert mask.shape == (policy.side, policy.side)
        assert _inner(mask, policy).all()
        assert max(made) <= policy.side**2
        made.clear()


def _inner(pixels, policy):
    before = (policy.side - policy.crop) // 2
    return pixels[before : before + policy.crop, before : before + policy.crop]


@pytest.mark.parametrize(("height", "width"), [(64 * 7, 7), (66 * 7, 7), (7, 66 * 7), (70 * 7, 7)])
def test_strips_on_both_sides_of_the_limit_look_the_same(height, width, monkeypatch):
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize((width, height), 3))
    policy = InputPolicy("short_side", 64, 50)
    found = prepare_image(image, policy)
    expected = functional.center_crop(functional.resize(Image.fromarray(image), 64), 50)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1)


def test_what_would_be_enlarged_beyond_the_memory_is_not_scaled_as_a_whole(monkeypatch):
    """1 × 60 pixels for an input of 2,048 would have 250 million."""
    made = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: made.append(size[0] * size[1]) or resize(self, size, *rest)
    )
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (1, 1, 3))
    found = prepare_image(ramp, InputPolicy("short_side", 2048, 2048))
    assert made == [2048**2]
    assert found.mean() == pytest.approx(ramp.mean(), abs=1)


@pytest.mark.parametrize("policy", [InputPolicy("short_side", 60, 48, 70), InputPolicy("stretch", 60, pad=61)])
def test_a_mask_lands_where_its_image_does(policy):
    disc = (np.hypot(*(np.mgrid[:100, :150] - np.array([40, 80])[:, None, None])) < 25) * np.uint8(255)
    image = prepare_image(np.stack([disc] * 3, axis=2), policy)[..., 0] > 127
    mask = prepare_mask(disc, policy)
    assert image.shape == mask.shape == (policy.side, policy.side)
    assert (image & mask).sum() / (image | mask).sum() > 0.93


def test_normalise_by_hand():
    policy = InputPolicy(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    images = [np.full((2, 2, 3), shade, np.uint8) for shade in (0, 255)]
    batch = normalise(images, policy)
    assert batch.shape == (2, 3, 2, 2)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    np.testing.assert_allclose(batch[:, :, 1, 0], [[-1, -0.25, 0], [1, 0.75, 0.5]], rtol=1e-6)
    assert images[1].max() == 255


def test_normalise_agrees_with_torchvision():
    image = random_image(24, 24)
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(image)
    batch = normalise([image, image[::-1]], InputPolicy(mean=IMAGENET_MEAN, std=IMAGENET_STD))
    torch.testing.assert_close(batch[0], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch[1], expected.flip(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("missing", ["mean", "std"])
def test_normalise_needs_mean_and_std(missing):
    policy = InputPolicy(**{"mean": IMAGENET_MEAN, "std": IMAGENET_STD, missing: None})
    with pytest.raises(OptionError, match="not set"):
        normalise([random_image(4, 4)], policy)


# ---- reduced images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 131), (131, 90), (64, 99)])
def test_reduced_images_have_the_size_and_pixels_of_torchvisions_resize(height, width):
    image = random_image(height, width)
    expected = np.asarray(functional.resize(Image.fromarray(image), 48))
    reduced = reduce_image(saved(image), 48)
    assert decode_image(reduced).format == "PNG"
    np.testing.assert_array_equal(decode_image(reduced).pixels, expected)
    mask = np.asarray(Image.fromarray(blob()).resize((width, height))).astype(np.uint8) * np.uint8(255)
    np.testing.assert_array_equal(
        reduce_mask(mask, *expected.shape[:2]),
        np.asarray(functional.resize(Image.fromarray(mask), 48, transforms.InterpolationMode.NEAREST)),
    )


@pytest.mark.parametrize("file_format", ["JPEG", "MPO"])
def test_reduced_jpeg_stays_jpeg(file_format):
    smooth = np.tile(np.linspace(0, 255, 128).astype(np.uint8)[None, :, None], (96, 1, 3))
    reduced = reduce_image(saved(smooth, file_format, quality=98), 48)
    assert check_image(reduced) == ImageFacts("JPEG", 48, 64)
    expected = np.asarray(functional.resize(Image.fromarray(smooth), 48))
    np.testing.assert_allclose(decode_image(reduced).pixels, expected, atol=6)


def test_small_images_are_not_re_encoded():
    data = saved(random_image(48, 90), "JPEG", exif=orientation(6))
    assert reduce_image(data, 48) is data


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_reduced_image_is_upright_and_is_not_turned_again(value, file_format):
    """Each corner keeps its shade; what is turned twice would not."""
    corners = np.kron([[0, 80], [160, 240]], np.ones((60, 100))).astype(np.uint8)
    reduced = reduce_image(saved(corners, file_format, exif=orientation(value)), 40)
    decoded = decode_image(reduced).pixels[..., 0].astype(int)
    expected = UPRIGHT[value](corners)
    for row in (0, -1):
        for column in (0, -1):
            assert abs(decoded[row, column] - expected[row, column]) < 6


def test_reduced_images_of_other_modes_become_eight_bit_colours():
    reduced = reduce_image(saved(SIXTEEN), 20)
    assert Image.open(io.BytesIO(reduced)).mode == "RGB"
    expected = Image.fromarray(np.rint(SIXTEEN / 257).astype(np.uint8)).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode_image(reduced).pixels[..., 2], np.asarray(expected))


def test_images_that_cannot_be_decoded_cannot_be_reduced():
    assert status_of(reduce_image, WHOLE["PNG"][:200], 16) == "corrupt"


# ---- PNG and anomaly maps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [COLOURS, GREYS, SIXTEEN], ids=["RGB", "8 bits", "16 bits"])
def test_encoded_png_holds_exactly_the_pixels(pixels):
    data = encode_png(pixels)
    assert data == encode_png(pixels.copy())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 8), st.integers(1, 8)),
        elements=st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6),
    )
)
@settings(max_examples=200, deadline=None)
def test_a_packed_map_is_off_by_half_a_step_at_most(anomaly_map):
    data, offset, scale = encode_map(anomaly_map)
    steps = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64)
    # the step itself is a 32-bit float: 65,535 of them are off by 2^-24 of the range, 1/250 of a step
    assert np.abs(offset + scale * steps - anomaly_map).max() <= scale * (0.5 + 65535 * 2.0**-24)
    rounding = np.spacing(np.abs(anomaly_map).max())
    assert np.abs(decode_map(data, offset, scale) - anomaly_map).max() <= scale * 0.51 + rounding
    if scale > 0:
        assert steps.min() == 0
        assert steps.max() == 65535


def test_a_packed_map_keeps_order_sign_and_shape():
    anomaly_map = np.linspace(-3, 5, 63, dtype=np.float32).reshape(7, 9)
    unpacked = decode_map(*encode_map(anomaly_map))
    assert unpacked.shape == (7, 9)
    assert unpacked.dtype == np.float32
    assert (np.diff(unpacked.ravel()) > 0).all()
    assert unpacked[0, 0] == -3
    assert unpacked[-1, -1] == pytest.approx(5, abs=1e-6)


def test_a_constant_map_comes_back_exactly():
    for value in (0.0, -2.7182817, 1e-12):
        anomaly_map = np.full((3, 4), value, np.float32)
        data, offset, scale = encode_map(anomaly_map)
        assert scale == 0
        np.testing.assert_array_equal(decode_map(data, offset, scale), anomaly_map)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_refused(value):
    anomaly_map = np.ones((3, 3), np.float32)
    anomaly_map[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode_map(anomaly_map)


@pytest.mark.parametrize(
    "policy",
    [
        InputPolicy(resize="stretch", size=32, crop=None),
        InputPolicy(resize="short_side", size=40, crop=32),
        InputPolicy(resize="stretch", size=20, crop=None, pad=24),
    ],
    ids=["stretched", "cropped", "padded"],
)
@pytest.mark.parametrize("pixels", [GREYS, COLOURS, GREYS > 100, SIXTEEN], ids=["grey", "colour", "one bit", "16 bits"])
def test_decoding_and_preparing_at_once_gives_the_same_bits(pixels, policy):
    data = saved(Image.fromarray(pixels))
    fused = decode_prepared(data, policy)
    np.testing.assert_array_equal(fused, prepare_image(decode_image(data).pixels, policy))
    assert fused.flags.c_contiguous


# ---- crops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(24, 37), (25, 36), (16, 16), (9, 40), (10, 11), (40, 15), (16, 9)])
def test_centre_crops_agree_with_torchvision_with_padding_and_without(height, width):
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(1, 256, (height, width, 3)).astype(np.uint8)
    mask = np.where(rng.random((height, width)) < 0.5, np.uint8(255), np.uint8(0))
    window = find_crop(pixels, Crop("centre", 16, pad=True))
    crop = transforms.CenterCrop(16)
    np.testing.assert_array_equal(crop_image(pixels, window), np.asarray(crop(Image.fromarray(pixels))))
    np.testing.assert_array_equal(crop_mask(mask, window), np.asarray(crop(Image.fromarray(mask))))
    if min(height, width) >= 16:
        assert find_crop(pixels, Crop("centre", 16)) == window
    else:
        with pytest.raises(ImageError, match=f"{width} x {height} pixels, smaller than .* 16; .*crop=false") as caught:
            find_crop(pixels, Crop("centre", 16))
        assert caught.value.status == "unsupported"


def fundus(height=120, width=200, y=60, x=90, radius=40):
    """A drawn photograph of a retina: a dark ground with noise below the threshold, and bright specks on it."""
    rng = np.random.default_rng(radius)
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    pixels = rng.integers(0, 11, (height, width, 3)).astype(np.uint8)  # R + G + B up to 30
    pixels[inside] = rng.integers(60, 200, (inside.sum(), 3))
    pixels[2:5, 2:6] = 255  # the name of the camera
    pixels[-3:, -9:] = 40
    return pixels


def plain_fundus_crop(pixels, margin=5, threshold=30):
    """What to keep, written out pixel by pixel, before it is resized."""
    bright = pixels.astype(int).sum(axis=2) > threshold
    regions, count = ndimage.label(bright, structure=[[1, 1, 1], [1, 1, 1], [1, 1, 1]])
    sizes = ndimage.sum_labels(bright, regions, range(1, count + 1))
    largest = int(np.argmax(sizes)) + 1
    rows, columns = ndimage.find_objects(regions)[largest - 1]
    y, x = ndimage.center_of_mass(bright, regions, largest)
    length = max(rows.stop - rows.start, columns.stop - columns.start)
    top, left = int(np.floor(y - length / 2)) - margin, int(np.floor(x - length / 2)) - margin
    side = length + 2 * margin
    kept = np.zeros((side, side, 3), np.uint8)
    for row in range(side):
        for column in range(side):
            if 0 <= top + row < pixels.shape[0] and 0 <= left + column < pixels.shape[1]:
                kept[row, column] = pixels[top + row, left + column]
    return kept


@pytest.mark.parametrize(
    "pixels",
    [
        fundus(),
        fundus(y=55, x=88, radius=33),
        fundus(y=20, x=30, radius=45),  # cut off at the top and the left
        fundus(y=110, x=190, radius=50),  # and at the bottom and the right
        fundus(height=70, y=35, radius=60),  # and on both sides, as some cameras do
    ],
    ids=["whole", "odd", "top left", "bottom right", "band"],
)
def test_fundus_crops_against_a_plain_implementation(pixels):
    kept = plain_fundus_crop(pixels)
    window = find_crop(pixels, Crop("fundus", 64))
    expected = np.asarray(Image.fromarray(kept).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(crop_image(pixels, window), expected)
    unscaled = find_crop(pixels, Crop("fundus", len(kept)))
    np.testing.assert_array_equal(crop_image(pixels, unscaled), kept)
    tight = find_crop(pixels, Crop("fundus", 64, margin=0))
    assert (tight.top - 5, tight.left - 5, tight.length + 10) == (window.top, window.left, window.length)


def test_a_fundus_crop_by_hand():
    """A bright bar of 4 rows and 10 columns whose first row touches the next only at a corner; a larger dark one."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[10, 4] = 11
    pixels[11:14, 5:14] = 11
    pixels[20:, :] = 10
    # The corner counts: 28 pixels, columns 4…13 and rows 10…13; centroid 334 / 28 = 11.9 and 247 / 28 = 8.8.
    y, x = (3 * 27 * 4 + 10) / 28, (9 * 27 + 4) / 28
    window = find_crop(pixels, Crop("fundus", 12, margin=1))
    assert window == CropWindow(int(y - 5) - 1, int(x - 5) - 1, 12, 12) == CropWindow(5, 2, 12, 12)
    np.testing.assert_array_equal(crop_image(pixels, window), pixels[5:17, 2:14])
    assert find_crop(pixels, Crop("fundus", 12, threshold=29)).length == 40 + 10
    with pytest.raises(ImageError, match=r"no pixel has R \+ G \+ B above 33, .*crop=false") as caught:
        find_crop(pixels, Crop("fundus", 12, threshold=33))
    assert caught.value.status == "unsupported"


def test_a_cropped_mask_lies_on_its_cropped_image():
    pixels = fundus()
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask[50:80, 70:90] = 255
    pixels[mask > 0] = 255
    window = find_crop(pixels, Crop("fundus", 128))
    cropped = crop_mask(mask, window)
    assert set(np.unique(cropped)) == {0, 255}
    seen = crop_image(pixels, window).min(axis=2) > 227  # halfway between the spot and the brightest of the rest
    assert (seen != (cropped > 0)).mean() < 0.01


@pytest.mark.parametrize("crop", [Crop("fundus", 8), Crop("centre", 1000, pad=True)])
def test_a_crop_larger_than_the_limit_is_refused_before_it_is_made(crop):
    strip = np.full((1, 1000, 3), 99, np.uint8)
    with pytest.raises(ImageError, match=r"its crop has \d+ x \d+ pixels, more than --limits.max_pixels") as caught:
        find_crop(strip, crop, ImageLimits(max_pixels=999_999))
    assert caught.value.status == "too_large"
