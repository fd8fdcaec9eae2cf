"""Where timm's pretrained weights lie on the hub and in its cache, and whether the hub answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

CONNECT_SECONDS = 5.0
"""How long the hub may take to answer before it counts as out of reach."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files that timm takes from a repository that names none, in its order."""


@dataclass(frozen=True)
class HubWeights:
    """Where the pretrained weights of a timm model come from.

    Attributes:
        repository: on the hub; "" where timm takes a plain address.
        files: of which timm takes the first that the repository has.
        address: of the repository, or of the file.
        path: the file in the cache of this machine; None if it is not there.
        licence: as timm names it; "" where it does not.
    """

    repository: str
    files: tuple[str, ...]
    address: str
    path: Path | None
    licence: str


def find_hub_weights(name: str) -> HubWeights | None:
    """Return where timm's weights of a model come from, asking nobody; None if timm knows no weights of it."""
    settings: Any = timm.get_pretrained_cfg(name)
    if settings is None or not (settings.hf_hub_id or settings.url):
        return None
    if not settings.hf_hub_id:
        from timm.models._hub import get_cache_dir

        path = Path(get_cache_dir()) / settings.url.rsplit("/", 1)[-1]
        return HubWeights("", (path.name,), settings.url, path if path.is_file() else None, settings.license or "")
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = settings.hf_hub_id.partition("@")
    names = (settings.hf_hub_filename,) if settings.hf_hub_filename else HUB_FILES
    found = (try_to_load_from_cache(repository, file, revision=revision or None) for file in names)
    path = next((Path(file) for file in found if isinstance(file, str)), None)
    return HubWeights(repository, names, f"{constants.ENDPOINT}/{repository}", path, settings.license or "")


def cached_weights(name: str) -> Path | None:
    """Return the cached file of a model's weights, where timm can take it by its path, with no word to the hub."""
    weights = find_hub_weights(name)
    if weights is None or weights.path is None or weights.path.suffix != ".safetensors":
        return None
    settings: Any = timm.get_pretrained_cfg(name)
    return None if settings.custom_load else weights.path


def check_hub(name: str) -> None:
    """Ask the hub once, briefly, for a model's weights that are not in the cache.

    Its own client asks again and again for the better part of a minute before it gives up, and prints a line each time.

    Raises:
        Exception: the hub is out of reach; of whatever type its client or the network raises.
    """
    weights = find_hub_weights(name)
    if weights is None or not weights.repository or weights.path is not None:
        return
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import get_session

    # any answer will do, if only that there is no such file: the client knows what to do with it
    get_session().head(hf_hub_url(weights.repository, weights.files[0]), timeout=CONNECT_SECONDS)
