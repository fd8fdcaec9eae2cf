import gc
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unianom import files
from unianom.data.schema import REJECTED_SCHEMA, SAMPLE_SCHEMA, SCHEMA_VERSION, SCORE_SCHEMA, SCORE_VERSION
from unianom.data.shards import (
    MANIFEST,
    REJECTED,
    PartWriter,
    ScoreSet,
    Selection,
    ShardSet,
    write_rejected,
)
from unianom.errors import DataError, MachineError

SPLITS = ("test", "train", "val")  # in the order that parts hold them


def sample(number, split, **changes):
    """A row of SAMPLE_SCHEMA; labels, defects and masks are now and then null."""
    rng = np.random.default_rng([number, *split.encode()])
    return {
        "sample_id": f"set/{split}/{number:03d}.png",
        "dataset": "set",
        "category": ("bolt", "nut", "washer")[number % 3],
        "split": split,
        "label": (0, 1, None)[number % 3],
        "defect": ("good", "dent", None, None)[number % 4],
        "image": rng.bytes(1000 + number),
        "format": ("PNG", "JPEG")[number % 2],
        "height": 10 + number,
        "width": 2**30 + number,
        "mask": rng.bytes(20) if number % 5 == 0 else None,
        "uri": f"s3://bucket/ä b/{number}.png",
        "sha256": f"{number:064x}",
        **changes,
    }


def score(number, split):
    """A row of SCORE_SCHEMA, every third of them of an image that could not be read."""
    bad = number % 3 == 2
    kept = ("sample_id", "dataset", "category", "split", "label", "defect", "uri", "sha256", "height", "width")
    nothing = {"sha256": None, "height": None, "width": None} if bad else {}
    return {
        **{key: sample(number, split)[key] for key in kept},
        **nothing,
        "score": None if bad else number / 8,
        "calibrated_score": None if number % 2 else number / 16,
        "decision": None if bad else "pass",
        "anomaly_map": None if bad else b"png",
        "map_offset": None if bad else -0.5,
        "map_scale": None if bad else 0.25,
        "calibration_offset": None if number % 2 else 0.125,
        "calibration_scale": None if number % 2 else 2.0,
        "status": "corrupt" if bad else "ok",
        "error": "cannot decode" if bad else None,
        "model": "5e" * 32,
    }


ROWS = [sample(number, split) for split in SPLITS for number in range(20)]


def write_part(folder, name, rows, schema=SAMPLE_SCHEMA, group_bytes=64 << 20):
    with files.open_atomic(files.join(folder, name)) as handle:
        writer = PartWriter(handle, schema, group_bytes)
        for row in rows:
            writer.write(row)
        writer.close()


def entry(folder, name, rows):
    """What a manifest says of a part."""
    return {"name": name, "rows": len(rows), "sha256": files.sha256_file(files.join(folder, name))}


def with_checksums(shards):
    """The same set, its manifest telling the checksums of its parts as they are now: damage is left to the pages'."""
    manifest = {**shards.manifest}
    manifest["files"] = [
        {**entry, "sha256": files.sha256_file(files.join(shards.uri, entry["name"]))} for entry in manifest["files"]
    ]
    return type(shards)(shards.uri, manifest, shards.digest)


def counts(rows):
    keys = ("dataset", "category", "split", "label", "defect")
    groups = {tuple(row[key] for key in keys): 0 for row in rows}
    for row in rows:
        groups[tuple(row[key] for key in keys)] += 1
    return [{**dict(zip(keys, group)), "count": count} for group, count in groups.items()]


def write_set(folder, parts, kind="shard set", group_bytes=64 << 20, **changes):
    """Parts of rows and their manifest."""
    for number, rows in enumerate(parts):
        schema = SAMPLE_SCHEMA if kind == "shard set" else SCORE_SCHEMA
        write_part(folder, f"part-{number}.parquet", rows, schema, group_bytes)
    manifest = {
        "kind": kind,
        "schema_version": SCHEMA_VERSION if kind == "shard set" else SCORE_VERSION,
        "counts": counts([row for rows in parts for row in rows]),
        "files": [entry(folder, f"part-{number}.parquet", rows) for number, rows in enumerate(parts)],
        "rejected": {},
        **changes,
    }
    files.write_json(files.join(folder, MANIFEST), manifest)
    return str(folder)


@pytest.fixture
def shards(tmp_path):
    return ShardSet.open(write_set(tmp_path, [ROWS]))


# ---- what is written is read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["samples", "scores"])
@pytest.mark.parametrize("group_bytes", [0, 1, 700, 5000, 64 << 20])
def test_tables_make_the_same_file_as_their_rows(tmp_path, group_bytes, kind):
    """However the rows are cut, and whatever their dictionaries hold."""
    schema, rows = (
        (SAMPLE_SCHEMA, ROWS) if kind == "samples" else (SCORE_SCHEMA, [score(n, s) for s in SPLITS for n in range(20)])
    )
    rows = [*rows, *rows[5:9], *rows[:3]]
    write_part(tmp_path, "rows.parquet", rows, schema, group_bytes)
    whole = pa.Table.from_pylist(rows, schema)
    for cuts in ([], [1], [7, 8, 30], range(1, len(rows))):
        with files.open_atomic(files.join(tmp_path, "tables.parquet")) as handle:
            writer = PartWriter(handle, schema, group_bytes)
            for first, last in itertools.pairwise([0, *cuts, len(rows)]):
                writer.write_table(whole.slice(first, last - first))
            writer.close()
        assert (tmp_path / "tables.parquet").read_bytes() == (tmp_path / "rows.parquet").read_bytes()
    with files.open_atomic(files.join(tmp_path, "both.parquet")) as handle:
        writer = PartWriter(handle, schema, group_bytes)
        writer.write(rows[0])
        writer.write_table(whole.slice(1, 20))
        for row in rows[21:]:
            writer.write(row)
        writer.close()
    assert (tmp_path / "both.parquet").read_bytes() == (tmp_path / "rows.parquet").read_bytes()


def test_a_part_that_fails_leaves_no_file_and_no_open_writer(tmp_path):
    with (
        pytest.raises(KeyError, match="split"),
        files.open_atomic(files.join(tmp_path, "part.parquet")) as handle,
        PartWriter(handle, SAMPLE_SCHEMA) as writer,
    ):
        writer.write({name: value for name, value in ROWS[0].items() if name != "split"})
    assert list(tmp_path.iterdir()) == []
    assert not writer._writer.is_open


@pytest.mark.parametrize(
    ("stated", "found"), [(True, "all"), (False, "none"), ("none", "none"), ("flagged", "flagged"), ("all", "all")]
)
def test_score_sets_of_before_and_now_tell_which_maps_they_hold(tmp_path, stated, found):
    scores = ScoreSet.open(write_set(tmp_path, [[score(0, "test")]], "score set", maps=stated))
    assert scores.maps == found


def test_maps_of_a_kind_that_is_not_known_are_told(tmp_path):
    scores = ScoreSet.open(write_set(tmp_path / "new", [[score(0, "test")]], "score set", maps="few"))
    with pytest.raises(DataError, match="holds the maps of 'few' images, this unianom knows none, flagged, all"):
        _ = scores.maps
    with pytest.raises(DataError, match="maps is no bool"):
        ScoreSet.open(write_set(tmp_path / "broken", [[score(0, "test")]], "score set", maps=3))


@pytest.mark.parametrize("group_bytes", [1, 5000, 64 << 20])
def test_every_column_of_a_sample_comes_back_nulls_included(tmp_path, group_bytes):
    write_part(tmp_path, "part-0.parquet", ROWS, group_bytes=group_bytes)
    shards = ShardSet(str(tmp_path), {"files": [entry(tmp_path, "part-0.parquet", ROWS)]}, "")
    table = shards.table()
    assert table.schema.equals(SAMPLE_SCHEMA)
    assert table.to_pylist() == ROWS


def test_every_column_of_a_score_comes_back_nulls_included(tmp_path):
    rows = [score(number, "test") for number in range(10)]
    scores = ScoreSet.open(write_set(tmp_path, [rows], "score set"))
    assert scores.table().schema.equals(SCORE_SCHEMA)
    assert scores.table().to_pylist() == rows


def test_a_plain_parquet_reader_sees_the_same(shards):
    table = pq.read_table(files.join(shards.uri, "part-0.parquet"))
    assert table.column("image").to_pylist() == [row["image"] for row in ROWS]
    assert table.column("category").cast(pa.string()).to_pylist() == [row["category"] for row in ROWS]


def test_parts_and_their_rows_keep_their_order(tmp_path):
    parts = [[sample(number, split) for split in SPLITS for number in range(start, 20, 4)] for start in range(4)]
    shards = ShardSet.open(write_set(tmp_path, parts))
    assert shards.parts == [f"part-{number}.parquet" for number in range(4)]
    expected = [row["sample_id"] for rows in parts for row in rows]
    assert shards.table(columns=["sample_id"]).column("sample_id").to_pylist() == expected


def test_equal_rows_make_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        write_part(tmp_path / folder, "part-0.parquet", ROWS, group_bytes=9000)
    assert files.read_bytes(tmp_path / "a/part-0.parquet") == files.read_bytes(tmp_path / "b/part-0.parquet")


def test_a_part_without_rows_reads_as_none(tmp_path):
    shards = ShardSet.open(write_set(tmp_path, [[], ROWS]))
    assert list(shards.read("part-0.parquet")) == []
    assert list(shards.read("part-0.parquet", Selection(("train",), ("nut",), (0,)))) == []
    assert shards.table().to_pylist() == ROWS


def test_required_columns_cannot_be_null(tmp_path):
    with pytest.raises(pa.ArrowInvalid, match="non-nullable"):
        write_part(tmp_path, "part-0.parquet", [sample(0, "train", sha256=None)])
    gc.collect(1)  # the unfinished writer, here rather than in another test
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("schema", [SAMPLE_SCHEMA, SCORE_SCHEMA], ids=["samples", "scores"])
def test_images_are_stored_as_they_are_and_text_is_coded(tmp_path, schema):
    rows = ROWS if schema is SAMPLE_SCHEMA else [score(number, "test") for number in range(9)]
    write_part(tmp_path, "part-0.parquet", rows, schema)
    group = pq.ParquetFile(tmp_path / "part-0.parquet").metadata.row_group(0)
    columns = {group.column(number).path_in_schema: group.column(number) for number in range(group.num_columns)}
    for name, column in columns.items():
        stored_raw = name in ("image", "mask", "anomaly_map")
        assert column.compression == ("UNCOMPRESSED" if stored_raw else "ZSTD")
        assert ("RLE_DICTIONARY" in column.encodings) == pa.types.is_dictionary(schema.field(name).type)
    if schema is SAMPLE_SCHEMA:
        content = (tmp_path / "part-0.parquet").read_bytes()
        assert all(row["image"] in content for row in rows)


# ---- row groups ---------------------------------------------------------------------------------------------------


def groups_of(path):
    """Splits and bytes of images of every row group."""
    parquet = pq.ParquetFile(path)
    tables = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
    return [
        (table.column("split").cast(pa.string()).to_pylist(), sum(map(len, table.column("image").to_pylist())))
        for table in tables
    ]


def test_row_groups_never_mix_splits(tmp_path):
    mixed = [ROWS[number] for number in (0, 1, 20, 21, 22, 2, 40, 3)]
    write_part(tmp_path, "part-0.parquet", mixed)
    splits = [group for group, _ in groups_of(tmp_path / "part-0.parquet")]
    assert splits == [["test"] * 2, ["train"] * 3, ["test"], ["val"], ["test"]]


def test_row_groups_end_soon_after_their_size_is_reached(tmp_path):
    write_part(tmp_path, "part-0.parquet", ROWS, group_bytes=3000)
    groups = groups_of(tmp_path / "part-0.parquet")
    assert all(len(set(splits)) == 1 for splits, _ in groups)
    assert max(size for _, size in groups) <= 3000 + 1100
    # only the last group of a split may be small
    following = [splits for splits, _ in groups[1:]] + [["none"]]
    assert all(size > 3000 - 100 or after[0] != splits[0] for (splits, size), after in zip(groups, following))


@pytest.mark.parametrize("group_rows", [1, 7, 20, 1000])
@pytest.mark.parametrize("group_bytes", [3000, 64 << 20])
def test_row_groups_end_when_they_have_their_rows(tmp_path, group_rows, group_bytes):
    for name in ("rows", "tables"):
        with files.open_atomic(files.join(tmp_path, name)) as handle:
            writer = PartWriter(handle, SAMPLE_SCHEMA, group_bytes, group_rows)
            if name == "tables":
                table = pa.Table.from_pylist(ROWS, SAMPLE_SCHEMA)
                for start in range(0, 60, 13):
                    writer.write_table(table.slice(start, 13))
            else:
                for row in ROWS:
                    writer.write(row)
            writer.close()
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "tables").read_bytes()
    sizes = [len(splits) for splits, _ in groups_of(tmp_path / "rows")]
    assert sum(sizes) == 60
    if group_bytes > 1 << 20:
        expected = [min(group_rows, 20 - start) for start in range(0, 20, group_rows)]
        assert sizes == 3 * expected
    else:
        assert max(sizes) == min(group_rows, 3)


def test_readers_skip_row_groups_of_other_splits(shards):
    """Whatever lies in the others is not looked at, even garbage."""
    path = Path(shards.uri) / "part-0.parquet"
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for number in (0, 2):
        column = metadata.row_group(number).column(SAMPLE_SCHEMA.names.index("image"))
        start = column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(bytes(content))
    shards = with_checksums(shards)
    assert shards.table(Selection(("train",))).to_pylist() == ROWS[20:40]
    for split in ("test", "val"):
        with pytest.raises(DataError):
            shards.table(Selection((split,)))


# ---- selections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [(), ("train",), ("val", "test")])
@pytest.mark.parametrize("categories", [(), ("nut",), ("washer", "bolt")])
@pytest.mark.parametrize("labels", [(), (0,), (1,), (1, 0)])
def test_a_selection_is_what_a_loop_finds(shards, splits, categories, labels):
    selection = Selection(splits, categories, labels)
    expected = [
        row
        for row in ROWS
        if (not splits or row["split"] in splits)
        and (not categories or row["category"] in categories)
        and (not labels or row["label"] in labels)
    ]
    assert shards.table(selection).to_pylist() == expected
    assert shards.count(selection) == len(expected)


def test_an_unknown_label_is_in_no_list_of_labels(shards):
    assert shards.count(Selection()) == 60
    assert shards.count(Selection(labels=(0, 1))) == 60 - sum(row["label"] is None for row in ROWS)
    assert None not in shards.table(Selection(labels=(0, 1))).column("label").to_pylist()


def test_columns_and_batches_are_as_asked(shards):
    batches = list(shards.read("part-0.parquet", Selection(labels=(1,)), ["height", "sample_id"], rows=4))
    assert all(batch.schema.names == ["height", "sample_id"] and 0 < batch.num_rows <= 4 for batch in batches)
    expected = [{"height": row["height"], "sample_id": row["sample_id"]} for row in ROWS if row["label"] == 1]
    assert [row for batch in batches for row in batch.to_pylist()] == expected


def test_a_selection_that_holds_nothing_is_refused(shards):
    shards.check(Selection(("train",), ("nut",), (1,)))
    with pytest.raises(DataError, match=r"unknown split trian; splits are train, val, test"):
        shards.check(Selection(("trian",)))
    with pytest.raises(DataError, match=r"no category cog; it has bolt, nut, washer"):
        shards.check(Selection(categories=("nut", "cog")))
    with pytest.raises(DataError, match=r"no sample of split .*train.*it has .*test with label 0"):
        shards.check(Selection(("train",), ("bolt",), (1,)))  # every bolt has label 0
    assert shards.categories == ["bolt", "nut", "washer"]


# ---- where rows lie -----------------------------------------------------------------------------------------------

PARTS = [ROWS[:33], [], ROWS[33:50], ROWS[50:]]
"""One part is without rows."""

SELECTIONS = [
    Selection(),
    Selection(("train", "val"), ("bolt", "washer"), (0,)),
    Selection(("val",)),
    Selection(("test",), labels=(1,)),
]


@pytest.fixture
def grouped(tmp_path):
    """Row groups of three images or less."""
    return ShardSet.open(write_set(tmp_path, PARTS, group_bytes=2500))


def selected(row, selection):
    return (
        (not selection.splits or row["split"] in selection.splits)
        and (not selection.categories or row["category"] in selection.categories)
        and (not selection.labels or row["label"] in selection.labels)
    )


@pytest.mark.parametrize("selection", SELECTIONS)
def test_rows_are_located_by_part_group_and_place_among_the_selected(grouped, selection):
    expected = []
    for part, rows in enumerate(PARTS):
        bounds = [0]
        if rows:
            metadata = pq.ParquetFile(files.join(grouped.uri, f"part-{part}.parquet")).metadata
            for group in range(metadata.num_row_groups):
                bounds.append(bounds[-1] + metadata.row_group(group).num_rows)
            assert len(bounds) > 4
        place = 0
        for number, row in enumerate(rows):
            if selected(row, selection):
                group = next(g for g, end in enumerate(bounds[1:]) if number < end)
                names = {"category": row["category"], "sample_id": row["sample_id"]}
                expected.append({**names, "part": part, "group": group, "row": place})
                place += 1
    located = grouped.locate(selection, ["category", "sample_id"])
    assert located.to_pylist() == expected
    assert located.schema.names == ["category", "sample_id", "part", "group", "row"]
    assert [located.schema.field(name).type for name in ("part", "group", "row")] == [pa.int64()] * 3


def test_places_count_the_rows_that_reading_a_part_yields(grouped):
    selection = SELECTIONS[1]
    located = grouped.locate(selection, ["sample_id"]).to_pylist()
    for number, part in enumerate(grouped.parts):
        read = [name for batch in grouped.read(part, selection, ["sample_id"]) for name in batch[0].to_pylist()]
        assert [(row["row"], row["sample_id"]) for row in located if row["part"] == number] == list(enumerate(read))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_row_groups_read_one_by_one_make_up_the_part(grouped, selection):
    for part, rows in zip(grouped.parts, PARTS):
        count = grouped.groups(part)
        assert count == pq.ParquetFile(files.join(grouped.uri, part)).num_row_groups
        tables = [grouped.read_group(part, group, selection, SAMPLE_SCHEMA.names) for group in range(count)]
        assert [row for table in tables for row in table.to_pylist()] == [r for r in rows if selected(r, selection)]


def test_a_row_group_has_the_columns_asked_for_and_plain_strings(grouped):
    group = grouped.read_group("part-0.parquet", 1, Selection(), ["category", "height", "split", "image"])
    assert group.schema.names == ["category", "height", "split", "image"]
    assert group.schema.types == [pa.string(), pa.int32(), pa.string(), pa.binary()]
    nothing = grouped.read_group("part-0.parquet", 1, Selection(("val",)), ["category", "image"])
    assert (nothing.num_rows, nothing.schema.types) == (0, [pa.string(), pa.binary()])


def test_a_missing_or_damaged_part_is_told_by_its_row_groups_too(grouped):
    path = Path(grouped.uri) / "part-2.parquet"
    content = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(1).column(SAMPLE_SCHEMA.names.index("image"))
    end = column.data_page_offset + column.total_compressed_size
    path.write_bytes(content[: end - 20] + bytes(20) + content[end:])
    grouped = with_checksums(grouped)
    assert grouped.read_group("part-2.parquet", 0, Selection(), ["image"]).num_rows > 0
    with pytest.raises(
        DataError, match=r"cannot read .*part-2.parquet: .*copy it again, or remove .*jobs/ingest.py again"
    ):
        grouped.read_group("part-2.parquet", 1, Selection(), ["image"])
    path.unlink()
    for look in (
        lambda: grouped.groups("part-2.parquet"),
        lambda: grouped.read_group("part-2.parquet", 0, Selection(), ["image"]),
        lambda: grouped.locate(Selection(), ["sample_id"]),
    ):
        with pytest.raises(DataError, match=r"part-2.parquet is listed in the manifest but missing"):
            look()


# ---- what is missing, damaged or something else -------------------------------------------------------------------


def test_the_digest_names_the_manifest(tmp_path):
    first = ShardSet.open(write_set(tmp_path / "a", [ROWS]))
    again = ShardSet.open(write_set(tmp_path / "b", [ROWS]))
    other = ShardSet.open(write_set(tmp_path / "c", [ROWS], source="elsewhere"))
    assert first.digest == again.digest == files.sha256_of((tmp_path / "a" / MANIFEST).read_bytes())
    assert other.digest != first.digest


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"no shard set .*found: nothing.*jobs/ingest.py"):
        ShardSet.open(tmp_path / "absent")
    (tmp_path / "photo.png").touch()
    with pytest.raises(DataError, match=r"no score set .*found: photo.png.*jobs/score.py"):
        ScoreSet.open(tmp_path)


def test_an_unfinished_set_says_so(tmp_path):
    write_part(tmp_path, "part-0.parquet", ROWS)
    with pytest.raises(DataError, match=r"unfinished .*run its jobs/ingest.py command again"):
        ShardSet.open(tmp_path)


def test_another_kind_of_set(tmp_path):
    write_set(tmp_path, [ROWS])
    with pytest.raises(DataError, match=r"is a shard set, not a score set"):
        ScoreSet.open(tmp_path)


def test_another_schema_version(tmp_path):
    write_set(tmp_path, [ROWS], schema_version=SCHEMA_VERSION + 1)
    with pytest.raises(
        DataError, match=rf"schema version {SCHEMA_VERSION + 1}, this unianom reads {SCHEMA_VERSION}; remove"
    ):
        ShardSet.open(tmp_path)


def test_a_damaged_manifest(tmp_path):
    write_set(tmp_path, [ROWS])
    (tmp_path / MANIFEST).write_text('{"kind": "shard')
    with pytest.raises(DataError, match=r"_manifest.json is damaged: .*remove .* and run jobs/ingest.py again"):
        ShardSet.open(tmp_path)


COUNT = {"dataset": "d", "category": "c", "split": "test", "label": 0, "defect": "good", "count": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": [1]}, "an entry of counts is no dict"),
        ({"counts": [{key: value for key, value in COUNT.items() if key != "category"}]}, "has no category"),
        ({"counts": [{**COUNT, "count": "1"}]}, "count is no int"),
        ({"rejected": "x"}, "rejected is no dict"),
        ({"summary": []}, "summary is no dict"),
    ],
)
def test_a_manifest_of_another_shape(tmp_path, changes, words):
    write_set(tmp_path, [ROWS], **changes)
    with pytest.raises(DataError, match=rf"_manifest.json is damaged: .*{words}; remove .* run jobs/ingest.py again"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shards": {}}, "shards has no digest|it has no digest"),
        ({"models": ["d"]}, "an entry of models is no dict"),
        ({"models": [{"digest": "d", "config": None}]}, "config is no dict"),
        ({"statuses": None}, "statuses is no dict"),
    ],
)
def test_a_manifest_of_scores_of_another_shape(tmp_path, changes, words):
    write_set(tmp_path, [], "score set", **changes)
    with pytest.raises(DataError, match=rf"_manifest.json is damaged: .*({words}); remove .* run jobs/score.py again"):
        ScoreSet.open(tmp_path)


def test_a_missing_part(shards):
    (Path(shards.uri) / "part-0.parquet").unlink()
    with pytest.raises(
        DataError, match=r"part-0.parquet is listed in the manifest but missing; copy it again, or remove"
    ):
        shards.table()


def test_a_cut_off_part(shards):
    path = Path(shards.uri) / "part-0.parquet"
    content = path.read_bytes()
    for length in (0, 3, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"part-0.parquet is damaged or another set's: .*copy it again, or remove"):
            shards.table()


def test_no_flipped_bit_reaches_a_reader(shards):
    """Either the rows are as they were written (the bit lay between them) or the reader is told."""
    path = Path(shards.uri) / "part-0.parquet"
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    told = 0
    for position in np.random.default_rng(5).integers(4, footer, 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(position % 8)
        path.write_bytes(bytes(damaged))
        try:
            assert shards.table().to_pylist() == ROWS
        except DataError as error:
            assert "part-0.parquet" in str(error)  # noqa: PT017
            told += 1
    assert told > 50


def test_a_part_of_other_columns_is_told(shards):
    pq.write_table(
        pa.table({"split": ["train"], "category": ["nut"], "label": [0]}), files.join(shards.uri, "part-0.parquet")
    )
    with pytest.raises(DataError, match=r"part-0.parquet holds 1 rows, _manifest.json says 60"):
        with_checksums(shards).table()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda table: table.drop_columns(["mask"]), "it has no column mask"),
        (
            lambda table: table.set_column(4, "label", table["label"].cast(pa.string())),
            "column label is string, not int8",
        ),
    ],
)
def test_a_part_of_another_schema_is_told_whatever_is_read_of_it(shards, change, fault):
    path = Path(shards.uri) / "part-0.parquet"
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    with pytest.raises(DataError, match=rf"part-0.parquet is no part of a shard set: {fault}; copy it again"):
        with_checksums(shards).table(columns=["sample_id"])


@pytest.mark.parametrize("columns", [["sample_id"], ["image"]])
def test_a_part_with_rows_removed_or_of_another_set_is_named(tmp_path, columns):
    """Valid Parquet of the right schema, so that only the manifest knows."""
    uri = write_set(tmp_path / "set", [ROWS[:20], ROWS[20:40], ROWS[40:]])
    changed = [sample(number, "train", sample_id=f"other/{number}") for number in range(20)]
    write_part(tmp_path / "set", "part-1.parquet", changed)
    found = files.sha256_file(files.join(uri, "part-1.parquet"))[:12]
    with pytest.raises(DataError, match=rf"set/part-1.parquet is damaged or another set's: its SHA-256 is {found}…"):
        ShardSet.open(uri).table(columns=columns)
    write_part(tmp_path / "set", "part-1.parquet", ROWS[20:39])
    with pytest.raises(DataError, match=r"set/part-1.parquet holds 19 rows, _manifest.json says 20; copy it again"):
        with_checksums(ShardSet.open(uri)).table(columns=columns)


def test_a_large_part_is_checked_where_its_images_are_read(shards, monkeypatch):
    """Reading the identifiers of a large set does not read all of it; taking its images does."""
    monkeypatch.setattr("unianom.data.shards.SMALL", 0)
    rows = [{**ROWS[0], "image": b"exchanged"}, *ROWS[1:]]
    write_part(shards.uri, "part-0.parquet", rows)
    assert shards.table(columns=["sample_id"]).num_rows == len(ROWS)
    with pytest.raises(DataError, match=r"part-0.parquet is damaged or another set's"):
        next(iter(shards.read("part-0.parquet", columns=["image"])))


def test_a_part_is_hashed_once_until_it_changes(shards, monkeypatch):
    hashed = []
    monkeypatch.setattr(files, "sha256_file", lambda uri, own=files.sha256_file: hashed.append(uri) or own(uri))
    for _ in range(3):
        shards.table(columns=["image"])
    assert len(hashed) == 1
    write_part(shards.uri, "part-0.parquet", ROWS[:59])
    with pytest.raises(DataError, match=r"part-0.parquet is damaged"):
        shards.table(columns=["image"])


@pytest.mark.parametrize(
    "name", ["../set/part-0.parquet", "/etc/part-0.parquet", "..", "a\\part-0.parquet", "", "sub/x"]
)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, name):
    part = {"name": name, "rows": 60, "sha256": ""}
    uri = write_set(tmp_path / "set", [ROWS], files=[part])
    with pytest.raises(DataError, match=r"_manifest.json names the part .* which is no file beside it") as raised:
        ShardSet.open(uri)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("entry", [{"name": "part-0.parquet"}, "part-0.parquet", {"name": 3, "rows": 1, "sha256": ""}])
def test_a_manifest_that_tells_too_little_of_its_parts(tmp_path, entry):
    with pytest.raises(DataError, match=r"_manifest.json is damaged: a part in it lacks name, rows or sha256"):
        ShardSet.open(write_set(tmp_path, [ROWS], files=[entry]))


def test_a_pipe_in_the_place_of_a_part_is_told(shards):
    path = Path(shards.uri) / "part-0.parquet"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MachineError, match=r"part-0.parquet is a named pipe, not a file"):
        shards.table()


# ---- rejected samples, other file systems -------------------------------------------------------------------------

REJECTED_ROW = {
    "sample_id": "set/x.png",
    "dataset": "set",
    "category": "nut",
    "split": "test",
    "label": None,
    "defect": None,
    "uri": "/x.png",
    "status": "corrupt",
    "error": "the file is empty",
}


def test_rejected_samples_are_kept_in_full(shards):
    rows = [{**REJECTED_ROW, "sample_id": name} for name in ("set/a", "set/b", "set/c")]
    write_rejected(shards.uri, rows)
    with pytest.raises(DataError, match=r"_rejected.parquet holds 3 rows, _manifest.json says 0; copy it again"):
        shards.rejected()
    shards.manifest["rejected"]["corrupt"] = 3
    assert shards.rejected().schema.equals(REJECTED_SCHEMA)
    assert shards.rejected().to_pylist() == rows
    write_rejected(shards.uri, [])
    shards.manifest["rejected"].clear()
    assert shards.rejected().num_rows == 0
    assert shards.rejected().schema.equals(REJECTED_SCHEMA)


def test_rejected_samples_are_the_same_file_however_many(tmp_path):
    """As one table would be written, though its rows come one by one."""
    for count in (0, 1, 1024, 3000):
        rows = [{**REJECTED_ROW, "sample_id": f"set/{number:06d}", "label": number % 2} for number in range(count)]
        write_rejected(str(tmp_path), iter(rows))
        whole = tmp_path / "whole.parquet"
        pq.write_table(pa.Table.from_pylist(rows, REJECTED_SCHEMA), whole, compression="zstd")
        assert (tmp_path / REJECTED).read_bytes() == whole.read_bytes()


def test_a_missing_or_damaged_list_of_rejected_samples(shards):
    with pytest.raises(DataError, match=r"cannot read .*_rejected.parquet"):
        shards.rejected()
    (Path(shards.uri) / REJECTED).write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(DataError, match=r"cannot read .*_rejected.parquet"):
        shards.rejected()


def test_a_set_on_an_object_store():
    folder = "memory://test-shards/set"
    try:
        shards = ShardSet.open(write_set(folder, [ROWS[:20], ROWS[20:]], rejected={"corrupt": 1}))
        write_rejected(folder, [REJECTED_ROW])
        assert shards.uri.startswith("memory://")
        assert shards.table().to_pylist() == ROWS
        assert shards.table(Selection(("val",)), ["sample_id"]).num_rows == 20
        assert shards.rejected().to_pylist() == [REJECTED_ROW]
        write_part(folder, "part-1.parquet", ROWS[20:40])
        with pytest.raises(DataError, match=r"memory:.*part-1.parquet is damaged or another set's"):
            shards.table()
        files.remove(files.join(folder, "part-1.parquet"))
        with pytest.raises(DataError, match=r"part-1.parquet is listed in the manifest but missing"):
            shards.table()
        files.remove(files.join(folder, MANIFEST))
        with pytest.raises(DataError, match="unfinished"):
            ShardSet.open(folder)
    finally:
        files.remove("memory://test-shards")


def test_the_manifest_may_hold_more_than_this_version_knows(tmp_path):
    shards = ShardSet.open(write_set(tmp_path, [ROWS], note={"any": ["thing"]}))
    assert shards.manifest["note"] == {"any": ["thing"]}
    assert json.loads((tmp_path / MANIFEST).read_text()) == shards.manifest
