"""Score image files with the model exported beside this file, by NumPy, ONNX Runtime and Pillow alone.

    python predict.py part.png other.jpg
    python predict.py part.png --category bottle --maps maps --json

One line for each image: its path, score and, where the model has thresholds, decision. `export.json` says how images
become the network's input and scores decisions; `Predictor` may be used in a program of one's own. The exit code is 1
where an image could not be read.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ORIENTATION, BITS_PER_SAMPLE, LARGEST_SAMPLE = 0x0112, 258, 341  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Predictor:
    """The exported model.

    Args:
        folder: that holds `export.json`.
        threads: of the network; 0 takes all CPUs.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        import onnxruntime

        self.spec: dict[str, Any] = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(Path(folder) / self.spec["onnx"]["file"]), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self.session.get_outputs()]

    def predict(self, images: Sequence[str | Path | bytes], category: str | None = None) -> list[dict[str, Any]]:
        """Score image files, given by path or content, in one batch.

        Args:
            images: at least one.
            category: of all of them, for thresholds of single categories; a calibrator by labels needs it.

        Returns:
            For each "score", "anomaly_map" (S×S float32), of a calibrated model "calibrated_score" and
            "calibrated_map", and "decision": "pass", "review", "fail", or None where nothing decides.

        Raises:
            ValueError: an image cannot be read, or the category is needed or unknown.
        """
        return self.predict_prepared(
            np.stack([prepare(image, self.spec["preprocessing"]) for image in images]), category
        )

    def predict_prepared(self, pixels: np.ndarray, category: str | None = None) -> list[dict[str, Any]]:
        """Score B×S×S×3 uint8 images that `prepare` made; else as `predict`."""
        inputs = {"images": pixels}
        known = self.spec["inputs"].get("category")
        if known is not None:
            if category not in known["names"]:
                raise ValueError(f"category {category!r} must be one of {', '.join(known['names'])}")
            inputs["category"] = np.full(len(pixels), known["names"].index(category), np.int64)
        values = dict(zip(self.outputs, self.session.run(self.outputs, inputs)))
        results = []
        for number in range(len(pixels)):
            result = {name: value[number] for name, value in values.items()}
            for name in ("score", "calibrated_score"):
                if name in result:
                    result[name] = float(result[name])
            if not math.isfinite(result["score"]):
                raise ValueError("the model gives an image no finite score; its attention tells nothing")
            result["decision"] = decide(self.spec["decision"], result, category)
            results.append(result)
        return results


# ------------------------------------------------------------------------------------------------------------ decisions
def decide(decision: dict[str, Any], result: dict[str, Any], category: str | None) -> str | None:
    """Decide by the model's rule, else by the threshold of the category, else by that of all; None by none of them."""
    rule = decision["rule"]
    if rule is not None:
        bands = rule["common"] if category is None else rule["categories"].get(category, rule["common"])
        if bands is None:
            return None
        score = result["score"] if rule["kind"] == "raw" else result["calibrated_score"]
        if score > bands["fail"]["value"]:
            return "fail"
        return "review" if score > bands["review"]["value"] else "pass"
    threshold = decision["category_thresholds"].get(category, decision["threshold"])
    if threshold is None:
        return None
    return "fail" if result["score"] > threshold["value"] else "pass"


# ------------------------------------------------------------------------------------------------------- preprocessing
def prepare(image: str | Path | bytes, policy: dict[str, Any]) -> np.ndarray:
    """Decode an image file and scale, cut and pad it to S×S×3 uint8, as "preprocessing" of `export.json` says.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    try:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        size = scaled_size(width, height, policy)
        if policy["decode"] == "scaled" and opened.format == "JPEG":
            opened.draft(None, size)
        sample_bits, stated_bits = stored_bits(opened, data)
        opened.load()
        orientation = opened.getexif().get(ORIENTATION)
    except Exception as error:  # a decoder raises whatever its parser stumbled over
        raise ValueError(f"cannot read the image: {error}") from error
    upright = opened.transpose(TURNS[orientation]) if orientation in TURNS else opened
    if orientation in (5, 6, 7, 8):  # height and width change places
        size = size[::-1]
    rgb = to_rgb(upright, str(opened.format), sample_bits, stated_bits)
    pixels = scale_and_cut(rgb, size, policy)
    if policy["pad"] is not None:
        before = (policy["pad"] - len(pixels)) // 2
        after = policy["pad"] - len(pixels) - before
        pixels = np.pad(pixels, [(before, after), (before, after), (0, 0)])
    return np.ascontiguousarray(pixels)


def scaled_size(width: int, height: int, policy: dict[str, Any]) -> tuple[int, int]:
    """Return width and height that an image is scaled to, before the crop is cut."""
    side = policy["size"]
    if policy["resize"] == "stretch":
        return side, side
    if width <= height:
        return side, max(side, side * height // width)
    return max(side, side * width // height), side


def scale_and_cut(image: Image.Image, size: tuple[int, int], policy: dict[str, Any]) -> np.ndarray:
    """Scale an upright RGB image and cut the crop from its middle; H×W×3 uint8."""
    (width, height), crop, resampling = size, policy["crop"], FILTERS[policy["interpolation"]]
    cuts = policy["resize"] == "short_side" and crop is not None
    long = max(width, height) > 64 * min(width, height) or width * height > 1 << 26
    if cuts and long and min(width, height) > min(image.size):  # as a whole it would take gigabytes
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + crop) * across, (top + crop) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return np.asarray(image.resize((crop, crop), resampling, box))
    pixels = np.asarray(image if size == image.size else image.resize(size, resampling))
    if not cuts:
        return pixels
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    return pixels[top : top + crop, left : left + crop]


def to_rgb(image: Image.Image, file_format: str, sample_bits: int, stated_bits: int | None) -> Image.Image:
    """Convert any colour mode to 8-bit RGB: alpha is dropped, 16-bit grey is scaled."""
    if image.mode == "RGB":
        if stated_bits is not None and 0 < int(np.asarray(image).max()) < 1 << max(stated_bits - 8, 0):
            raise ValueError(f"colours of {stated_bits} bits in samples of {sample_bits}; convert the file to 8 bits")
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels beyond 0…65535; convert the file to 8 or 16 bits")
        return Image.fromarray(sixteen_to_eight(values, file_format, stated_bits)).convert("RGB")
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no agreed range; convert the file to 8 or 16 bits")
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def sixteen_to_eight(values: np.ndarray, file_format: str, bits: int | None) -> np.ndarray:
    """Scale samples of 16 bits, or of those that the file states, to 8 bits, rounded."""
    if bits is not None and values.max() < 1 << bits:
        lower = values & ((1 << (16 - bits)) - 1)
        scaled_up = (lower == 0).all() or (bits >= 8 and (lower == values >> bits).all())
        if not (file_format == "PNG" and scaled_up):
            white = (1 << bits) - 1
            return ((510 * values + white) // (2 * white)).astype(np.uint8)
    return ((values + 128) // 257).astype(np.uint8)


def stored_bits(image: Image.Image, data: bytes) -> tuple[int, int | None]:
    """Return bits that a sample is stored in, and those it makes use of where the file states fewer, of PNG by sBIT, of
    TIFF by SMaxSampleValue or BitsPerSample."""
    sample_bits, stated_bits = 8, None
    if image.format == "PNG":
        sample_bits, place = data[24], 8
        while place + 8 <= len(data):
            length, name = struct.unpack(">I4s", data[place : place + 8])
            if name == b"sBIT":
                stated_bits = max(data[place + 8 : place + 8 + min(length, 4)], default=None)
            if name in (b"sBIT", b"IDAT"):
                break
            place += length + 12
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        sample_bits = max(tags.get(BITS_PER_SAMPLE, (8,)))
        value = tags.get(LARGEST_SAMPLE)
        largest = max(value) if isinstance(value, tuple) and value else value
        whole = isinstance(largest, int | float) and largest >= 1 and largest == int(largest)
        bits = int(largest).bit_length() if whole else 0  # type: ignore[arg-type]
        stated_bits = bits if whole and int(largest) == (1 << bits) - 1 else sample_bits  # type: ignore[arg-type]
    if sample_bits <= 8 or (stated_bits is not None and stated_bits >= 16):
        stated_bits = None
    return sample_bits, stated_bits


# -------------------------------------------------------------------------------------------------------- command line
def main(arguments: Sequence[str] | None = None) -> int:
    """Score the images named on the command line; 0, or 1 where one could not be read."""
    parser = argparse.ArgumentParser(description="Score images with the exported model in this folder.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--category", help="category of the images")
    parser.add_argument("--maps", help="folder for anomaly maps, as NumPy arrays NAME.npy")
    parser.add_argument("--threads", type=int, default=0, help="threads of the network; 0 takes all CPUs")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each image")
    given = parser.parse_args(arguments)
    predictor, failed = Predictor(Path(__file__).parent, given.threads), False
    for number, path in enumerate(given.images):
        row: dict[str, Any] = {"image": path}
        try:
            [result] = predictor.predict([path], given.category)
        except ValueError as error:
            failed, row["error"] = True, str(error)
        else:
            row |= {name: result[name] for name in ("score", "calibrated_score", "decision") if name in result}
            if given.maps is not None:
                Path(given.maps).mkdir(parents=True, exist_ok=True)
                row["map"] = str(Path(given.maps) / f"{number:05d}-{Path(path).stem}.npy")
                np.save(row["map"], result["anomaly_map"])
        if given.json:
            print(json.dumps(row))
        else:
            print("  ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
