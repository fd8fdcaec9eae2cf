"""Which images stand in which step, and which serve others as prompts or textures."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import faiss
import numpy as np

from pipelines.training.samples import TrainingImages
from unianom.errors import OptionError

NEAREST_PROMPTS = 10
"""How many images with the nearest descriptors are an image's possible prompts where categories are not known."""

EpochIndex = tuple[int, int]
"""Epoch, and index of an image."""


class StepSampler:
    """Endless sequence of images for one worker, epoch after epoch, each in a new order.

    With `groups`, images of a few row groups are shuffled among each other, and row groups among all, so that a
    reader of a large corpus touches each row group once an epoch; every worker then reads row groups of its own.
    Without, all images are shuffled, and the sequence of global batches does not depend on the number of workers.

    Args:
        count: images.
        seed: of all orders.
        batch_size: images of a step, over all workers.
        rank, workers: this worker, of how many.
        groups: N, number of the row group of each image; None to shuffle all.
        window: row groups shuffled together.

    Raises:
        OptionError: fewer images than workers that read row groups of their own.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        batch_size: int,
        rank: int = 0,
        workers: int = 1,
        groups: np.ndarray | None = None,
        window: int = 4,
    ) -> None:
        self._count, self._seed, self._batch_size = count, seed, batch_size
        self._groups, self._window = groups, window
        self._start, self._end = (batch_size * r // workers for r in (rank, rank + 1))
        # with groups, as much of an epoch as of a step, so that all workers end their epochs together
        self._first, self._last = (count * bound // batch_size for bound in (self._start, self._end))
        if groups is not None and self.share and self._first == self._last:
            raise OptionError(
                f"{count} training images are too few to stream to {workers} workers; lower --runtime.workers, or "
                f"take --data.images prepared"
            )
        self._known: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def share(self) -> int:
        """Images of a step that are this worker's."""
        return self._end - self._start

    def step(self, number: int) -> list[EpochIndex]:
        """Return this worker's images of a step."""
        if self._groups is None:
            first = number * self._batch_size
            return [self._at(place) for place in range(first + self._start, first + self._end)]
        return [self._at(place) for place in range(number * self.share, (number + 1) * self.share)]

    def _at(self, place: int) -> EpochIndex:
        length = len(self._epoch(0))
        epoch, offset = divmod(place, length)
        return epoch, int(self._epoch(epoch)[offset])

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._known:
            self._known[epoch] = self._shuffled(epoch)
            while len(self._known) > 3:  # this one, the next, and epoch 0 for its length
                self._known.popitem(last=False)
        self._known.move_to_end(epoch)
        return self._known[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        if self._groups is None:
            return rng.permutation(self._count)
        rank_of_group = rng.permutation(int(self._groups.max()) + 1)
        by_group = np.argsort(rank_of_group[self._groups], kind="stable")
        mine = by_group[self._first : self._last]
        places = rank_of_group[self._groups[mine]]
        windows = (places - places[0]) // self._window
        return np.concatenate([rng.permutation(mine[windows == number]) for number in np.unique(windows)])


class ReferenceSampler:
    """Which images may stand beside an image: as its prompt, or as the texture of its synthetic anomaly.

    Args:
        images: all of them.
        near_only: whether references must come from the image's own row group, because others are costly to reach.
        descriptors: N×D, where prompts are the nearest images and not those of the same category.
    """

    def __init__(self, images: TrainingImages, near_only: bool, descriptors: np.ndarray | None) -> None:
        places = images.part * (images.group.max() + 1) + images.group if near_only else np.zeros_like(images.part)
        self._places = places
        self._category = images.category
        self._alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        self._any: dict[int, list[int]] = defaultdict(list)
        for index, (place, category) in enumerate(zip(places.tolist(), images.category.tolist(), strict=True)):
            self._alike[place, category].append(index)
            self._any[place].append(index)
        self._nearest: np.ndarray | None = None
        if descriptors is not None:
            unit = np.ascontiguousarray(descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True), np.float32)
            search = faiss.IndexFlatIP(unit.shape[1])
            search.add(unit)
            self._nearest = search.search(unit, min(NEAREST_PROMPTS, len(unit)))[1]

    def prompt(self, index: int, rng: np.random.Generator) -> int:
        """Return the index of a normal image like this one; it may be itself."""
        if self._nearest is not None:
            return int(rng.choice(self._nearest[index]))
        return int(rng.choice(self._alike[int(self._places[index]), int(self._category[index])]))

    def other(self, index: int, rng: np.random.Generator) -> int:
        """Return the index of any normal image."""
        return int(rng.choice(self._any[int(self._places[index])]))
