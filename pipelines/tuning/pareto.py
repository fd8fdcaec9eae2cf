"""The front of trials that no other trial beats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pareto_front(values: ArrayLike, larger_is_better: Sequence[bool]) -> NDArray[np.bool_]:
    """Return the rows that no other row beats: none is as good in every column and better in one.

    Args:
        values: (N, K).
        larger_is_better: K; of each column.

    Returns:
        (N,) bool. Equal rows are on the front together; a row with NaN never is, and beats none.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.shape[1] != len(larger_is_better):
        raise ValueError(f"values of shape {table.shape} do not fit {len(larger_is_better)} directions")
    table = np.where(np.asarray(larger_is_better, bool), table, -table)
    front = np.asarray(~np.isnan(table).any(axis=1))
    known = table[front]
    front[front] = [not ((known >= row).all(axis=1) & (known > row).any(axis=1)).any() for row in known]
    return front
