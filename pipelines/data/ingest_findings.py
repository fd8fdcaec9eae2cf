"""What a person should know of a shard set before trusting a figure made from it."""

from __future__ import annotations

import heapq
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from pipelines.data.ingest_part import MASK_DOUBTS, MASK_PROBLEMS
from unianom.data.id_digest import IdDigest
from unianom.data.layouts import LeftOut
from unianom.data.schema import REJECTED_SCHEMA

SMALL_PART = 1 << 14
"""16-bit images that never reach this value, a quarter of the range, look like images of fewer bits."""

EXAMPLES = 10
"""Groups of duplicates and masks that are named."""

_GROUP = ("dataset", "category", "split", "label", "defect")
_FACTS = ("sample_id", "split", "label", "sha256", "height", "width")


class SetFindings:
    """Gathers what is told of a shard set, part by part; what grows with the set lies in a temporary database.

    Args:
        database: see `unianom.temporary_database`; holds nothing else of these names.
    """

    columns = tuple(dict.fromkeys((*_GROUP, *_FACTS)))
    """Columns of SAMPLE_SCHEMA that are needed."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute(f"create table images ({', '.join(_FACTS)})")
        database.execute(f"create table rejected ({', '.join(REJECTED_SCHEMA.names)})")
        self._groups: dict[tuple[Any, ...], tuple[int, IdDigest]] = {}
        self._statuses: Counter[str] = Counter()
        self._masks = {problem: _Names() for problem in MASK_PROBLEMS}
        self._doubts = {doubt: _Names() for doubt in MASK_DOUBTS}
        self._deep: list[dict[str, Any]] = []

    def add_record(self, record: dict[str, Any]) -> None:
        """Add the record of a part, as `PartIngester` commits it."""
        names = REJECTED_SCHEMA.names
        rejected = [[row[name] for name in names] for row in record["rejected"]]
        self._database.executemany(f"insert into rejected values ({', '.join('?' * len(names))})", rejected)
        self._statuses.update(row["status"] for row in record["rejected"])
        for problem, ids in record["masks"].items():
            self._masks[problem].add(ids)
        for doubt, ids in record.get("mask_doubts", {}).items():
            self._doubts[doubt].add(ids)
        if "deep" in record:
            self._deep.append(record["deep"])

    def add_rows(self, batch: pa.RecordBatch) -> None:
        """Add rows of a part; only `columns` are looked at."""
        values = {name: batch[name].to_pylist() for name in self.columns}
        self._database.executemany(
            f"insert into images values ({', '.join('?' * len(_FACTS))})", zip(*(values[name] for name in _FACTS))
        )
        members: dict[tuple[Any, ...], list[str]] = {}
        for group, sample_id in zip(zip(*(values[name] for name in _GROUP)), values["sample_id"], strict=True):
            members.setdefault(group, []).append(sample_id)
        for group, ids in members.items():
            count, digest = self._groups.setdefault(group, (0, IdDigest()))
            digest.add(ids)
            self._groups[group] = count + len(ids), digest

    @property
    def count(self) -> int:
        """How many rows were added."""
        return sum(count for count, _ in self._groups.values())

    def counts(self) -> list[dict[str, Any]]:
        """Return what a manifest counts: samples, and the `IdDigest` of their names, by data set, category, split,
        label and defect."""
        return [
            {**dict(zip(_GROUP, group, strict=True)), "count": count, "ids": digest.hex()}
            for group, (count, digest) in sorted(self._groups.items(), key=lambda entry: str(entry[0]))
        ]

    def statuses(self) -> dict[str, int]:
        """Return how many samples were rejected, by status."""
        return dict(sorted(self._statuses.items()))

    def rejected(self) -> Iterator[dict[str, Any]]:
        """Yield rows of REJECTED_SCHEMA by sample_id."""
        names = REJECTED_SCHEMA.names
        for row in self._database.execute(f"select {', '.join(names)} from rejected order by sample_id, rowid"):
            yield dict(zip(names, row, strict=True))

    def summary(self, left_out: LeftOut | None = None) -> dict[str, Any]:
        """Return the rest.

        The keys "left_out" and "sixteen_bits", and under "masks" those of `MASK_DOUBTS`, are there only where there is
        something to tell, so that the manifest of a set without such stays what it always was.
        """
        low, high, narrow, wide = self._database.execute(
            "select min(height), max(height), min(width), max(width) from images"
        ).fetchone()
        (sizes,) = self._database.execute("select count(*) from (select distinct height, width from images)").fetchone()
        masks = {**self._masks, **{doubt: found for doubt, found in self._doubts.items() if found.count}}
        largest = max((found["largest"] for found in self._deep), default=65535)
        unused = left_out.summary() if left_out else {}
        return {
            "height": [low, high],
            "width": [narrow, wide],
            "distinct_sizes": sizes,
            **self._duplicates(),
            "masks": {problem: {"count": found.count, "examples": found.first} for problem, found in masks.items()},
            **({"left_out": unused} if any(unused.values()) else {}),
            **(
                {
                    "sixteen_bits": {
                        "count": sum(found["count"] for found in self._deep),
                        "largest": largest,
                        "example": min(found["example"] for found in self._deep),
                    }
                }
                if largest < SMALL_PART
                else {}
            ),
        }

    def _duplicates(self) -> dict[str, Any]:
        """Return groups of identical images: all, those of several splits, those of several labels."""
        kinds = ("duplicates", "duplicates_across_splits", "duplicates_with_other_label")
        counts = dict.fromkeys(kinds, 0)
        named: dict[str, list[str]] = {kind: [] for kind in kinds}
        groups = self._database.execute(
            "select sha256, 1, min(split) <> max(split), min(coalesce(label, -1)) <> max(coalesce(label, -1)) "
            "from images group by sha256 having count(*) > 1 order by sha256"
        )
        for sha256, *belongs in groups:
            for kind in (kind for kind, does in zip(kinds, belongs, strict=True) if does):
                counts[kind] += 1
                if len(named[kind]) < EXAMPLES:
                    named[kind].append(sha256)
        members: dict[str, list[str]] = {sha256: [] for found in named.values() for sha256 in found}
        marks = ", ".join("?" * len(members))
        rows = self._database.execute(
            f"select sha256, sample_id from images where sha256 in ({marks}) order by rowid", list(members)
        )
        for sha256, sample_id in rows:
            members[sha256].append(sample_id)
        return {
            kind: {"groups": counts[kind], "examples": [members[sha256] for sha256 in named[kind]]} for kind in kinds
        }


class _Names:
    """How many names there are, and the first of them by the alphabet."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        names = list(names)
        self.count += len(names)
        self.first = heapq.nsmallest(EXAMPLES, [*self.first, *names])
