"""Which anomaly maps a score set holds; apart from `shards`, since options need no Arrow."""

from typing import Literal

MapsKept = Literal["none", "flagged", "all"]
"""Of no image, of those whose decision is review or fail, or of all."""
