"""The methods, each in a file of its own; importing this package registers them all."""

import importlib
import os
import pkgutil

from unianom.methods.base import METHODS, Method, Prediction, RawOutputs
from unianom.methods.memory import MaskedPatches, MemoryMethod, PatchFeatures

OWN_METHODS = "UNIANOM_METHODS"
"""Environment variable: functions that register methods of one's own, as `module:function`, separated by commas.

Models of these methods can then be loaded."""


def import_methods() -> None:
    """Import every module of this package, whose methods register themselves; call the functions of `OWN_METHODS`."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    for name in filter(None, os.environ.get(OWN_METHODS, "").split(",")):
        pkgutil.resolve_name(name)()


import_methods()

__all__ = [
    "METHODS",
    "OWN_METHODS",
    "MaskedPatches",
    "MemoryMethod",
    "Method",
    "PatchFeatures",
    "Prediction",
    "RawOutputs",
    "import_methods",
]
