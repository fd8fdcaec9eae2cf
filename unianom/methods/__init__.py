"""The methods, each in a file of its own; importing this package registers them all."""

import importlib
import pkgutil

from unianom.methods.base import METHODS, Method, Prediction, RawOutputs
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "MaskedPatches",
    "MemoryMethod",
    "Method",
    "PatchFeatures",
    "Prediction",
    "RawOutputs",
]
