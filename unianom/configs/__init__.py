"""The options of every method, as frozen dataclasses. Nothing here imports PyTorch, so that command lines are read, and
their mistakes told, before anything heavy is loaded."""

import dataclasses
import importlib
import pkgutil
import sys
from importlib.util import find_spec

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
"""The options of the methods that are part of the package, by their names; `register_method` adds those of others."""

SHARED_MODULES = ("base", "layers", "memory", "trained")
"""Modules of `unianom.methods` that hold no method."""


def all_configs() -> dict[str, type]:
    """Return the options of every method by its name.

    A method whose options lie in its own file in `unianom/methods` is imported, and PyTorch with it; where there is no
    such method, that folder is listed and nothing imported.
    """
    package = sys.modules.get("unianom.methods")
    spec = find_spec("unianom.methods") if package is None else None
    folders = list(package.__path__) if package is not None else spec and spec.submodule_search_locations
    for module in pkgutil.iter_modules(folders or []):
        if module.name not in CONFIGS and module.name not in SHARED_MODULES:
            importlib.import_module(f"unianom.methods.{module.name}")
    return dict(CONFIGS)


def method_of(config: object) -> str:
    """Return the name of the method that a config is of."""
    return next(name for name, cls in CONFIGS.items() if cls is type(config))


def has_bank(name: str) -> bool:
    """Return whether a method is fitted by building a memory bank, and not by training."""
    return any(field.name == "bank" for field in dataclasses.fields(CONFIGS[name]))
