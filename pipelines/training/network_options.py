"""What training a network takes besides the method's own options."""

from __future__ import annotations

ALL_PREPARED_BYTES = 32 << 30
"""Up to this size prepared images are kept, and frozen features; beyond it they are made anew in every epoch."""
