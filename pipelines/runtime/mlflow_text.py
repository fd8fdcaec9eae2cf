"""Names, values and paths as MLflow takes them, and without credentials."""

from __future__ import annotations

import json
import re
from typing import Any

from unianom import files

MAX_PARAM, MAX_TAG = 6000, 5000
"""Characters of a parameter's and of a tag's value at most."""

_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:sig|token|key|secret|password|credential)[^=&\s]*=)[^&\s\"',;]+", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """Return text with user names, passwords and secret query values taken out of its URIs."""
    return _SECRET.sub(r"\1***", _USERINFO.sub("***@", text))


def mask_all(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: mask_all(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [mask_all(value) for value in plain]
    return mask_credentials(plain) if isinstance(plain, str) else plain


def to_text(value: Any) -> str:
    """Return a value as it is written in YAML and on the command line, without credentials."""
    return mask_credentials(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 20]}… ({len(text)} long)"


def legal_name(name: str) -> str:
    """Return the name of a metric, parameter or tag as MLflow allows it, of one length at most.

    Parts between "/" that are harmless stay; others are cleaned and told apart by a digest, so no two names become one.
    """
    parts = [
        part if _HARMLESS.fullmatch(part) and part.strip(".") else files.safe_name(part) for part in name.split("/")
    ]
    legal = "/".join(parts)
    if len(legal) > _MAX_NAME:
        return f"{legal[: _MAX_NAME - 9]}-{files.sha256_of(name.encode())[:8]}"
    return legal


_HARMLESS = re.compile(r"[\w.\- ]+")
_MAX_NAME = 250


def legal_path(name: str) -> str:
    """Return the path of an artifact inside its run; parts that would lead elsewhere or that no disk takes are
    cleaned."""
    parts = name.split("/")
    return "/".join(
        part if part.strip(".") and len(part.encode()) <= 250 and not set(part) & set("\\\0") else files.safe_name(part)
        for part in parts
    )
