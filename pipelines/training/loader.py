"""BatchLoader made ahead of the steps that take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader

from pipelines.training.dataset import TrainingSet
from pipelines.training.sampler import EpochIndex, StepSampler
from unianom.methods.trained import TrainingBatch


class BatchLoader:
    """A worker's batches from a given step on, made ahead of their use.

    Args:
        data: makes them.
        order: which images each holds.
        processes: that make batches beside training; 0 uses a thread.
        pin: whether batches are put into page-locked memory.
        repeats: successive steps that take the same batch.
    """

    def __init__(self, data: TrainingSet, order: StepSampler, processes: int, pin: bool, repeats: int = 1) -> None:
        self._data, self._order, self._processes, self._pin = data, order, processes, pin
        self._repeats = repeats

    def __call__(self, start: int, end: int) -> Iterator[TrainingBatch]:
        """Yield the batches of steps start … end−1."""
        first = start // self._repeats
        for number, batch in enumerate(self._made(first, -(-end // self._repeats)), first):
            steps = range(number * self._repeats, (number + 1) * self._repeats)
            for _ in range(max(start, steps.start), min(end, steps.stop)):
                yield batch

    def _made(self, start: int, end: int) -> Iterator[TrainingBatch]:
        """Yield the batches start … end−1, each once."""
        places = (self._order.step(number) for number in range(start, end))
        if self._processes == 0:
            yield from _one_ahead(self._data, places, self._pin)
            return
        # "spawn": a forked copy of a process with running threads may hang
        loader: Iterable[TrainingBatch] = DataLoader(
            self._data,
            sampler=_Steps(self._order, start, end),
            batch_size=None,
            num_workers=self._processes,
            pin_memory=self._pin,
            multiprocessing_context="spawn",
            generator=torch.Generator(),  # else it draws from the random state that dropout and noise depend on
        )
        yield from loader


class _Steps:
    """The places of every batch, for a data loader."""

    def __init__(self, order: StepSampler, start: int, end: int) -> None:
        self._order, self._start, self._end = order, start, end

    def __iter__(self) -> Iterator[list[EpochIndex]]:
        return (self._order.step(number) for number in range(self._start, self._end))

    def __len__(self) -> int:
        return self._end - self._start


def _one_ahead(data: TrainingSet, places: Iterator[list[EpochIndex]], pin: bool) -> Iterator[TrainingBatch]:
    def make(where: list[EpochIndex]) -> TrainingBatch:
        batch = data.batch(where)
        return batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for where in places:
            coming = pool.submit(make, where)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()
