"""What lies beside an exported file: `export.json`, which specifies all that is not in it, and a README."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from pipelines.serving.export_graph import CATEGORY, IMAGES, ModelGraph, OnnxGraph
from pipelines.serving.gate import Agreement
from pipelines.serving.options import ExportOptions
from unianom import files
from unianom.data.image import InputPolicy
from unianom.model import Model
from unianom.options import to_plain

FORMAT_VERSION = 1

OUTPUTS = {
    "score": "B float32; image score on the method's own scale, higher is more anomalous",
    "anomaly_map": "B×S×S float32; of the prepared image, on the method's own scale",
    "calibrated_score": "B float32; the score on a scale that all categories share",
    "calibrated_map": "B×S×S float32; the map on that scale",
}

STEPS = (
    "decode the first frame to 8-bit RGB: grey repeated, palettes resolved, alpha dropped, EXIF orientation applied; "
    "16-bit grey scaled to 8 bits",
    "scale by Pillow with the named filter, antialiased: 'stretch' to size × size, 'short_side' so that the shorter "
    "side is size, the longer one size · longer // shorter",
    "cut crop × crop from the middle, unless stretched: it begins at round((length − crop) / 2)",
    "pad with zeros to pad × pad, the smaller half before",
)


def describe(
    model: Model,
    graph: ModelGraph,
    onnx_graph: OnnxGraph,
    options: ExportOptions,
    agreement: Agreement,
    normal_scores: np.ndarray,
    shards: str,
) -> dict[str, Any]:
    """Return the content of `export.json`.

    Args:
        model, graph, onnx_graph: what was exported.
        options: of the export.
        agreement: of the file with the model.
        normal_scores: raw scores of the normal images of the gate.
        shards: digest of the shard set these are from.
    """
    policy = model.method.input
    inputs: dict[str, Any] = {
        IMAGES: {"type": "uint8", "shape": ["B", policy.side, policy.side, 3], "colours": "RGB"},
    }
    if graph.takes_category and model.calibrator is not None:
        inputs[CATEGORY] = {"type": "int64", "shape": ["B"], "names": model.calibrator.categories}
    quantiles = np.quantile(normal_scores, [0, 0.5, 0.95, 1])
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "method": model.method.name,
            "digest": model.digest,
            "categories": model.categories,
            "config": to_plain(model.method.config),
        },
        "onnx": {
            "file": onnx_graph.path.name,
            "sha256": {path.name: files.sha256_of(path.read_bytes()) for path in onnx_graph.files},
            "opset": options.opset,
            "precision": options.precision,
        },
        "inputs": inputs,
        "outputs": {name: OUTPUTS[name] for name in graph.outputs},
        "preprocessing": preprocessing(policy),
        "decision": decision(model),
        "calibration": None if model.calibrator is None else to_plain(model.calibrator.config),
        "normal_scores": dict(zip(("lowest", "median", "quantile_95", "highest"), quantiles.tolist(), strict=True)),
        "gate": {
            **agreement.plain(),
            "bounds": dict(zip(("score", "map"), options.gate.bounds(options.precision), strict=True)),
            "shards": shards,
        },
        "versions": versions(),
    }


def preprocessing(policy: InputPolicy) -> dict[str, Any]:
    """Return how an image becomes the file's input, and what the file itself does to it."""
    return {
        **{key: getattr(policy, key) for key in ("resize", "size", "interpolation", "decode", "pad")},
        "crop": policy.crop if policy.resize == "short_side" else None,
        "side": policy.side,
        "steps": list(STEPS),
        "in_the_file": {"divide_by": 255, "mean": list(policy.mean or ()), "std": list(policy.std or ())},
    }


def decision(model: Model) -> dict[str, Any]:
    """Return how a model's scores become decisions."""
    return {
        "threshold": None if model.threshold is None else model.threshold.to_dict(),
        "category_thresholds": {name: one.to_dict() for name, one in sorted(model.category_thresholds.items())},
        "rule": None if model.decision_rule is None else model.decision_rule.to_dict(),
        "how": "by the rule where there is one: above fail.value 'fail', above review.value 'review', else 'pass'; "
        "else above the value of the threshold of the image's category, or of all, 'fail', else 'pass'",
    }


def versions() -> dict[str, str]:
    """Return the versions of what makes the file."""
    return {name: version(name) for name in ("unianom", "torch", "onnx", "onnxscript", "onnxruntime")}


def readme(description: Mapping[str, Any]) -> str:
    """Return the README of an exported model."""
    gate, onnx = description["gate"], description["onnx"]
    shown = {name: value["shape"] for name, value in description["inputs"].items()}
    inputs = "; ".join(f"`{name}` {description['inputs'][name]['type']} {shape}" for name, shape in shown.items())
    outputs = "\n".join(f"- `{name}`: {text}" for name, text in description["outputs"].items())
    return f"""# {description["model"]["method"]}, exported

`{onnx["file"]}` is the model from prepared images to scores and maps: ONNX, opset {onnx["opset"]}, {onnx["precision"]}.
`export.json` specifies the rest: how images are prepared, how scores become decisions. `predict.py` does both:

    pip install numpy onnxruntime pillow
    python predict.py part.png other.jpg

Inputs: {inputs}. Any number of images, prepared as `prepare` of `predict.py` does it. Outputs:

{outputs}

Compared with the model on {gate["normal_images"]} {gate["normal_images_are"]} normal and {gate["anomalous_images"]}
{gate["anomalous_images_are"]} anomalous images: scores differ by {gate["score_error"]:.1e} at most, maps by
{gate["map_error"]:.1e}, relatively; allowed were {gate["bounds"]["score"]:g} and {gate["bounds"]["map"]:g}.
"""
