"""Training batches: which images a step takes, and how they reach the network.

The order of images is a pure function of seed, epoch and number of workers, and whatever is random in making an image
(its prompt, flips and turns, synthetic anomaly) of seed, epoch and image. So a run continues at any step as if it had
not been interrupted, and neither the number of loading processes nor their timing changes a batch.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.data.feature_cache import DESCRIPTOR, MASKS, PIXELS, Arrays, learnable
from pipelines.data.reader import decode_row_mask
from unianom import files
from unianom.data.image import ImageLimits, InputPolicy, decode_prepared
from unianom.data.shards import ShardSet
from unianom.data.synthesis import Synthesiser
from unianom.errors import OptionError
from unianom.methods.trained import Augmentation, BatchNeeds, TrainingBatch

NEAREST_PROMPTS = 10
"""How many images with the nearest descriptors are an image's possible prompts where categories are not known."""

Place = tuple[int, int]
"""Epoch, and index of an image."""

# One for all shard images, so that they can be pickled: a batch is made ahead while validation asks for others.
_groups_lock = threading.Lock()


@dataclass(frozen=True)
class TrainingImages:
    """The images a method learns from, in a fixed order.

    Attributes:
        category: N int64, index into the categories.
        label: N int64, 0 normal, 1 anomalous.
        part, group, row: N int64, where each lies: part number, row group, place among the `learnable` of its part.
    """

    category: np.ndarray
    label: np.ndarray
    part: np.ndarray
    group: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.category)

    @staticmethod
    def choose(
        shards: ShardSet, categories: list[str], learn: frozenset[str] | None, labels: bool = False
    ) -> TrainingImages:
        """Those of the shard set's `learnable` images whose sample_id is in `learn`, or all; in the order of parts and
        rows."""
        table = shards.locate(learnable(categories, labels), ["sample_id", "category", "label"])
        if learn is not None:
            table = table.filter(pa.array([sample in learn for sample in table["sample_id"].to_pylist()]))
        numbers = {category: number for number, category in enumerate(categories)}
        category = np.array([numbers[name] for name in table["category"].to_pylist()], np.int64)
        label = table["label"].to_numpy().astype(np.int64)
        return TrainingImages(category, label, *(table[name].to_numpy() for name in ("part", "group", "row")))

    def of_parts(self, numbers: set[int]) -> TrainingImages:
        """Those that lie in some parts."""
        inside = np.isin(self.part, sorted(numbers))
        return TrainingImages(*(getattr(self, field.name)[inside] for field in fields(self)))

    def save(self, uri: str) -> None:
        """Write them as a Parquet file."""
        buffer = io.BytesIO()
        pq.write_table(pa.table({field.name: getattr(self, field.name) for field in fields(self)}), buffer)
        files.write_bytes(uri, buffer.getvalue())

    @staticmethod
    def load(uri: str) -> TrainingImages:
        """Read what `save` wrote."""
        table = pq.read_table(io.BytesIO(files.read_bytes(uri)))
        return TrainingImages(*(table[field.name].to_numpy() for field in fields(TrainingImages)))


# ----------------------------------------------------------------------------------------------------------- order
class Order:
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

    def step(self, number: int) -> list[Place]:
        """This worker's images of a step."""
        if self._groups is None:
            first = number * self._batch_size
            return [self._at(place) for place in range(first + self._start, first + self._end)]
        return [self._at(place) for place in range(number * self.share, (number + 1) * self.share)]

    def _at(self, place: int) -> Place:
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


# ---------------------------------------------------------------------------------------------------------- images
class ShardImages:
    """Prepared images decoded from the shards as they are asked for, a few row groups kept at a time.

    Args:
        shards, categories: where they lie.
        images: which.
        policy: how they become input.
        limits: what an image may cost.
        keep: row groups kept, encoded.
        labels: whether anomalous images are among them.
        masks: whether masks are asked for.
    """

    def __init__(
        self,
        shards: ShardSet,
        categories: list[str],
        images: TrainingImages,
        policy: InputPolicy,
        limits: ImageLimits,
        keep: int,
        labels: bool = False,
        masks: bool = False,
    ) -> None:
        self._shards, self._selection = shards, learnable(categories, labels)
        self._images, self._policy, self._limits, self._keep = images, policy, limits, keep
        self._columns = ["image", "mask", "sample_id", "label"] if masks else ["image"]
        self._first: dict[tuple[int, int], int] = {}
        self._groups: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()

    def pixels(self, index: int) -> np.ndarray:
        """S×S×3 uint8."""
        return decode_prepared(self._row(index)["image"], self._policy, self._limits)

    def mask(self, index: int) -> np.ndarray:
        """S×S bool."""
        return decode_row_mask(self._row(index), self._policy, self._limits)

    def _row(self, index: int) -> dict[str, Any]:
        part, group = int(self._images.part[index]), int(self._images.group[index])
        with _groups_lock:
            rows = self._group(part, group)  # fills _first
        return rows[int(self._images.row[index]) - self._first[part, group]]

    def _group(self, part: int, group: int) -> list[dict[str, Any]]:
        if (part, group) not in self._groups:
            name = self._shards.parts[part]
            for before in range(group + 1):
                if (part, before) not in self._first:
                    ended = self._shards.read_group(name, before - 1, self._selection, ["sample_id"]) if before else []
                    self._first[part, before] = self._first.get((part, before - 1), 0) + len(ended)
            self._groups[part, group] = self._shards.read_group(name, group, self._selection, self._columns).to_pylist()
            while len(self._groups) > self._keep:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return self._groups[part, group]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_groups": OrderedDict()}


class PreparedImages:
    """Prepared images from a memory-mapped set."""

    def __init__(self, arrays: Arrays, images: TrainingImages) -> None:
        self._arrays, self._images = arrays, images

    def pixels(self, index: int) -> np.ndarray:
        """S×S×3 uint8."""
        return self._arrays.row(PIXELS, int(self._images.part[index]), int(self._images.row[index]))

    def mask(self, index: int) -> np.ndarray:
        """S×S bool."""
        return self._arrays.row(MASKS, int(self._images.part[index]), int(self._images.row[index]))


class Companions:
    """Which images may stand beside an image: as its prompt, or as the texture of its synthetic anomaly.

    Args:
        images: all of them.
        near_only: whether companions must come from the image's own row group, because others are costly to reach.
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
        """A normal image like this one; it may be itself."""
        if self._nearest is not None:
            return int(rng.choice(self._nearest[index]))
        return int(rng.choice(self._alike[int(self._places[index]), int(self._category[index])]))

    def other(self, index: int, rng: np.random.Generator) -> int:
        """Any normal image."""
        return int(rng.choice(self._any[int(self._places[index])]))


def flip_and_turn(
    pixels: np.ndarray, mask: np.ndarray | None, category: str, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """A random mirroring, right-angle turn and rotation, as the category of the image allows.

    Args:
        pixels: S×S×3 uint8.
        mask: S×S bool, changed alike, or None.
        category: of the image.
        augmentation: what is asked for.
        rng: draws the same whether there is a mask or not.
    """

    def chosen(names: tuple[str, ...]) -> bool:
        return category in names or "*" in names

    changes: list[Callable[[np.ndarray], np.ndarray]] = []
    if chosen(augmentation.horizontal) and rng.random() < augmentation.probability:
        changes.append(np.fliplr)
    if chosen(augmentation.vertical) and rng.random() < augmentation.probability:
        changes.append(np.flipud)
    if chosen(augmentation.turns):
        changes.append(partial(np.rot90, k=int(rng.integers(4))))
    if augmentation.rotation:
        changes.append(partial(_rotated, angle=float(rng.uniform(-augmentation.rotation, augmentation.rotation))))
    for change in changes:
        pixels, mask = change(pixels), None if mask is None else change(mask)
    return pixels, mask


def _rotated(values: np.ndarray, angle: float) -> np.ndarray:
    """An image turned bilinearly, or a mask of bool by nearest neighbours; what comes from outside is black."""
    if values.dtype == bool:
        return _rotated_by(values.astype(np.uint8), angle, Image.Resampling.NEAREST).astype(bool)
    return _rotated_by(values, angle, Image.Resampling.BILINEAR)


def _rotated_by(values: np.ndarray, angle: float, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(values)).rotate(angle, resampling))


# --------------------------------------------------------------------------------------------------------- batches
class TrainingSet(Dataset[TrainingBatch]):
    """Makes batches from lists of places.

    Args:
        images: which images there are.
        categories: their names.
        needs: what the method's batches hold besides images.
        pixels: where prepared images come from; None where frozen features stand for them all.
        features: frozen features; None where they are not kept.
        companions: for prompts and textures; None where no image needs one.
        synthesiser: makes synthetic anomalies; None for none.
        seed: of all that is random in making an image.

    Raises:
        ValueError: prompts or synthetic anomalies beside labels; both are made of normal images.
    """

    def __init__(
        self,
        images: TrainingImages,
        categories: list[str],
        needs: BatchNeeds,
        pixels: ShardImages | PreparedImages | None,
        features: Arrays | None,
        companions: Companions | None,
        synthesiser: Synthesiser | None,
        seed: int,
    ) -> None:
        if needs.labels and (needs.prompts or needs.synthetic):
            raise ValueError("a method that needs labels can have neither prompts nor synthetic anomalies")
        self._images, self._categories, self._needs = images, categories, needs
        self._pixels, self._features = pixels, features
        self._companions, self._synthesiser, self._seed = companions, synthesiser, seed

    def __getitem__(self, places: Sequence[Place]) -> TrainingBatch:
        return self.batch(places)

    def batch(self, places: Sequence[Place], augment: bool = True) -> TrainingBatch:
        """The images at these places, with all that belongs to them; images are uint8 until `to_input`."""
        columns: dict[str, list[Any]] = defaultdict(list)
        for epoch, index in places:
            # the epoch of fixed batches is −1, which a seed may not be
            rng = np.random.default_rng([self._seed, epoch + 1, index, 1])
            for name, value in self._sample(index, rng, augment).items():
                columns[name].append(value)
        values: dict[str, Any] = {}
        for name, column in columns.items():
            if isinstance(column[0], int):
                values[name] = torch.tensor(column)
            elif isinstance(column[0], dict):
                values[name] = {key: torch.from_numpy(np.stack([row[key] for row in column])) for key in column[0]}
            else:
                values[name] = torch.from_numpy(np.stack(column))
        return TrainingBatch(**values)

    def _sample(self, index: int, rng: np.random.Generator, augment: bool) -> dict[str, Any]:
        sample: dict[str, Any] = {"category": int(self._images.category[index])}
        if self._needs.labels:
            sample["label"] = int(self._images.label[index])
        pixels = mask = None
        if self._pixels is not None:
            pixels = self._pixels.pixels(index)
            mask = self._pixels.mask(index) if self._needs.masks else None
            augmentation = self._needs.augmentation
            if augment and augmentation.active:
                pixels, mask = flip_and_turn(pixels, mask, self._categories[sample["category"]], augmentation, rng)
        if self._features is not None:
            sample["features"] = self._row(index)
        if pixels is not None and (self._features is None or self._needs.images):
            sample["images"] = _channels_first(pixels)
        if mask is not None:
            sample["mask"] = mask[None].astype(np.float32)
        if self._companions is not None and self._needs.prompts is not None:
            prompt = self._companions.prompt(index, rng)
            if self._features is not None:
                sample["prompt_features"] = self._row(prompt)
            elif self._pixels is not None:
                sample["prompt_images"] = _channels_first(self._pixels.pixels(prompt))
        if self._synthesiser is not None and self._companions is not None and self._pixels is not None:
            other = self._pixels.pixels(self._companions.other(index, rng))
            assert pixels is not None
            made = self._synthesiser(np.ascontiguousarray(pixels), rng, other)
            sample["synthetic_images"] = _channels_first(made.image)
            sample["synthetic_mask"] = made.mask[None].astype(np.float32)
        return sample

    def _row(self, index: int) -> dict[str, np.ndarray]:
        assert self._features is not None
        part, row = int(self._images.part[index]), int(self._images.row[index])
        return {name: self._features.row(name, part, row) for name in self._features.names}


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def descriptors(uri: str, parts: list[str], images: TrainingImages, copies: Path) -> np.ndarray:
    """N×D descriptors of images, from a set of frozen features."""
    arrays = Arrays(uri, parts, (DESCRIPTOR,), copies)
    places = zip(images.part.tolist(), images.row.tolist(), strict=True)
    return np.stack([arrays.row(DESCRIPTOR, part, row) for part, row in places])


def to_input(batch: TrainingBatch, device: torch.device, policy: InputPolicy) -> TrainingBatch:
    """A batch on its device, with images normalised and features in float32."""
    assert policy.mean is not None
    assert policy.std is not None
    mean = torch.tensor(policy.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(policy.std, device=device).view(1, 3, 1, 1)

    def ready(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        if tensor.dtype == torch.uint8:
            return tensor.float().div_(255).sub_(mean).div_(std)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return batch.map(ready)


class Batches:
    """A worker's batches from a given step on, made ahead of their use.

    Args:
        data: makes them.
        order: which images each holds.
        processes: that make batches beside training; 0 uses a thread.
        pin: whether batches are put into page-locked memory.
        repeats: successive steps that take the same batch.
    """

    def __init__(self, data: TrainingSet, order: Order, processes: int, pin: bool, repeats: int = 1) -> None:
        self._data, self._order, self._processes, self._pin = data, order, processes, pin
        self._repeats = repeats

    def __call__(self, start: int, end: int) -> Iterator[TrainingBatch]:
        """The batches of steps start … end−1."""
        first = start // self._repeats
        for number, batch in enumerate(self._made(first, -(-end // self._repeats)), first):
            steps = range(number * self._repeats, (number + 1) * self._repeats)
            for _ in range(max(start, steps.start), min(end, steps.stop)):
                yield batch

    def _made(self, start: int, end: int) -> Iterator[TrainingBatch]:
        """The batches start … end−1, each once."""
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

    def __init__(self, order: Order, start: int, end: int) -> None:
        self._order, self._start, self._end = order, start, end

    def __iter__(self) -> Iterator[list[Place]]:
        return (self._order.step(number) for number in range(self._start, self._end))

    def __len__(self) -> int:
        return self._end - self._start


def _one_ahead(data: TrainingSet, places: Iterator[list[Place]], pin: bool) -> Iterator[TrainingBatch]:
    def make(where: list[Place]) -> TrainingBatch:
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
