"""A model → an ONNX file with all that is needed to use it without PyTorch and without unianom.

    model ─▶ its scores of some images ─▶ traced to ONNX ─▶ fp16 or int8 ─▶ run by ONNX Runtime on the same images
      ─▶ gate ─▶ model.onnx, export.json, predict.py, README.md

The file is made in a temporary folder; only one that agrees with the model is written.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime import outputs
from pipelines.runtime.model_set import ModelSet
from pipelines.runtime.models import load_model
from pipelines.serving import gate, predict
from pipelines.serving.description import describe, readme
from pipelines.serving.export_graph import SCORE, ModelGraph, OnnxGraph, check_bank, write_onnx
from pipelines.serving.gate_images import choose_calibration_images, choose_gate_images
from pipelines.serving.options import ExportOptions
from pipelines.serving.precision import eight_bits, half_precision
from unianom import __version__, files
from unianom.data.schema import NORMAL
from unianom.data.shards import ShardSet
from unianom.errors import OptionError
from unianom.execution import CPU
from unianom.model import Model
from unianom.options import to_plain

DESCRIPTION = "export.json"


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes:
        folder: where it lies.
        fresh: whether this run wrote it.
        agreement: how well it agrees with the model, in words.
        description: content of its `export.json`.
    """

    folder: str
    fresh: bool
    agreement: str
    description: dict[str, Any]


def export(options: ExportOptions) -> ExportResult:
    """Export a model, or find it exported.

    Raises:
        ModelError: no usable model, PyTorch cannot export it, or the file does not agree with it.
        OptionError: the memory bank does not fit; ONNX or ONNX Runtime are not installed; one model per category.
        DataError: no normal image of its categories, or the output holds something else.
    """
    _check_installed()
    shards, model_set = ShardSet.open(options.shards), ModelSet.open(options.model)
    if model_set.by_category:
        raise OptionError(
            f"{options.model} holds a model for each category; export them one by one, such as --model "
            f"{model_set.folders[0]}"
        )
    [description] = model_set.descriptions()
    plan = {
        "tool": __version__,
        "model": description["digest"],
        "shards": shards.digest,
        "precision": options.precision,
        "opset": options.opset,
        "batch_size": options.batch_size,
        "gate": to_plain(options.gate),
        "limits": to_plain(options.limits),
    }
    output = files.full_uri(options.output)
    inputs = {"model": options.model, "shards": options.shards}
    with outputs.open_output(output, "export", plan, inputs=inputs, overwrite=options.overwrite):
        path = files.join(output, DESCRIPTION)
        if files.exists(path):
            made = files.read_json(path)
            return ExportResult(output, False, made["gate"]["words"], made)
        with tempfile.TemporaryDirectory() as folder:
            return _export(output, model_set.uri, description, shards, options, Path(folder))


def _export(
    output: str, uri: str, description: dict[str, Any], shards: ShardSet, options: ExportOptions, folder: Path
) -> ExportResult:
    """Make, compare and write; the output is claimed."""
    model = load_model(uri, CPU)
    check_bank(model.method, options.max_bank_mb)
    images = choose_gate_images(shards, description, model.method.input, options.gate, options.limits)
    wanted = gate.model_outputs(model, images, options.batch_size)
    precision = model.method.config.backbone.precision
    graph = ModelGraph(model)
    made = _made(graph, model, description, shards, options, folder)
    categories = model.calibrator.categories if graph.takes_category and model.calibrator else None
    found = gate.graph_outputs(made.path, images, options.batch_size, categories)
    agreement = gate.compare(model, images, wanted, found)
    gate.check(agreement, options.gate.bounds(options.precision), options.precision, precision)
    scores = np.concatenate([batch[SCORE] for batch in wanted])[images.label == NORMAL]
    content = describe(model, graph, made, options, agreement, scores, shards.digest)
    content["gate"]["words"] = str(agreement)
    for file in made.files:
        files.write_bytes(files.join(output, file.name), file.read_bytes())
    files.write_bytes(files.join(output, "predict.py"), Path(predict.__file__).read_bytes())
    files.write_bytes(files.join(output, "README.md"), readme(content).encode())
    files.write_json(files.join(output, DESCRIPTION), content)
    return ExportResult(output, True, str(agreement), content)


def _made(
    graph: ModelGraph, model: Model, description: dict[str, Any], shards: ShardSet, options: ExportOptions, folder: Path
) -> OnnxGraph:
    """Write the ONNX file in the precision asked for, into its own folder below a temporary one."""
    (folder / "whole").mkdir()
    (folder / "made").mkdir()
    path = folder / "made" / "model.onnx"
    if options.precision == "fp32":
        return write_onnx(graph, path, options.opset)
    whole = write_onnx(graph, folder / "whole" / "model.onnx", options.opset)
    if options.precision == "fp16":
        return half_precision(whole, path)
    policy, size = model.method.input, options.batch_size
    pixels, names = choose_calibration_images(shards, description, policy, options.gate, options.limits)
    categories = model.calibrator.categories if graph.takes_category and model.calibrator else None
    batches = [
        gate.graph_inputs(pixels[start : start + size], names[start : start + size], categories)
        for start in range(0, len(pixels), size)
    ]
    return eight_bits(whole, path, batches)


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"exporting needs {', '.join(missing)}, which is not installed; run in unianom's checkout: "
            f"pip install '.[export]'"
        )
