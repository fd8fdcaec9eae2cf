"""Which encoder a method takes, and where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from unianom.errors import OptionError
from unianom.options import ADDED_LATER, AtLeastZero, Options


@dataclass(frozen=True)
class BackboneConfig(Options):
    """Which encoder, and its weights.

    Args:
        name: timm model, with its weights tag where it matters (e.g. "wide_resnet50_2.tv_in1k").
        weights: "pretrained" (timm downloads them), "package" (of an installed Python package, see
            `unianom.weights`), a file or URI, or "random". Nothing is substituted for missing weights.
        options: further arguments of `timm.create_model` (e.g. {"pad_type": "same"}).
        random_seed: seed of "random" weights.
        precision: "fp32", or autocast to "bf16" or "fp16" in the forward pass.
        channels_last: memory format of images and convolutions; faster for convolutions on GPUs.
        compile: run the encoder through torch.compile.
        padding_side: side in pixels of the input for which "same" padding (timm's tf_ models) is computed once, layer
            by layer, and kept for any other input, as PyTorch ports of EfficientNet do; 0 computes it for the input at
            hand, as TensorFlow does; null is 0, unless the method's preset says otherwise.
    """

    usual = ("name", "weights")

    name: str
    weights: str = "pretrained"
    options: dict[str, Any] = field(default_factory=dict)
    random_seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    padding_side: AtLeastZero | None = field(default=None, metadata=ADDED_LATER)


RELEASED_PADDING_SIDE = 380
"""Side of the input that EfficientNet-B4 was published for. The released code of UniAD, UniAS and OneNIP computes
"same" padding for it, whatever the input."""


def resolve_padding(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a method's config with the padding of the released code in its backbone, where the preset is
    "reference", the backbone the EfficientNet-B4 of that code, and nothing else is said.

    Args:
        cls: config class with the options `preset` and `backbone`.
        given: values it is to be made of.
    """
    fields = cls.__dataclass_fields__
    config = given["backbone"] if "backbone" in given else fields["backbone"].default_factory()
    if given.get("preset", fields["preset"].default) != "reference" or config.padding_side is not None:
        return given
    if not _is_released(config.name):
        return given
    return {**given, "backbone": replace(config, padding_side=RELEASED_PADDING_SIDE)}


def with_padding_of_old(config: dict[str, Any]) -> dict[str, Any]:
    """Return a method's plain config with the `padding_side` it meant if it was saved before that option existed."""
    backbone = config.get("backbone")
    if (
        config.get("preset") == "reference"
        and isinstance(backbone, dict)
        and "padding_side" not in backbone
        and _is_released(str(backbone.get("name")))
    ):
        return {**config, "backbone": {**backbone, "padding_side": 0}}
    return config


def _is_released(name: str) -> bool:
    return name.split(".")[0] == "tf_efficientnet_b4"


def check_taps(taps: Sequence[int]) -> None:
    """Refuse taps that cannot be those of any pyramid.

    Raises:
        OptionError: none, or not positive, distinct and ascending.
    """
    if not taps or list(taps) != sorted(set(taps)) or taps[0] < 1:
        raise OptionError(
            f"taps={tuple(taps)} must be reductions of feature maps (their strides), distinct and ascending, "
            f"such as (4, 8, 16)"
        )
