"""A model as one network, from prepared images to scores and maps, and its ONNX file.

    uint8 images ─▶ normalise ─▶ the method's network ─▶ search of the memory bank ─▶ map, score ─▶ calibrator

PyTorch traces it and writes it as ONNX. Of each operator the trace says to which part of the model it belongs, by which
those of the networks are told, that may be computed in less than float32.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unianom.backbones import Backbone
from unianom.configs.backbone import BackboneConfig
from unianom.data.tensors import Normaliser
from unianom.errors import ModelError, OptionError
from unianom.memory.graph_search import GraphBank
from unianom.methods import MemoryMethod, Method
from unianom.model import Model

if TYPE_CHECKING:
    import onnx

IMAGES, CATEGORY = "images", "category"
SCORE, MAP, CALIBRATED_SCORE, CALIBRATED_MAP = "score", "anomaly_map", "calibrated_score", "calibrated_map"

MOST_IMAGES = 4096
"""Images of a batch."""

GIGABYTES_IN_ONE_FILE = 1.5
"""Weights beyond which they lie in a file of their own: ONNX's format ends at 2 GB."""


class ModelGraph(nn.Module):
    """A model as one network.

    Args:
        model: what is exported; it is changed so that it can be traced, and can then be used in no other way. It must
            have predicted before, so that what it computes only once is there.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.method, self.calibrator = model.method.eval(), model.calibrator
        self.normalise = Normaliser(self.method.input, torch.device("cpu"))
        for part in self.method.modules():
            if isinstance(part, Backbone):
                plain: BackboneConfig = replace(part.config, precision="fp32", compile=False, channels_last=False)
                part.config, part.compiled = plain, None
                part._compiled_call_impl = None  # of `nn.Module.compile`, which knows no way back
        if isinstance(self.method, MemoryMethod):
            self.method.graph_bank = GraphBank(self.method.require_bank().vectors())

    @property
    def takes_category(self) -> bool:
        """Whether it needs the number of each image's category among those of the calibrator."""
        return self.calibrator is not None and self.calibrator.config.variant == "labels"

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs: B×S×S×3 uint8 images and, where it takes them, B int64 categories."""
        return [IMAGES, CATEGORY] if self.takes_category else [IMAGES]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: scores B and maps B×S×S and, where there is a calibrator, both calibrated."""
        return [SCORE, MAP] if self.calibrator is None else [SCORE, MAP, CALIBRATED_SCORE, CALIBRATED_MAP]

    def forward(self, images: Tensor, category: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute `outputs` of `inputs`."""
        prediction = self.method.postprocess(self.method.forward(self.normalise(images)))
        if self.calibrator is None:
            return prediction.score, prediction.anomaly_map
        if category is None:
            statistics = self.calibrator.statistics_of(prediction.embedding.float())
        else:
            statistics = self.calibrator.class_statistics[category]
        calibration = self.calibrator.calibrate_by(statistics, prediction.anomaly_map)
        calibrated = calibration.maps(prediction.anomaly_map)
        return prediction.score, prediction.anomaly_map, calibration.score, calibrated


def check_bank(method: Method[Any], max_bank_mb: int) -> None:
    """Refuse a memory bank that does not fit a file: one with inverted lists, or of more than so many megabytes.

    Raises:
        OptionError: it does not fit.
    """
    if not isinstance(method, MemoryMethod):
        return
    bank = method.require_bank()
    if bank.kind != "flat":
        raise OptionError(
            f"the memory bank is of kind '{bank.kind}', whose lists an ONNX file cannot hold; fit the model with "
            f"bank.index=flat"
        )
    size = bank.rows * bank.dimension * 4 / 1e6
    if size > max_bank_mb:
        raise OptionError(
            f"the memory bank of {bank.rows} vectors of {bank.dimension} values takes {size:.0f} MB in the file, which "
            f"compares every patch with all of them; fit the model with a lower bank.coreset_ratio, or allow it by "
            f"--max_bank_mb {size + 1:.0f}"
        )


@dataclass(frozen=True)
class OnnxGraph:
    """An ONNX file and what is known of it.

    Attributes:
        path: of the file; weights of large ones lie beside it.
        network: names of the operators that belong to the networks, not to normalisation, search, maps or scores.
        external: whether weights lie in a file of their own.
    """

    path: Path
    network: frozenset[str]
    external: bool

    @property
    def files(self) -> list[Path]:
        """The file, and that of its weights."""
        return [self.path, *([self.path.with_name(f"{self.path.name}.data")] if self.external else [])]


def trace(graph: ModelGraph) -> torch.export.ExportedProgram:
    """Trace a model for batches of any size.

    Raises:
        ModelError: PyTorch cannot trace it.
    """
    side = graph.method.input.side
    # two images and not one, of which PyTorch would make a constant
    example: tuple[Tensor, ...] = (torch.zeros(2, side, side, 3, dtype=torch.uint8),)
    if graph.takes_category:
        example += (torch.zeros(2, dtype=torch.int64),)
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(graph.eval(), example, dynamic_shapes=tuple({0: batch} for _ in example))
    except Exception as error:  # the tracer has many
        raise ModelError(f"PyTorch cannot trace {graph.method.name}: {_first_line(error)}") from error


def write_onnx(graph: ModelGraph, path: Path, opset: int) -> OnnxGraph:
    """Trace a model and write it as ONNX, for batches of any size; nothing in the file tells of this machine.

    Raises:
        ModelError: PyTorch cannot trace it, or cannot write it as ONNX.
    """
    traced = trace(graph)
    names: dict[str, Any] = {"input_names": graph.inputs, "output_names": graph.outputs}
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False, **names)
    except Exception as error:  # of the converter
        raise ModelError(f"PyTorch cannot write {graph.method.name} as ONNX: {_first_line(error)}") from error
    made: onnx.ModelProto = program.model_proto
    network = frozenset(node.name for node in made.graph.node if _is_of_network(node))
    _strip(made)
    return save_onnx(made, path, network)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def save_onnx(model: onnx.ModelProto, path: Path, network: frozenset[str]) -> OnnxGraph:
    """Write a model, weights in a file of their own where they are too large for one."""
    import onnx

    external = sum(len(weight.raw_data) for weight in model.graph.initializer) > GIGABYTES_IN_ONE_FILE * 1e9
    onnx.save_model(model, str(path), save_as_external_data=external, location=f"{path.name}.data")
    return OnnxGraph(path, network, external)


def _is_of_network(node: onnx.NodeProto) -> bool:
    """Return whether an operator belongs to a part of the method that is neither the method itself nor its bank."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    return "'method." in scopes and "'method.graph_bank'" not in scopes


def _strip(model: onnx.ModelProto) -> None:
    """Take out what the tracer notes of each operator: lines and paths of the source."""
    model.producer_name, model.producer_version, model.doc_string = "unianom", "", ""
    for holder in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the tracer says of itself from the user; what it gets wrong shows in the comparison."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
