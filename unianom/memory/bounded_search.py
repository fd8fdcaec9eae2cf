"""Bounded search: of an image's patches only those are searched in full that can decide its score.

A score is made of the few patches of an image that are farthest from the bank. The distance of a patch to any row of
the bank, whoever proposed that row, bounds its distance to the nearest rows from above. So patches are searched in
full in falling order of their bounds, until no bound that is left reaches the distances found: lazy evaluation (Minoux,
"Accelerated greedy algorithms for maximizing submodular set functions", 1978). Distances are those of a full search,
bit for bit, whatever is proposed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unianom.memory.index import MemoryBank
from unianom.memory.patch_distances import mean_distances

FEW_PROBES, MANY_PROBES = 1, 6
"""Lists that proposals come from: for all patches at first, then for those whose bounds are high."""

ONCE, TWICE, EXACT = 0, 1, 2
"""What is known of a patch: the bounds of few and of many proposals, or its distances."""

BOUNDED_BEYOND, SEARCHED_BEYOND = 16, 4
"""Patches of each image whose bounds are lowered, and that are searched, beyond those that must be; with each round
twice as many. A matrix product of a few more rows costs little, another round costs a pass over the bank."""


def search_largest(
    bank: MemoryBank, patches: Tensor, keep: Tensor, neighbours: int, count: int
) -> tuple[Tensor, Tensor]:
    """Search the patches of images in full that can be among those of largest mean distance to their nearest vectors.

    Args:
        bank: one with proposals.
        patches: B×N×D on the CPU.
        keep: B×N bool; patches that are not kept have the distance 0.
        neighbours: K, how many vectors to find for each patch.
        count: how many patches of each image are wanted; at most N.

    Returns:
        Squared distances and rows, both B×N×K, as of `MemoryMethod.nearest_vectors` for these patches: the `count` of
        largest mean distance, and all others of at least the mean distance of the last of them. For the rest distances
        are upper bounds, whose mean is below, and rows are 0.

    Raises:
        OptionError, DataError: see `MemoryBank.search`.
    """
    distances = torch.zeros(*keep.shape, neighbours)
    rows = torch.zeros(*keep.shape, neighbours, dtype=torch.int64)
    queries = patches[keep].float()  # M D
    if not len(queries):
        return distances, rows
    number = keep.flatten().cumsum(0).view_as(keep) - 1  # of each kept patch among the queries
    known = torch.where(keep, ONCE, EXACT)  # B N
    distances[keep] = torch.from_numpy(bank.distance_bounds(queries.numpy(), neighbours, FEW_PROBES))
    spare = {ONCE: BOUNDED_BEYOND + count // 2, TWICE: SEARCHED_BEYOND}
    while True:
        means = mean_distances(distances, neighbours)  # B N
        found = torch.where(known == EXACT, means, -1).topk(count).values[:, -1:]  # −1 where fewer are found
        possible = (known < EXACT) & (means >= found)
        if not possible.any():
            return distances, rows
        # bounds can only fall, so the patches of the `count` largest must be looked at
        if (_largest(means, count + spare[TWICE]) & possible & (known == ONCE)).any():
            chosen = _largest(means, count + spare[ONCE]) & possible & (known == ONCE)
            bounds = bank.distance_bounds(queries[number[chosen]].numpy(), neighbours, MANY_PROBES)
            distances[chosen] = torch.minimum(distances[chosen], torch.from_numpy(bounds))
            known[chosen] = TWICE
            spare[ONCE] *= 2
        else:
            chosen = _largest(means, count + spare[TWICE]) & possible
            nearest, ids = bank.search(queries[number[chosen]].numpy(), neighbours)
            distances[chosen], rows[chosen] = torch.from_numpy(nearest), torch.from_numpy(ids)
            known[chosen] = EXACT
            spare[TWICE] *= 2


def _largest(means: Tensor, count: int) -> Tensor:
    """Return which patches of each image are among the `count` of largest mean, ties included; B×N bool."""
    return means >= means.topk(min(count, means.shape[1])).values[:, -1:]
