"""Digests of sets of sample_ids that can be added up, so that completeness is checked without gathering names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Self

_MODULUS = 1 << 128


class IdDigest:
    """The sum, modulo 2¹²⁸, of the first 16 bytes (big-endian) of the SHA-256 of each sample_id.

    The order of names makes no difference, and the digest of a union of disjoint sets is the sum of their digests. A
    name that is lost, or there twice, changes it. It detects mistakes, not forgeries.
    """

    def __init__(self) -> None:
        self._sum = 0

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """Return the digest that `hex` wrote.

        Raises:
            ValueError: the text is not 32 hexadecimal digits.
        """
        if len(text) != 32 or not set(text) <= set("0123456789abcdef"):
            raise ValueError(f"'{text}' is no digest of sample_ids; it should be 32 hexadecimal digits")
        digest = cls()
        digest._sum = int(text, 16)
        return digest

    def add(self, ids: Iterable[str]) -> None:
        """Add sample_ids."""
        for sample_id in ids:
            self._sum += int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:16], "big")
        self._sum %= _MODULUS

    def merge(self, other: IdDigest) -> None:
        """Add the sample_ids of another digest."""
        self._sum = (self._sum + other._sum) % _MODULUS

    def hex(self) -> str:
        """Return the digest as 32 hexadecimal digits."""
        return f"{self._sum:032x}"
