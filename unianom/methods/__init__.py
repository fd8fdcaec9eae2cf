"""The methods, each in a file of its own; importing this package registers them all."""

from unianom.methods import onenip, patchcore, recontrast, revdist, uniad, unias, uniformaly, uninet
from unianom.methods.base import (
    METHODS,
    Inspection,
    Maps,
    MaskedPatches,
    MemoryMethod,
    Method,
    PatchFeatures,
    Prediction,
    RawOutputs,
)

__all__ = [
    "METHODS",
    "MaskedPatches",
    "PatchFeatures",
    "RawOutputs",
    "Inspection",
    "Maps",
    "MemoryMethod",
    "Method",
    "Prediction",
    "onenip",
    "patchcore",
    "recontrast",
    "revdist",
    "uniad",
    "unias",
    "uniformaly",
    "uninet",
]
