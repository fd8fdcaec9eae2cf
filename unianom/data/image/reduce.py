"""Masks made smaller without losing a thin defect."""

from __future__ import annotations

import numpy as np
from PIL import Image

TOUCHING = np.ones((3, 3))
"""Structuring element by which pixels that touch at a corner are connected."""


def reduce_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an H×W mask of 0 and 255: nearest neighbour, but a thin defect keeps every cell that one of its pixels
    lies in.

    A defect is a connected region of the mask, pixels that touch at a corner included. It is thin if nearest neighbour
    leaves nothing of it, or less than half of its cells and these in pieces or without its ends.
    """
    reduced = nearest(mask, height, width).copy()
    if mask.shape[0] <= height and mask.shape[1] <= width:
        return reduced  # every pixel has a cell
    from scipy import ndimage  # slow to import, and few images need it

    regions, count = ndimage.label(mask, TOUCHING)
    cells = nearest(regions.astype(np.int32), height, width)
    # the cell of a pixel is the one its middle lies in
    row_of = (2 * np.arange(mask.shape[0]) + 1) * height // (2 * mask.shape[0])
    column_of = (2 * np.arange(mask.shape[1]) + 1) * width // (2 * mask.shape[1])
    first = regions > 0  # pixels whose neighbours to the left and above are of another region or cell
    first[:, 1:] &= (regions[:, 1:] != regions[:, :-1]) | (column_of[1:] != column_of[:-1])
    first[1:] &= (regions[1:] != regions[:-1]) | (row_of[1:] != row_of[:-1])[:, None]
    rows, columns = np.nonzero(first)
    pairs = np.unique(regions[first].astype(np.int64) * reduced.size + row_of[rows] * width + column_of[columns])
    numbers, places = np.divmod(pairs, reduced.size)
    touched, kept = np.bincount(numbers, minlength=count + 1), np.bincount(cells.ravel(), minlength=count + 1)
    reduced.flat[places[kept[numbers] == 0]] = 255
    ends = np.cumsum(touched)
    extents = ndimage.find_objects(cells, count)
    for number in np.flatnonzero((kept > 0) & (touched > 2 * kept)):
        own = places[ends[number] - touched[number] : ends[number]]
        extent = extents[number - 1]
        if _has_lost_parts(cells[extent] == number, own // width, own % width):
            reduced.flat[own] = 255
    return reduced


def _has_lost_parts(kept: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> bool:
    """Return whether the cells kept of a defect that touches those in `rows` and `columns` are in pieces, or more than
    a cell short at an end."""
    from scipy import ndimage  # slow to import, and few images need it

    shorter = max(np.ptp(rows) + 1 - kept.shape[0], np.ptp(columns) + 1 - kept.shape[1])
    return bool(shorter > 2 or ndimage.label(kept, TOUCHING)[1] > 1)


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize H×W values by nearest neighbour."""
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
