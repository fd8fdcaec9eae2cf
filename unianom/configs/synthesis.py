"""How pseudo-anomalous images are made."""

from __future__ import annotations

from dataclasses import dataclass

from unianom.options import AtLeastZero, Options, Share


@dataclass(frozen=True)
class SynthesisConfig(Options):
    """How pseudo-anomalous copies of normal images are made.

    Args:
        cutpaste_share: share of copies from the CutPaste family; the rest are of the DRAEM family.
        textures: folder or URI of texture images (published: DTD) for the DRAEM family; null takes the corpus' own
            images, augmented and shuffled.
        empty_retries: how often a Perlin mask without any pixel is drawn again; 0 keeps it, the copy is then normal.
    """

    cutpaste_share: Share = 0.5
    textures: str | None = None
    empty_retries: AtLeastZero = 0
