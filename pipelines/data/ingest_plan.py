"""What an ingest will write: which samples, in which parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from threading import Lock
from typing import Any, overload

from unianom.data.schema import ANOMALOUS, NORMAL, Crop, SampleRef
from unianom.data.splits import draw_order, held_out_limits
from unianom.errors import DataError

PACKED = 1000
"""Samples of a task that are packed together: a worker holds so many at once."""

END = b"."
"""Last byte of packed samples: Ray Data hands them over in arrays of NumPy, which drop zero bytes at the end."""

_COLUMNS = tuple(field.name for field in dataclasses.fields(SampleRef))


class SampleListing:
    """All samples of a source, in a temporary database instead of memory.

    Args:
        database: see `unianom.temporary_database`; holds nothing else of these names.
        samples: in any order; listed once, here.
    """

    def __init__(self, database: sqlite3.Connection, samples: Iterable[SampleRef]) -> None:
        self._database = database
        self._lock = Lock()  # threads ask for the samples of their parts
        self._parts = 0
        database.create_function("name_hash", 1, _name_hash, deterministic=True)
        database.execute(f"create table samples ({', '.join(_COLUMNS)})")
        marks = ", ".join("?" * len(_COLUMNS))
        database.executemany(f"insert into samples values ({marks})", map(_to_row, samples))
        self.count = int(database.execute("select count(*) from samples").fetchone()[0])

    def __iter__(self) -> Iterator[SampleRef]:
        """Yield the samples in the order in which they were listed."""
        return self._select("order by rowid")

    def counts(self) -> list[dict[str, Any]]:
        """Return how many samples there are of each data set, category, split, label and defect."""
        group = ("dataset", "category", "split", "label", "defect")
        columns = ", ".join(group)
        found = self._database.execute(f"select {columns}, count(*) from samples group by {columns} order by {columns}")
        return [dict(zip((*group, "count"), row, strict=True)) for row in found]

    def check_unique(self, advice: str = "names must be unique") -> None:
        """Raise a DataError, which ends with an advice, if two samples have the same sample_id."""
        repeated = "select min(rowid) as first, sample_id from samples group by sample_id having count(*) > 1"
        if self._database.execute(f"{repeated} limit 1").fetchone() is None:
            return
        one, other, sample_id = self._database.execute(
            "select earlier.uri, later.uri, later.sample_id "
            f"from ({repeated}) as name join samples as earlier on earlier.rowid = name.first "
            "join samples as later on later.sample_id = name.sample_id and later.rowid > name.first "
            "order by later.rowid limit 1"
        ).fetchone()
        raise DataError(f"{one} and {other} are both named {sample_id}; {advice}")

    def contaminate(self, fraction: float, seed: int) -> None:
        """Put a share of each category's anomalous test images among the normal training images.

        Raises:
            DataError: there is no category with two anomalous test images, one to move and one to keep.
        """
        database = self._database
        candidates = f"split = 'test' and label = {ANOMALOUS}"
        names = database.execute(f"select sample_id, category from samples where {candidates}")
        limits = held_out_limits(names, fraction, seed)
        database.create_function(
            "is_drawn",
            2,
            lambda name, category: draw_order(name, seed) <= limits.get(category, b""),
            deterministic=True,
        )
        moved = database.execute(
            f"update samples set split = 'train', label = {NORMAL}, mask_uri = null, more_masks = null "
            f"where {candidates} and is_drawn(sample_id, category)"
        ).rowcount
        if not moved:
            raise DataError(
                "contaminate moves anomalous test images into training, but no category has two of them; leave it out"
            )

    def deal(self, part_bytes: int, min_parts: int, unknown_bytes: int = 0) -> int:
        """Deal samples out to parts so that every part holds the same mix of splits, categories and labels.

        Within a stratum the order is by hash of the sample_id, so a part is also a fair sample of its stratum. A part's
        rows are ordered by split first, which keeps the splits in separate row groups.

        Args:
            part_bytes: aimed size of a part.
            min_parts: parts at least, where there are so many samples.
            unknown_bytes: what a sample counts for whose size the listing does not tell.

        Returns:
            How many parts there are.
        """
        database = self._database
        sizes = "select sum(coalesce(nullif(size, 0), length(data), ?)) from samples"
        total = database.execute(sizes, [unknown_bytes]).fetchone()[0] or 0
        self._parts = min(max(-(-total // part_bytes), min_parts), self.count)
        database.execute("create table dealt (part, place, sample, primary key (part, place)) without rowid")
        database.execute(
            "insert into dealt select (place - 1) % ?, place, sample from (select rowid as sample, row_number() over "
            "(order by split, dataset, category, coalesce(label, -1), name_hash(sample_id)) as place from samples) "
            "order by 1, 2",
            [self._parts],
        )
        return self._parts

    def part_count(self, part: int) -> int:
        """Return how many samples a part has."""
        return self.count // self._parts + (part < self.count % self._parts)

    def part(self, part: int) -> Iterator[SampleRef]:
        """Yield the samples of a part in its order."""
        return self._select("join dealt on samples.rowid = dealt.sample where part = ? order by place", part)

    def task(self, part: int) -> dict[str, Any]:
        """Return what a worker needs to write a part; see `unpack_samples`."""
        with self._lock:
            samples = self.part(part)
            packed = []
            while chunk := list(islice(samples, PACKED)):
                packed.append(pack_samples(chunk))
            return {"number": part, "refs": packed}

    def digest(self) -> str:
        """Return a digest of all that the listing says of its samples, whatever their order."""
        digest = hashlib.sha256()
        for ref in self._select("order by sample_id"):
            digest.update(
                repr(
                    (
                        *(ref.sample_id, ref.dataset, ref.category, ref.split, ref.label, ref.defect, ref.uri),
                        *(ref.mask_uri, ref.mask_threshold or 0, ref.size, None),
                    )
                ).encode()
            )
            digest.update(repr(hashlib.sha256(ref.data).hexdigest() if ref.data else None).encode())
            # only where there is any, so that shard sets from before there were such stay the same plan
            if ref.crop is not None:
                digest.update(repr(ref.crop).encode())
            if ref.more_masks:
                digest.update(repr(ref.more_masks).encode())
            if ref.mask_threshold == 0:
                digest.update(b"above 0")
        return digest.hexdigest()

    def _select(self, which: str, *values: Any) -> Iterator[SampleRef]:
        columns = ", ".join(f"samples.{name}" for name in _COLUMNS)
        return map(_from_row, self._database.execute(f"select {columns} from samples {which}", values))


class PartTasks(Sequence[dict[str, Any]]):
    """The tasks of some parts, each made when it is asked for.

    Args:
        listing: whose samples have been dealt out.
        parts: numbers of the parts.
    """

    def __init__(self, listing: SampleListing, parts: Sequence[int]) -> None:
        self._listing, self._numbers = listing, parts

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> PartTasks: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | PartTasks:
        """Return a task, or some of them."""
        if isinstance(index, slice):
            return PartTasks(self._listing, self._numbers[index])
        return self._listing.task(self._numbers[index])


def pack_samples(samples: Sequence[SampleRef]) -> bytes:
    """Return samples as bytes that `unpack_samples` reads; names that resemble each other take little space."""
    return zlib.compress(pickle.dumps([_to_row(sample) for sample in samples]), 1) + END


def unpack_samples(packed: Iterable[bytes]) -> Iterator[SampleRef]:
    """Yield the samples of a task's `refs`, some at a time."""
    for content in packed:
        yield from map(_from_row, pickle.loads(zlib.decompress(content.removesuffix(END))))


def part_name(number: int) -> str:
    """Return the file name of a part."""
    return f"part-{number:05d}.parquet"


def _name_hash(sample_id: str) -> bytes:
    return hashlib.sha256(sample_id.encode()).digest()


def _to_row(sample: SampleRef) -> tuple[Any, ...]:
    *plain, crop, more_masks = (getattr(sample, name) for name in _COLUMNS)
    return (
        *plain,
        None if crop is None else json.dumps(dataclasses.asdict(crop)),
        json.dumps(more_masks) if more_masks else None,
    )


def _from_row(row: Sequence[Any]) -> SampleRef:
    *plain, crop, more_masks = row
    crop = None if crop is None else Crop(**json.loads(crop))
    return SampleRef(*[*plain, crop, () if more_masks is None else tuple(json.loads(more_masks))])
