"""The methods, each in a file of its own; importing this package registers them all."""

import importlib
import pkgutil

from unianom.methods.base import METHODS, Method, Prediction, RawOutputs
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures


def import_methods() -> None:
    """Import every module of this package; methods register themselves as they are imported."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


import_methods()

__all__ = [
    "METHODS",
    "MaskedPatches",
    "MemoryMethod",
    "Method",
    "PatchFeatures",
    "Prediction",
    "RawOutputs",
    "import_methods",
]
