"""How a model is run: on which device, by what its encoder is computed, and how its memory bank is searched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from unianom.errors import OptionError

Engine = Literal["pytorch", "openvino", "openvino_bf16"]
"""What computes a frozen encoder: PyTorch, or OpenVINO on CPUs, in float32 or in bfloat16."""

Search = Literal["auto", "exact", "device"]
"""How a memory bank is searched: "exact" by FAISS on the CPU, with the same bits whatever the batch or worker; "device"
where the network runs, within the bounds of `unianom.memory.device_search`; "auto" on a device other than the CPU like
"device" (but a bank with inverted lists like "exact"), else like "exact"."""


def precision_of(engine: Engine) -> str:
    """Return the precision that an engine computes a float32 encoder in."""
    return "bfloat16" if engine == "openvino_bf16" else "float32"


@dataclass(frozen=True)
class Execution:
    """How a model is run; what it predicts is the same but for rounding.

    Attributes:
        device: where its network runs, as PyTorch names it.
        engine: what computes its encoder, if that is frozen; see `Engine`.
        search: how a memory bank is searched; see `Search`.

    Raises:
        OptionError: an engine or a search of another name, or an engine that does not run on this device.
    """

    device: str = "cpu"
    engine: Engine = "pytorch"
    search: Search = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (("engine", self.engine, Engine), ("search", self.search, Search)):
            if value not in get_args(known):
                raise OptionError(f"{name}={value}: take one of {', '.join(get_args(known))}")
        if self.engine != "pytorch" and self.device != "cpu":
            raise OptionError(
                f"engine={self.engine} runs on CPUs; take device=cpu instead of {self.device}, or pytorch"
            )

    @property
    def plan(self) -> dict[str, Any]:
        """Return device and engine, as plans record what the bytes of an output depend on; PyTorch is not named, so
        that outputs of before there were engines keep their plan."""
        return {"device": self.device} | ({} if self.engine == "pytorch" else {"engine": self.engine})

    @property
    def searches_on_device(self) -> bool:
        """Whether a memory bank without inverted lists is searched where the network runs."""
        return self.search == "device" or (self.search == "auto" and self.device != "cpu")


CPU = Execution()
"""PyTorch on the CPU."""
