"""The promise of a decision threshold in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def promise_in_words(threshold: Mapping[str, Any]) -> str:
    """Say what a threshold promises of normal images, and from what; the end of a sentence.

    Args:
        threshold: content of `Threshold.to_dict`, also of an older version.
    """
    n = threshold["n_normals"]
    images = "1 normal image" if n == 1 else f"{n:,} normal images"
    if threshold.get("source", "held_out") == "leave_one_out":
        source = f"{images}, each scored without its own vectors"
    else:
        source = "1 held-out normal image" if n == 1 else f"{n:,} held-out normal images"
    if not threshold.get("promised", True):
        return f"no promise, from too few scores: about 1 in {n + 1} normal images is expected to fail, from {source}"
    return (
        f"at most {100 * threshold['target_fpr']:.3g} % of normal images fail, at {100 * threshold['confidence']:g} % "
        f"confidence, from {source}"
    )
