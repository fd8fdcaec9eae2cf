"""The script beside an exported model prepares and decides as unianom does, to the bit."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.serving import predict
from pipelines.serving.description import decision, preprocessing
from tests.methods.conftest import tiny_method
from unianom.data.image import InputPolicy, decode_prepared
from unianom.errors import ImageError
from unianom.model import Model
from unianom.thresholds import fit_rule, fit_threshold

STATISTICS: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

POLICIES = {
    "stretch": InputPolicy("stretch", 48, None, **STATISTICS),
    "stretch with a crop that plays no part": InputPolicy("stretch", 48, 32, **STATISTICS),
    "bicubic": InputPolicy("short_side", 64, 48, interpolation="bicubic", **STATISTICS),
    "lanczos, padded": InputPolicy("short_side", 40, 31, pad=64, interpolation="lanczos", **STATISTICS),
    "to 256": InputPolicy("short_side", 256, 224, **STATISTICS),
    "decoded scaled": InputPolicy("short_side", 32, 24, decode="scaled", **STATISTICS),
}

RNG = np.random.default_rng(0)


def smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), 3)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(smooth(90, 61), "JPEG", exif=exif, quality=90)


GREY16 = RNG.integers(0, 1 << 16, (60, 80)).astype(np.uint16)

FILES = {
    "png": encoded(smooth(100, 71), "PNG"),
    "jpeg": encoded(smooth(200, 300), "JPEG"),
    "jpeg, large": encoded(smooth(513, 513), "JPEG"),
    "grey jpeg": encoded(smooth(99, 99).convert("L"), "JPEG"),
    "cmyk": encoded(smooth(80, 60).convert("CMYK"), "JPEG"),
    "palette": encoded(smooth(80, 60).convert("P"), "PNG", transparency=3),
    "alpha": encoded(smooth(80, 60).convert("RGBA"), "PNG"),
    "black and white": encoded(smooth(80, 60).convert("1"), "PNG"),
    "webp": encoded(smooth(80, 60), "WEBP"),
    "bmp": encoded(smooth(80, 60), "BMP"),
    "16 bits": encoded(Image.fromarray(GREY16), "PNG"),
    "tiff of 16 bits": encoded(Image.fromarray(GREY16), "TIFF"),
    "tiff of 12 bits": encoded(Image.fromarray(GREY16 >> 4), "TIFF", tiffinfo={341: 4095}),
    "a thin strip": encoded(smooth(2000, 9), "PNG"),
    **{f"orientation {number}": turned(number) for number in range(1, 9)},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_images_are_prepared_as_the_model_has_them(policy: str) -> None:
    own = preprocessing(POLICIES[policy])
    for name, data in FILES.items():
        expected = decode_prepared(data, POLICIES[policy])
        np.testing.assert_array_equal(predict.prepare(data, own), expected, err_msg=name)


def test_an_image_whose_samples_state_their_bits() -> None:
    """PNG of 12 bits in 16, as cameras write: the chunk sBIT goes before the pixels."""
    plain = encoded(Image.fromarray((GREY16 >> 4).astype(np.uint16)), "PNG")
    stated = plain[:33] + _chunk(b"sBIT", b"\x0c") + plain[33:]
    policy = POLICIES["stretch"]
    found = predict.prepare(stated, preprocessing(policy))
    np.testing.assert_array_equal(found, decode_prepared(stated, policy))
    assert found.max() > 100 > predict.prepare(plain, preprocessing(policy)).max()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    "data", [b"", b"no image", FILES["jpeg"][:700], encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")]
)
def test_what_unianom_refuses_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_prepared(data, POLICIES["stretch"])
    with pytest.raises(ValueError, match=r"cannot read|float"):
        predict.prepare(data, preprocessing(POLICIES["stretch"]))


def test_decisions_are_the_model_s() -> None:
    normal = np.random.default_rng(1).normal(size=200)
    scores = {"cup": normal.tolist(), "dish": (normal + 3).tolist()}
    threshold = fit_threshold(normal, 0.05)
    common = fit_rule(scores, "raw", 0.05, 0.2, 0.95, False)
    each = fit_rule(scores, "calibrated", 0.05, 0.2, 0.95, True)
    method = tiny_method("revdist")
    models = [
        Model(method),
        Model(method, threshold=threshold),
        Model(
            tiny_method("revdist"), threshold=threshold, category_thresholds={"dish": fit_threshold(normal + 3, 0.1)}
        ),
        Model(method, threshold=threshold, decision_rule=common),
        Model(method, threshold=threshold, decision_rule=each),
    ]
    seen = set()
    for model in models:
        for category in (None, "cup", "dish", "fork"):
            for score in np.linspace(-3, 7, 41):
                result = {"score": float(score), "calibrated_score": float(score) - 1}
                expected = model.decide(result["score"], result["calibrated_score"], category)
                assert predict.decide(decision(model), result, category) == expected
                seen.add(expected)
    assert seen == {None, "pass", "review", "fail"}
