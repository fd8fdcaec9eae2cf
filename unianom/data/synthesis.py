"""Synthetic anomalies for training: CutPaste (patch and scar) and DRAEM, as OneNIP mixes them."""

from __future__ import annotations

from dataclasses import dataclass

from unianom.errors import OptionError


@dataclass(frozen=True)
class SynthesisConfig:
    """How pseudo-anomalous copies of normal images are made.

    Args:
        cutpaste_share: share of copies from the CutPaste family; the rest are of the DRAEM family.
        textures: folder or URI of texture images (published: DTD) for the DRAEM family; null takes the corpus' own
            images, augmented and shuffled.
        empty_retries: how often a Perlin mask without any pixel is drawn again; 0 keeps it, the copy is then normal.
    """

    cutpaste_share: float = 0.5
    textures: str | None = None
    empty_retries: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.cutpaste_share <= 1 or self.empty_retries < 0:
            raise OptionError("synthesis: cutpaste_share must be in [0, 1], empty_retries >= 0")
