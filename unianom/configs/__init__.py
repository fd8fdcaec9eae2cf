"""The options of every method, as frozen dataclasses. Nothing here imports PyTorch, so that command lines are read, and
their mistakes told, before anything heavy is loaded."""

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
