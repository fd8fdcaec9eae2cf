"""The methods, each in a file of its own; importing this package registers them all."""

from unianom.methods import onenip, patchcore, recontrast, revdist, uniad, unias, uniformaly, uninet
from unianom.methods.base import METHODS, Embedding, Encoded, Found, Inspection, Maps, MemoryMethod, Method, Prediction

__all__ = [
    "METHODS",
    "Embedding",
    "Encoded",
    "Found",
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
