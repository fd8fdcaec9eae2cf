"""How files hold weights, and their names as timm has them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from unianom import files
from unianom.errors import WeightsError
from unianom.weights import WEIGHTS_WAYS


def read_state(uri: str) -> dict[str, Tensor]:
    """Read a state dict from safetensors or a torch file (weights only, no code is run).

    Wrappers that training scripts add ("state_dict", "model", "teacher"; prefixes "module.", "backbone.") are
    taken off.

    Raises:
        WeightsError: the file is missing or holds no state dict.
    """
    try:
        content = files.read_bytes(uri)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise WeightsError(f"no weights file at {uri}; {WEIGHTS_WAYS}") from error
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        state: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in the parser, each in its own way
        raise WeightsError(f"cannot read weights from {uri}: {error}") from error
    for wrapper in ("state_dict", "teacher", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{uri} holds no state dict of tensors")
    stripped = {}
    for key, value in state.items():
        for prefix in ("module.", "backbone."):
            key = key.removeprefix(prefix)
        stripped[key] = value
    return stripped


# ----------------------------------------------------------------------------------------------- EfficientNet-PyTorch
LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of the stages of EfficientNet-B0, and of Lite0."""

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Inside blocks that do not expand channels."""

_LATER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def efficientnet_name(name: str) -> str:
    """Return timm's name of a tensor of EfficientNet-Lite0 that PyTorch ports of EfficientNet call `name`.

    The ports count blocks through, timm counts them within stages; what a block lacks, timm does not count either.

    Raises:
        KeyError: they have no such tensor.
    """
    module, _, rest = name.partition(".")
    if module != "_blocks":
        return f"{_OUTER[module]}.{rest}"
    number, part, kind = rest.split(".")
    block, stage = int(number), 0
    while block >= LITE0_DEPTHS[stage]:
        block -= LITE0_DEPTHS[stage]
        stage += 1
    return f"blocks.{stage}.{block}.{(_LATER_STAGES if stage else _FIRST_STAGE)[part]}.{kind}"


def read_efficientnet_pytorch(content: bytes) -> dict[str, Tensor]:
    """Read EfficientNet-Lite0 as PyTorch ports of EfficientNet save it."""
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {efficientnet_name(name): value for name, value in state.items()}


# --------------------------------------------------------------------------------------------------- DINOv2, as ONNX
_DINOV2_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}

_DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


def _dinov2_name(name: str) -> str:
    """Return timm's name of a tensor of transformers' DINOv2, without queries, keys and values, which timm joins."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        stem, kind = name, ""
    layer = _LAYER.fullmatch(stem)
    timm = f"blocks.{layer[1]}.{_DINOV2_BLOCK[layer[2]]}" if layer else _DINOV2_NAMES[stem]
    return f"{timm}.{kind}" if kind else timm


def read_dinov2_onnx(content: bytes) -> dict[str, Tensor]:
    """Read the encoder of an ONNX graph that was traced from transformers' DINOv2, its attribute `backbone`.

    Parameters that the tracer kept have their names. Weights of linear layers became anonymous constants, transposed,
    that MatMul nodes with the layers' names multiply by; position embeddings two constants, of CLS and of the patches,
    that the graph stacks after it resamples the latter. What is no part of the encoder is left out.

    Raises:
        ModuleNotFoundError: the package onnx is not installed.
        KeyError: another graph.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    constants = {one.name: one for one in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    linear = {
        node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".") + ".weight": node.input[1]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    named = {name.removeprefix("backbone."): tensor(name) for name in constants if name.startswith("backbone.")}
    named |= {name: tensor(constant).T.contiguous() for name, constant in linear.items()}

    state: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in named.items():
        part = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", name)
        if part:
            joined.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = value
        else:
            state[_dinov2_name(name)] = value
    for name, parts in joined.items():
        state[name] = torch.cat([parts["query"], parts["key"], parts["value"]])

    nodes = {node.name: node for node in graph.node}
    cls = tensor(nodes["/backbone/embeddings/Concat_6"].input[0])  # 1 1 D
    patches = tensor(nodes["/backbone/embeddings/Reshape_1"].input[0])  # 1 N D
    state["pos_embed"] = torch.cat([cls, patches], dim=1)
    return state


READERS: dict[str, Callable[[bytes], dict[str, Tensor]]] = {
    "efficientnet_pytorch": read_efficientnet_pytorch,
    "dinov2_onnx": read_dinov2_onnx,
}
"""How the packages of `unianom.weights` hold their weights: a file's content to a state dict of timm's names."""
