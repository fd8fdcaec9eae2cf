"""Ranges of rows: cut by hand, and read against the whole part."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unianom import files
from unianom.data import row_ranges
from unianom.data.row_ranges import RowGroup, RowRange, cut_ranges
from unianom.data.schema import SAMPLE_SCHEMA
from unianom.data.shards import PartWriter, Selection, ShardSet
from unianom.errors import DataError


def places(groups: list[RowGroup], most_rows: int) -> list[tuple[int, int]]:
    return [(one.first, one.rows) for one in cut_ranges("part", groups, most_rows)]


def test_neighbouring_groups_make_one_range_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_ranges, "MOST_BYTES", 100)
    groups = [RowGroup(3, 10, True), RowGroup(4, 10, True), RowGroup(4, 10, True), RowGroup(2, 95, True)]
    assert places(groups, 8) == [(0, 7), (7, 4), (11, 2)]


def test_a_large_group_is_cut_evenly_and_unwanted_ones_are_passed_over() -> None:
    groups = [RowGroup(5, 1, False), RowGroup(10, 1, True), RowGroup(2, 1, False), RowGroup(1, 1, True)]
    assert places(groups, 4) == [(5, 3), (8, 3), (11, 4), (17, 1)]
    assert [one.opens for one in cut_ranges("part", groups, 4)] == [True, False, False, False]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans())), st.integers(1, 10))
def test_every_wanted_row_is_in_one_range(groups: list[tuple[int, int, bool]], most_rows: int) -> None:
    wanted, start = [], 0
    for rows, _, of_use in groups:
        wanted += range(start, start + rows) if of_use else []
        start += rows
    ranges = places([RowGroup(*group) for group in groups], most_rows)
    assert [row for first, rows in ranges for row in range(first, first + rows)] == wanted
    assert all(1 <= rows <= most_rows for _, rows in ranges)


def sample(number: int, split: str) -> dict[str, object]:
    return {
        "sample_id": f"{number:03d}",
        "dataset": "d",
        "category": "ab"[number % 2],
        "split": split,
        "image": bytes([number]) * 100,
        "format": "PNG",
        "height": 1,
        "width": 1,
        "uri": "u",
        "sha256": "s",
    }


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """A part of 70 rows: 30 of "test" in row groups of a few rows, then 40 of "train"."""
    path = files.join(str(tmp_path), "part-00000.parquet")
    with files.open_atomic(path) as handle:
        writer = PartWriter(handle, SAMPLE_SCHEMA, group_bytes=650)
        for number in range(70):
            writer.write(sample(number, "test" if number < 30 else "train"))
        writer.close()
    entry = {"name": "part-00000.parquet", "rows": 70, "sha256": files.sha256_file(path)}
    return ShardSet(str(tmp_path), {"files": [entry]}, "")


@pytest.mark.parametrize("most_rows", [1, 5, 7, 16, 1000])
@pytest.mark.parametrize(
    "selection", [Selection(), Selection(("test",)), Selection(("train",), ("b",)), Selection(("val",))]
)
def test_ranges_read_what_the_whole_part_does(shards: ShardSet, selection: Selection, most_rows: int) -> None:
    columns = ["sample_id", "image"]
    whole = [row for batch in shards.read("part-00000.parquet", selection, columns) for row in batch.to_pylist()]
    ranges = shards.ranges(selection, most_rows)
    found = [
        row
        for within in ranges
        for batch in shards.read_range(within, selection, columns, rows=3)
        for row in batch.to_pylist()
    ]
    assert found == whole
    if selection.splits == ("test",):
        assert max(one.end for one in ranges) == 30  # row groups of "train" are not even opened


def test_only_the_first_range_of_a_part_compares_its_checksum(shards: ShardSet) -> None:
    entry = {**shards.manifest["files"][0], "sha256": "0" * 64}
    other = ShardSet(shards.uri, {"files": [entry]}, "")
    first, *more = other.ranges(Selection(), 8)
    with pytest.raises(DataError, match="is damaged or another set's: its SHA-256"):
        next(other.read_range(first, None, ["image"]))
    rows = [len(batch) for within in more for batch in other.read_range(within, None, ["image"])]
    assert sum(rows) == 70 - first.rows


def test_a_damaged_page_is_noticed_in_every_range(shards: ShardSet) -> None:
    path = Path(shards.uri, "part-00000.parquet")
    data = bytearray(path.read_bytes())
    data[data.index(bytes([68]) * 100) + 50] ^= 1  # which is in no statistics
    path.write_bytes(data)
    *good, last = shards.ranges(Selection(), 8)
    within = RowRange(last.part, last.first, last.rows, opens=False)
    with pytest.raises(DataError, match="cannot read"):
        pa.Table.from_batches(shards.read_range(within, None, ["image"]))
    for one in good[1:]:
        assert sum(len(batch) for batch in shards.read_range(one, None, ["image"])) == one.rows
