"""ONNX files whose networks compute in less than float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.serving.export_graph import OnnxGraph, save_onnx
from unianom.errors import OptionError

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Operators that are worth computing in 8 bits."""


def half_precision(graph: OnnxGraph, path: Path) -> OnnxGraph:
    """Write a graph whose networks compute in float16, its weights, too; all else stays in float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(str(graph.path))
    others = [node.name for node in model.graph.node if node.name not in graph.network]
    with _quiet():
        converted = convert_float_to_float16(model, keep_io_types=True, node_block_list=others)
    return save_onnx(converted, path, graph.network)


def eight_bits(graph: OnnxGraph, path: Path, batches: Sequence[dict[str, np.ndarray]]) -> OnnxGraph:
    """Write a graph in whose networks products with weights are computed in 8 bits, channel by channel of the weights.

    Args:
        graph: in float32.
        path: of the file to write.
        batches: inputs of the graph, by which ranges of values are chosen.

    Raises:
        OptionError: there is no such product.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        """Gives one batch after the other."""

        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    model = onnx.load(str(graph.path))
    weights = {weight.name for weight in model.graph.initializer}
    chosen = [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and node.name in graph.network and weights.intersection(node.input[1:2])
    ]
    if not chosen:
        raise OptionError("--precision int8: the network has no product with weights; take fp32")
    with _quiet():
        quantize_static(
            str(graph.path),
            str(path),
            Batches(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=chosen,
            use_external_data_format=graph.external,
        )
    return save_onnx(onnx.load(str(path)), path, graph.network)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the advice of the converters from the user."""
    root: Any = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
