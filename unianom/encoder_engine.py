"""Frozen encoders computed by OpenVINO instead of PyTorch, on CPUs.

    backbone ─▶ traced, converted, compiled ─▶ compared with PyTorch on images ─▶ computes what its `forward` returns

PyTorch keeps the weights; whatever is trained stays with it. Results depend neither on what shares a batch nor on the
number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unianom.backbones import Backbone
from unianom.data.drawing.corpus import draw_sample
from unianom.data.image import InputPolicy, prepare_image
from unianom.data.tensors import normalise
from unianom.errors import EngineError
from unianom.execution import Engine
from unianom.methods.base import Method

LARGEST_DIFFERENCE: dict[Engine, float] = {"openvino": 1e-5, "openvino_bf16": 0.1}
"""By how much the features of a tap may differ from PyTorch's, relative to the largest of the tap."""

DRAWN = ("weave", "cap")
"""Categories of the pictures on which an encoder is compared where no other images are given."""

_tracing = threading.Lock()
"""PyTorch traces one network at a time."""

_starting = threading.Lock()
_cores: list[Any] = []

_latest = threading.local()
"""The encoder compiled last by this thread, with its key: models of many categories have the same one."""


class CompiledEncoder:
    """A frozen backbone compiled by OpenVINO for the CPU of this machine, for batches of any size.

    Args:
        backbone: frozen, on the CPU.
        side: of its input, in pixels.
        engine: which precision it computes in.
        threads: of one pass.

    Raises:
        EngineError: OpenVINO is not installed, cannot run this network, or this CPU does not compute in bfloat16.
    """

    def __init__(self, backbone: Backbone, side: int, engine: Engine, threads: int) -> None:
        openvino = _import_openvino()
        model = _convert(openvino, backbone, side)
        precision = "bf16" if engine == "openvino_bf16" else "f32"
        properties = {
            "INFERENCE_PRECISION_HINT": precision,  # on some CPUs it would take bfloat16 by itself
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several workers would share the first cores
        }
        compiled = _core(openvino).compile_model(model, "CPU", properties)
        if (found := compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != precision:
            raise EngineError(f"engine={engine}: this CPU computes in {found}, not in {precision}; take openvino")
        self._request = compiled.create_infer_request()
        self._outputs = len(compiled.outputs)
        self._busy = threading.Lock()

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Compute what `Backbone.tensors` returns of B×3×S×S images."""
        with self._busy:
            found = self._request.infer([images.contiguous().numpy()], share_inputs=True, share_outputs=True)
            # copies, as the next pass writes to the same memory
            return [torch.from_numpy(np.array(found[number])) for number in range(self._outputs)]


def openvino_is_installed() -> bool:
    """Return whether OpenVINO can be imported; it is not."""
    return find_spec("openvino") is not None


def compile_encoders(method: Method[Any], engine: Engine, images: Tensor | None = None) -> None:
    """Let an engine compute the frozen encoders of a method on the CPU, with as many threads as PyTorch takes.

    Args:
        method: its parts that are trained stay with PyTorch.
        engine: "pytorch" takes back what another one computed.
        images: B×3×S×S normalised, on which the engine is compared with PyTorch; None draws some.

    Raises:
        EngineError: the engine is not installed, there is no frozen encoder in float32, or its features differ from
            PyTorch's by more than `LARGEST_DIFFERENCE`.
    """
    backbones = [part for part in method.modules() if isinstance(part, Backbone) and not part.trainable]
    for backbone in backbones:
        backbone.compiled = None
    if engine == "pytorch":
        return
    if not backbones:
        raise EngineError(f"engine={engine}: {method.name} has no frozen encoder; take pytorch")
    for backbone in backbones:
        if backbone.config.precision != "fp32":
            raise EngineError(
                f"engine={engine}: backbone.precision={backbone.config.precision} is computed by PyTorch; set fp32, or "
                f"take pytorch"
            )
    for backbone in backbones:
        key = _key(backbone, method.input.side, engine)
        compiled: CompiledEncoder | None = getattr(_latest, "encoders", {}).get(key)
        known = compiled is not None
        if compiled is None:
            compiled = CompiledEncoder(backbone, method.input.side, engine, torch.get_num_threads())
        if not known or images is not None:
            _check(backbone, compiled, drawn_images(method.input) if images is None else images, engine)
        _latest.encoders = {key: compiled}
        backbone.compiled = compiled


def drawn_images(policy: InputPolicy) -> Tensor:
    """Return two drawn pictures as 2×3×S×S normalised images."""
    drawn = [draw_sample(category, 0)[0] for category in DRAWN]
    return normalise([prepare_image(picture, policy) for picture in drawn], policy)


def largest_difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> tuple[float, int]:
    """Return the largest difference of a feature, relative to the largest feature of its tap, and the tap's number.

    NaN counts as infinite.
    """
    apart = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, wanted, strict=True)]
    finite = [difference if difference == difference else float("inf") for difference in apart]
    return max(finite), finite.index(max(finite))


@torch.inference_mode()
def _check(backbone: Backbone, compiled: CompiledEncoder, images: Tensor, engine: Engine) -> None:
    difference, tap = largest_difference(compiled(images), backbone.tensors(images))
    most = LARGEST_DIFFERENCE[engine]
    if difference > most:
        raise EngineError(
            f"engine={engine}: on {len(images)} images features of {backbone.config.name} (tap {tap}) differ from "
            f"PyTorch's by {difference:.1e} of the largest, more than {most:.0e}; take pytorch"
        )


def _key(backbone: Backbone, side: int, engine: Engine) -> tuple[Any, ...]:
    """Return what the compiled encoder depends on."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value.numpy()).tobytes())
    return repr(backbone.config), backbone.taps_key, side, engine, torch.get_num_threads(), digest.hexdigest()


class _Tensors(nn.Module):
    """A backbone whose `forward` is `tensors`, as a tracer takes it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone.tensors(images))


def _convert(openvino: Any, backbone: Backbone, side: int) -> Any:
    """Return an OpenVINO model that takes B×3×side×side images, for any B."""
    with _tracing, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer; what it gets wrong shows in the comparison
        try:
            # a copy, as what is converted shares its memory with the weights, which batch norm may be folded into later
            tensors = _Tensors(copy.deepcopy(backbone)).eval()
            traced = torch.jit.trace(tensors, torch.zeros(2, 3, side, side), check_trace=False)
            model = openvino.convert_model(torch.jit.freeze(traced), input=[[-1, 3, side, side]])
        except Exception as error:  # of the tracer or the converter, each in its own way
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EngineError(f"OpenVINO cannot convert {backbone.config.name}: {reason}; take pytorch") from error
    return model


def _core(openvino: Any) -> Any:
    """Return the one core of this process, which is never freed.

    Where a CPU has AMX, each core sets a stack for signals, and gives the one before back when it is freed: with two of
    them that may be freed memory, and the next signal, such as Ctrl-C, ends the process.
    """
    with _starting:
        if not _cores:
            _cores.append(openvino.Core())
        return _cores[0]


def _import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would tell its maker of every conversion.

    Raises:
        EngineError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # then it falls back to a stub
    try:
        import openvino
    except ImportError as error:
        raise EngineError(
            "engine=openvino: OpenVINO is not installed; run in unianom's checkout: pip install '.[cpu]', "
            "or take pytorch"
        ) from error
    return openvino
