"""What a server logs: one JSON object a line, in the log of its Ray Serve replica."""

from __future__ import annotations

import json
import logging
from typing import Any

_logger = logging.getLogger("ray.serve.unianom")  # a child of Ray Serve's, so that it comes where replicas log


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log what happened.

    Args:
        event: what, in one word or two.
        level: as of `logging`.
        fields: about it; plain values, no image content, no credentials.
    """
    _logger.log(level, "%s", json.dumps({"event": event, **fields}, default=str))
