"""Listings on disk: the same plans, digests and findings as in memory, without its memory."""

import dataclasses
import gc
import hashlib
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.ingest_findings import SetFindings
from pipelines.data.ingest_plan import PartTasks, SampleListing, pack_samples, unpack_samples
from unianom.data.id_digest import IdDigest
from unianom.data.schema import REJECTED_SCHEMA, Crop, SampleRef
from unianom.data.splits import hold_out
from unianom.errors import DataError
from unianom.temporary_database import temporary_database

Row = dict[str, Any]


def sample(number: int) -> SampleRef:
    """A sample whose other attributes take all kinds of values."""
    draw = random.Random(number)
    category = draw.choice(("bolt", "nut", "Öse", "a b"))
    return SampleRef(
        sample_id=f"{draw.choice('xyzéÄ')}/{category}/{number}.png",
        dataset=draw.choice(("set", "other")),
        category=category,
        split=draw.choice(("train", "val", "test")),
        label=draw.choice((0, 1, None)),
        defect=draw.choice(("good", "dent", None)),
        uri=f"/data/{number} ü'\".png",
        mask_uri=draw.choice((None, f"/masks/{number}.png")),
        mask_threshold=draw.choice((None, 0, 127)),
        size=draw.choice((None, 0, 12345, 5 << 32)),
        data=draw.choice((None, None, b"", b"\0image\0")),
        crop=draw.choice((None, Crop("centre", 9, pad=True), Crop("fundus", 7, threshold=3))),
        more_masks=draw.choice(((), (), ("/m/1", "/m/2"))),
    )


SAMPLES = [sample(number) for number in range(400)]


def dealt(refs: list[SampleRef], part_bytes: int, min_parts: int) -> list[list[SampleRef]]:
    """The parts by sorting in memory."""
    total = sum(ref.size or len(ref.data or b"") for ref in refs)
    count = min(max(-(-total // part_bytes), min_parts), len(refs))

    def key(ref: SampleRef) -> tuple[Any, ...]:
        label = -1 if ref.label is None else ref.label
        return ref.split, ref.dataset, ref.category, label, hashlib.sha256(ref.sample_id.encode()).digest()

    ordered = sorted(refs, key=key)
    return [ordered[start::count] for start in range(count)]


def digest(refs: list[SampleRef]) -> str:
    """The digest by sorting in memory."""
    found = hashlib.sha256()
    for ref in sorted(refs, key=lambda ref: ref.sample_id):
        content = hashlib.sha256(ref.data).hexdigest() if ref.data else None
        *plain, _, _ = dataclasses.astuple(
            dataclasses.replace(ref, data=None, crop=None, mask_threshold=ref.mask_threshold or 0)
        )
        found.update(repr(tuple(plain)).encode() + repr(content).encode())
        found.update(b"" if ref.crop is None else repr(ref.crop).encode())
        found.update(repr(ref.more_masks).encode() if ref.more_masks else b"")
        found.update(b"above 0" if ref.mask_threshold == 0 else b"")
    return found.hexdigest()


def contaminated(refs: list[SampleRef], fraction: float, seed: int) -> list[SampleRef]:
    """The samples with some of them moved, in memory."""
    anomalous = [ref for ref in refs if ref.split == "test" and ref.label == 1]
    moved = hold_out([ref.sample_id for ref in anomalous], [ref.category for ref in anomalous], fraction, seed)
    assert moved
    return [
        dataclasses.replace(ref, split="train", label=0, mask_uri=None, more_masks=())
        if ref.sample_id in moved
        else ref
        for ref in refs
    ]


@pytest.mark.parametrize(("part_bytes", "min_parts"), [(1 << 50, 1), (1 << 50, 16), (100 << 30, 3), (1 << 30, 1)])
def test_parts_and_digest_are_those_of_sorting_in_memory(part_bytes: int, min_parts: int) -> None:
    with temporary_database() as database:
        listing = SampleListing(database, SAMPLES)
        listing.check_unique()
        expected = dealt(SAMPLES, part_bytes, min_parts)
        assert listing.deal(part_bytes, min_parts) == len(expected)
        assert [list(listing.part(part)) for part in range(len(expected))] == expected
        assert listing.digest() == digest(SAMPLES)
        assert list(listing) == SAMPLES


@pytest.mark.parametrize(("fraction", "seed"), [(0.1, 0), (0.5, 7), (0.99, 1)])
def test_contaminating_is_that_of_memory(fraction: float, seed: int) -> None:
    with temporary_database() as database:
        listing = SampleListing(database, SAMPLES)
        listing.contaminate(fraction, seed)
        assert list(listing) == contaminated(SAMPLES, fraction, seed)
        assert listing.digest() == digest(contaminated(SAMPLES, fraction, seed))


def test_of_several_repeated_names_the_first_to_be_listed_again_is_told() -> None:
    names = ["a", "b", "c", "b", "a", "d", "b"]
    refs = [dataclasses.replace(sample(n), sample_id=name, uri=f"/{n}") for n, name in enumerate(names)]
    with temporary_database() as database:
        listing = SampleListing(database, refs)
        with pytest.raises(DataError, match="/1 and /3 are both named b; names must be unique"):
            listing.check_unique()


def test_tasks_are_made_when_they_are_asked_for_and_hold_their_part() -> None:
    with temporary_database() as database:
        listing = SampleListing(database, SAMPLES)
        parts = listing.deal(1 << 50, 7)
        asked: list[int] = []
        make = listing.task
        listing.task = lambda part: asked.append(part) or make(part)  # type: ignore[method-assign,func-returns-value]
        tasks = PartTasks(listing, range(1, parts))
        assert (len(tasks), asked) == (6, [])
        for number, task in enumerate(tasks, 1):
            assert asked == [*range(1, number + 1)]
            assert task["number"] == number
            assert list(unpack_samples(task["refs"])) == list(listing.part(number))
        assert [task["number"] for task in tasks[3:5]] == [4, 5]


def test_samples_are_packed_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.ingest_plan.PACKED", 50)
    with temporary_database() as database:
        listing = SampleListing(database, SAMPLES)
        listing.deal(1 << 50, 3)
        packed = listing.task(0)["refs"]
        assert [len(list(unpack_samples([piece]))) for piece in packed] == [50, 50, 34]
    assert list(unpack_samples([pack_samples(SAMPLES)])) == SAMPLES


# ---- findings -----------------------------------------------------------------------------------------------------


def rows(count: int) -> Iterator[Row]:
    """Rows of which some have the same bytes, within a split and a label or across them."""
    for number in range(count):
        yield {
            "sample_id": f"set/{number}",
            "dataset": "set",
            "category": ("bolt", "nut")[number % 2],
            "split": ("train", "test")[number // 2 % 2],
            "label": (0, 1, None)[number % 3],
            "defect": ("good", None)[number // 3 % 2],
            "sha256": f"{number * number % (count // 2 + 1):064x}",
            "height": 10 + number % 7,
            "width": 10 + number % 11,
        }


def found(table: Iterable[Row], database: Any, batch: int = 64) -> SetFindings:
    findings = SetFindings(database)
    left = iter(table)
    while few := [row for _, row in zip(range(batch), left)]:
        findings.add_rows(pa.RecordBatch.from_pylist(few))
    return findings


def test_duplicates_and_counts_are_those_of_memory() -> None:
    table = list(rows(300))
    with temporary_database() as database:
        findings = found(table, database)
        counts, summary = findings.counts(), findings.summary()
    by_hash: dict[str, list[Row]] = {}
    for row in table:
        by_hash.setdefault(row["sha256"], []).append(row)
    groups = [members for _, members in sorted(by_hash.items()) if len(members) > 1]
    for key, column in (("", None), ("_across_splits", "split"), ("_with_other_label", "label")):
        kept = [members for members in groups if column is None or len({row[column] for row in members}) > 1]
        assert len(kept) > 10
        examples = [[row["sample_id"] for row in members] for members in kept[:10]]
        assert summary[f"duplicates{key}"] == {"groups": len(kept), "examples": examples}
    assert summary["distinct_sizes"] == len({(row["height"], row["width"]) for row in table})
    members_of: dict[tuple[Any, ...], list[str]] = {}
    keys = ("dataset", "category", "split", "label", "defect")
    for row in table:
        members_of.setdefault(tuple(row[key] for key in keys), []).append(row["sample_id"])
    assert [tuple(entry[key] for key in keys) for entry in counts] == sorted(members_of, key=str)
    for entry in counts:
        ids = members_of[tuple(entry[key] for key in keys)]
        expected = IdDigest()
        expected.add(ids)
        assert (entry["count"], entry["ids"]) == (len(ids), expected.hex())


def test_rejected_rows_are_sorted_and_counted() -> None:
    rejected = [
        {name: f"{name} {number}" for name in REJECTED_SCHEMA.names} | {"label": None, "status": status}
        for number, status in ((2, "missing"), (1, "corrupt"), (3, "corrupt"))
    ]
    masks: dict[str, list[str]] = {}
    with temporary_database() as database:
        findings = SetFindings(database)
        for row in rejected:
            findings.add_record({"rejected": [row], "masks": masks})
        assert list(findings.rejected()) == [rejected[1], rejected[0], rejected[2]]
        assert findings.statuses() == {"corrupt": 2, "missing": 1}


# ---- memory -------------------------------------------------------------------------------------------------------


def plan_all(count: int) -> None:
    """What an ingest does with a listing: parts of 100 samples of 1,000 bytes."""
    refs = (dataclasses.replace(SAMPLES[number % 400], sample_id=f"set/{number}", size=1000) for number in range(count))
    with temporary_database() as database:
        listing = SampleListing(database, refs)
        listing.check_unique()
        listing.contaminate(0.1, 0)
        parts = listing.deal(100_000, 1)
        assert parts == count // 100
        listing.digest()
        for task in PartTasks(listing, range(parts)):
            assert sum(1 for _ in unpack_samples(task["refs"])) == 100


def find_all(count: int) -> None:
    with temporary_database() as database:
        findings = found(rows(count), database)
        findings.summary()
        findings.counts()


@pytest.mark.parametrize("work", [plan_all, find_all])
def test_memory_does_not_grow_with_the_samples(work: Any) -> None:
    """Less than 10 bytes a sample, of Python's objects; what SQLite holds is bounded by its cache."""
    peaks = {}
    for count in (500, 2000, 5000):  # the first time for what is made once
        gc.collect()
        tracemalloc.start()
        work(count)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[5000] - peaks[2000] < 10 * 3000
