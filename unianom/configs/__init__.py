"""The options of every method, as frozen dataclasses. Nothing here imports PyTorch, so that command lines are read, and
their mistakes told, before anything heavy is loaded."""

import dataclasses
from typing import Any

from unianom.configs.onenip import OneNIPConfig
from unianom.configs.patchcore import PatchCoreConfig
from unianom.configs.recontrast import ReContrastConfig
from unianom.configs.revdist import RevDistConfig
from unianom.configs.uniad import UniADConfig
from unianom.configs.unias import UniASConfig
from unianom.configs.uniformaly import UniFormalyConfig
from unianom.configs.uninet import UniNetConfig

CONFIGS: dict[str, type] = {
    "onenip": OneNIPConfig,
    "patchcore": PatchCoreConfig,
    "recontrast": ReContrastConfig,
    "revdist": RevDistConfig,
    "uniad": UniADConfig,
    "unias": UniASConfig,
    "uniformaly": UniFormalyConfig,
    "uninet": UniNetConfig,
}
"""The options of every method by its name; `register_method` adds those of others."""


def method_of(config: Any) -> str:
    """Return the name of the method that a config is of."""
    return next(name for name, cls in CONFIGS.items() if cls is type(config))


def has_bank(name: str) -> bool:
    """Return whether a method is fitted by building a memory bank, and not by training."""
    return any(field.name == "bank" for field in dataclasses.fields(CONFIGS[name]))
