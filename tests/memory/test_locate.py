"""Where in their images the vectors of a bank lie."""

from __future__ import annotations

import numpy as np
import pytest

from unianom.errors import DataError, ModelError, OptionError
from unianom.memory.index import MemoryBank
from unianom.memory.locate import locate_vectors
from unianom.memory.origins import Origins

PATCHES = np.random.default_rng(0).normal(size=(3, 20, 8)).astype(np.float32)
KEPT = [(0, 3), (0, 17), (2, 0), (2, 5), (2, 19)]
"""Image and patch of each vector of the bank; the second image gave none."""


@pytest.fixture
def bank() -> MemoryBank:
    images, numbers = np.array(KEPT).T
    origins = Origins(("a", "b", "c"), images.astype(np.int32))
    return MemoryBank.build(PATCHES[images, numbers], origins=origins)


@pytest.mark.parametrize("rounding", [0.0, 1e-5])
def test_each_vector_is_found_where_it_was_taken(bank: MemoryBank, rounding: float) -> None:
    for number, name in enumerate("abc"):
        rows, numbers = locate_vectors(bank, name, PATCHES[number] * np.float32(1 + rounding))
        assert rows.tolist() == [row for row, (image, _) in enumerate(KEPT) if image == number]
        assert numbers.tolist() == [patch for image, patch in KEPT if image == number]


def test_what_is_not_known_is_refused(bank: MemoryBank) -> None:
    with pytest.raises(DataError, match="2 of 2 vectors that came from a are none of these patches"):
        locate_vectors(bank, "a", PATCHES[1])
    with pytest.raises(DataError, match=r"shape \(20, 5\); the bank has vectors of 8 values"):
        locate_vectors(bank, "a", PATCHES[0, :, :5])
    with pytest.raises(OptionError, match="not chosen from an image d, but from 3 others, such as a"):
        locate_vectors(bank, "d", PATCHES[0])
    with pytest.raises(ModelError, match="does not tell which image"):
        locate_vectors(MemoryBank.build(PATCHES[0]), "a", PATCHES[0])
