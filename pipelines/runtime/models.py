"""Models loaded where a job runs."""

from __future__ import annotations

from unianom.model import Model, load


def load_model(folder: str, device: str) -> Model:
    """Load a model from a path or URI.

    Raises:
        ModelError, OptionError: as `unianom.load`.
    """
    return load(folder, device)
